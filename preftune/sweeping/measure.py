"""A figure by its name, from what is measured of a run; and which of several runs is the best by it.

    >>> figure("samples.kl_per_response", evaluation, metrics)
    Estimate(value=4.86, low=4.5, high=5.2, n=128)

A name is a path into the run's evaluation (`evaluate.record.Evaluation`), where parts of a list are named by their number, or
by what they call themselves: wins.0.win_rate, figures.true reward.value. Or it is a metric of training on held-out examples:
loss, rewards/accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from fnmatch import fnmatchcase
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from preftune.errors import ConfigError, nearest
from preftune.evaluate.estimate import Estimate, mean
from preftune.evaluate.record import Evaluation
from preftune.sweeping.grid import Settings

KL, WIN_RATE, TOKENS, ACCURACY = "samples.kl_per_response", "wins.0.win_rate", "samples.policy.tokens", "held_out.accuracy"

_BETTER = {  # 1: more is better, -1: less
    ACCURACY: 1,
    "held_out.length_matched": 1,
    "held_out.margin": 1,
    "held_out.loss": -1,
    "held_out.calibration_error": -1,
    "samples.kl_per_*": -1,
    "samples.policy.ended": 1,
    "samples.policy.repetition": -1,
    "samples.policy.distinct_*": 1,
    "samples.policy.unique": 1,
    "wins.*.win_rate": 1,
    "wins.*.length_controlled": 1,
    "perplexity.*.policy": -1,
    "perplexity.*.change": -1,
}
_IN_UNITS_OF_THE_LOSS = {"loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "held_out.loss", "held_out.margin"}


def figure(name: str, evaluation: Mapping[str, Any] | None, metrics: Mapping[str, Any]) -> Estimate | None:
    """The figure of one run; None where it was not measured. What has no interval has NaN for its ends."""
    if name in metrics:
        return _bare(float(metrics[name]))
    found: Any = evaluation
    for part in name.split("."):
        found = _part(found, part)
    if isinstance(found, Mapping) and set(found) >= {"value", "low", "high", "n"}:
        return None if found["value"] is None else estimate_of(found)
    if isinstance(found, int | float) and not isinstance(found, bool):
        return _bare(float(found))
    return None


def estimate_of(values: Mapping[str, Any]) -> Estimate:
    """An estimate from its JSON, where null stands for what is not finite."""
    value, low, high = (math.nan if values[part] is None else float(values[part]) for part in ("value", "low", "high"))
    return Estimate(value, low, high, int(values["n"]))


def _bare(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan, 0)


def _part(value: Any, part: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(part)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if part.isdigit():
            return value[int(part)] if int(part) < len(value) else None
        return next((v for v in value if isinstance(v, Mapping) and part in (v.get("name"), v.get("judge"))), None)
    return None


def check_metric(name: str, known: Sequence[str]) -> None:
    """Raises ConfigError for a name that nothing is measured under. known: metrics of training, all others are paths."""
    if name in known:
        return
    kind: Any = Evaluation
    parts = name.split(".")
    for at, part in enumerate(parts):
        if is_dataclass(kind):
            fields = get_type_hints(kind)
            if part not in fields:
                names = [".".join([*parts[:at], f]) for f in fields]
                raise ConfigError(f"metric: {name!r} is not measured; {nearest(name, [*names, *known, *_examples()])}")
            kind = _without_none(fields[part])
        elif get_origin(kind) in (dict, tuple):
            kind = next((a for a in reversed(get_args(kind)) if a is not Ellipsis), Any)
        elif kind is Estimate and part in Estimate._fields and at == len(parts) - 1:
            kind = float
        elif kind is not Any:
            raise ConfigError(f"metric: {name!r}: {'.'.join(parts[:at])} is one figure and has no parts")
    if kind not in (Estimate, float, int, Any):
        raise ConfigError(f"metric: {name!r} is no figure; {nearest(f'{name}.value', _examples())}")


def _examples() -> list[str]:
    return [name.replace("*", "0") for name in _BETTER if not name.endswith("*")] + [KL, "samples.kl_per_token"]


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        return next(a for a in get_args(kind) if a is not NoneType)
    return kind


def direction_of(name: str, given: str | None) -> int:
    """1 where more is better, -1 where less. `given`: "higher" or "lower". Raises ConfigError where neither says."""
    if given is not None:
        return 1 if given == "higher" else -1
    from preftune.training.metrics import BETTER

    bare = name.removesuffix(".value")
    for pattern, better in (*_BETTER.items(), *BETTER.items()):
        if fnmatchcase(bare, pattern):
            return better
    raise ConfigError(f"metric: whether more or less of {name} is better is for you to say: direction higher or lower")


def is_comparable(name: str, varied: Sequence[str]) -> bool:
    """Whether the figure is in the same units in all runs: a loss is not where settings of the loss differ."""
    return name.removesuffix(".value") not in _IN_UNITS_OF_THE_LOSS or not any(v.startswith("loss") for v in varied)


def half_width(e: Estimate) -> float:
    """Half the interval; NaN where there is none."""
    return (e.high - e.low) / 2


def within_noise(a: Estimate, b: Estimate) -> bool | None:
    """Whether the 95 % interval of the difference holds 0, as if the two were independent; None where one has no interval.

    Runs that are measured on the same prompts vary together, so that this errs towards "cannot be told apart".
    """
    width = math.hypot(half_width(a), half_width(b))
    return None if math.isnan(width) else abs(a.value - b.value) <= width


def without_seed(settings: Settings) -> Settings:
    """The settings but for the seed: runs that differ in it alone are repetitions of one."""
    return {name: value for name, value in settings.items() if name != "seed"}


def over_seeds(found: Sequence[Estimate | None]) -> Estimate | None:
    """One run's own figure; of several seeds their mean, with Student's interval over seeds."""
    values = [e for e in found if e is not None]
    if len(found) == 1 or not values:
        return values[0] if values else None
    return mean([[e.value] for e in values])
