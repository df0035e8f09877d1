"""Where the next run of a sweep comes from: every combination of a grid, or Optuna's search in the same values and ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from preftune.errors import ConfigError
from preftune.sweeping.grid import Axis, Range, Settings, combinations, text_of

if TYPE_CHECKING:
    import optuna

_SEEDS = 2**31


@runtime_checkable
class Search(Protocol):
    """What decides the settings of runs."""

    def ask(self) -> Settings | None:
        """Settings of the next run; None where there is none left to begin."""
        ...

    def tell(self, settings: Settings, value: float | None) -> None:
        """What came of a run: its metric, None where it failed."""
        ...


class Grid:
    """Every combination, once."""

    def __init__(self, axes: Mapping[str, Axis]) -> None:
        """Raises ConfigError for a range without a number of values."""
        self.settings = combinations(axes)
        self._next = iter(self.settings)

    def ask(self) -> Settings | None:
        """The next combination."""
        return next(self._next, None)

    def tell(self, settings: Settings, value: float | None) -> None:
        """A grid does not learn."""


class OptunaSearch:
    """Optuna's TPE sampler (Bergstra et al. 2011) over the values and ranges, its trials in a SQLite file.

    A draw follows from the seed, the trial's number and what is known by then: a search that was interrupted goes on with the
    draws that it would have made, as long as one run is at work at a time.
    """

    def __init__(self, axes: Mapping[str, Axis], file: Path, *, trials: int, seed: int, direction: int) -> None:
        """Opens the search in `file`, or begins it. Raises ConfigError where Optuna is not installed."""
        self._optuna = _optuna()
        self._axes, self._trials, self._seed = dict(axes), trials, seed
        way = "maximize" if direction > 0 else "minimize"
        self._study = self._optuna.create_study(
            study_name="sweep", storage=f"sqlite:///{file.resolve()}", direction=way, load_if_exists=True
        )
        self._asked: list[optuna.trial.FrozenTrial] = []  # by a call that was interrupted
        self._open: list[tuple[Settings, int]] = []
        for trial in self._study.get_trials(states=(self._optuna.trial.TrialState.RUNNING,)):
            if set(trial.params) == set(self._axes):
                self._asked.append(trial)
            else:  # killed within a draw
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def ask(self) -> Settings | None:
        """Those that were interrupted first, then new ones."""
        if self._asked:
            trial = self._asked.pop(0)
            settings = self._settings(trial.params.get)
            number = trial.number
        else:
            number = len(self._study.get_trials(deepcopy=False))
            if number >= self._trials:
                return None
            self._study.sampler = self._optuna.samplers.TPESampler(seed=(self._seed * 1_000_003 + number) % _SEEDS)
            drawn = self._study.ask()
            settings = self._settings(lambda name: _suggest(drawn, name, self._axes[name]))
        self._open.append((settings, number))
        return settings

    def tell(self, settings: Settings, value: float | None) -> None:
        """Hands the metric of a run to the sampler; a run that failed counts as one."""
        at = next(k for k, (asked, _) in enumerate(self._open) if asked == settings)
        _, number = self._open.pop(at)
        if value is None:
            self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(number, value)

    def _settings(self, drawn: Callable[[str], Any]) -> Settings:
        """Values of the axes; of a list Optuna knows the number of the value."""
        found = {}
        for name, axis in self._axes.items():
            value = drawn(name)
            found[name] = float(f"{value:.4g}") if isinstance(axis, Range) and not axis.whole else value
            if not isinstance(axis, Range):
                found[name] = axis[_labels(axis).index(value)]
        return found


def _suggest(trial: optuna.Trial, name: str, axis: Axis) -> Any:
    if not isinstance(axis, Range):
        return trial.suggest_categorical(name, _labels(axis))
    if axis.whole:
        return trial.suggest_int(name, int(axis.low), int(axis.high), log=True)
    return trial.suggest_float(name, axis.low, axis.high, log=True)


def _labels(axis: tuple[Any, ...]) -> list[str]:
    """What the values of an axis are called in Optuna's file, which knows no lists."""
    return [text_of(value) for value in axis]


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ConfigError(
            "--optuna: Optuna is not installed; install it with pip install 'preftune[sweep]', or leave --optuna out for the "
            "whole grid"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
