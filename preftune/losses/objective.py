"""An objective with its parameters bound, read from its function: which records it takes, which modifiers are on.

    >>> goal = (objective("dpo", {"beta": 0.2, "ld_alpha": 0.5}), objective("sft", {}, weight=0.1))
    >>> [sorted(r.__name__ for r in one.units) for one in goal]
    [['Prefixes', 'RefPairs'], ['Tokens']]

Nothing here computes a log-prob: `training.step` builds the records and calls the objective with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args, get_type_hints

from jaxtyping import Float
from torch import Tensor

from preftune.config import Config
from preftune.loss_settings import modifiers, parameters
from preftune.losses import records
from preftune.losses.records import WHOLE_STEP, ClippedLoss, PairLoss, ResponseLoss
from preftune.registry import LOSSES

Outcome = PairLoss | ResponseLoss | ClippedLoss | Tensor
"""What an objective returns: its loss per unit, with the rewards or ratios where it has them."""

Records = Mapping[type, Any]
"""Records by their type."""

REFERENCE = (
    records.RefPairs,
    records.Labels,
    records.Ranked,
    records.Prefixes,
    records.SequentialKL,
    records.Mismatched,
    records.Rollout,
    records.Replies,
)
"""Records that are made of log-probs of the frozen reference, or of rewards less a KL to it."""

ROLLOUTS = (records.Rollout, records.Replies)
"""Records of what the policy writes while it trains."""


class Argument(NamedTuple):
    """A positional argument of an objective: the record that it asks for."""

    record: type
    whole_step: bool


class Modifier(NamedTuple):
    """What stands between the record and the objective, with its parameters bound."""

    function: Callable[..., Any]
    parameters: Mapping[str, Any]
    beside: tuple[type, ...]  # the records that it asks for besides the units


class Objective(NamedTuple):
    """A function with its parameters and modifiers bound. `weight` is its factor in a sum of objectives."""

    name: str
    weight: float
    function: Callable[..., Outcome]
    parameters: Mapping[str, Any]
    arguments: tuple[Argument, ...]
    modifiers: tuple[Modifier, ...]
    returns: Any

    @property
    def record(self) -> type:
        """The record of its units."""
        return self.arguments[0].record

    @property
    def over_step(self) -> bool:
        """Whether a unit's loss depends on the other units of the step, with gradient."""
        return self.arguments[0].whole_step

    @property
    def units(self) -> frozenset[type]:
        """Records asked for of the units: of a micro-batch, or of the whole step if it is `over_step`."""
        own = {a.record for a in self.arguments[1:] if not a.whole_step}
        return frozenset(own | {self.record}.union(*(m.beside for m in self.modifiers)))

    @property
    def given(self) -> frozenset[type]:
        """Records of the whole step that are taken as given, without gradient."""
        asked = {a.record for a in self.arguments[1:] if a.whole_step}
        return frozenset(asked.union(*(m.beside for m in self.modifiers)) if self.record in asked else asked)

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen reference has to be scored."""
        return any(r in REFERENCE for r in self.units | self.given)

    @property
    def needs_rollouts(self) -> bool:
        """Whether it learns from what the policy writes, rather than from responses of the data."""
        return any(r in ROLLOUTS for r in self.units)

    def __call__(self, units: Records, step: Records) -> Outcome:
        """One loss per unit, with rewards where it has them.

        units: the records of `self.units`;  step: those of `self.given`.
        """
        first, *others = self.arguments
        own = self._modified(units)
        taken = [self._modified(step)[a.record] if a.whole_step else own[a.record] for a in others]
        outcome = self.function(own[first.record], *taken, **self.parameters)
        for modifier in self.modifiers:
            if not _replaces(modifier.function):
                outcome = _weighed(
                    outcome, modifier.function(*(own[r] for r in (self.record, *modifier.beside)), **modifier.parameters)
                )
        return outcome

    def _modified(self, found: Records) -> Records:
        """`found` with the record of the units as the modifiers make it, where it is there."""
        if self.record not in found:
            return found
        record = found[self.record]
        for modifier in self.modifiers:
            if _replaces(modifier.function):
                record = modifier.function(record, *(found[r] for r in modifier.beside), **modifier.parameters)
        return {**found, self.record: record}


def _replaces(modifier: Callable[..., Any]) -> bool:
    hints = get_type_hints(modifier)
    return hints["return"] is next(iter(hints.values()))


def _weighed(outcome: Outcome, weights: Float[Tensor, "unit"]) -> Outcome:
    return outcome * weights if isinstance(outcome, Tensor) else outcome._replace(loss=outcome.loss * weights)


def losses_of(outcome: Outcome) -> Float[Tensor, "unit"]:
    """The loss of every unit."""
    return outcome if isinstance(outcome, Tensor) else outcome.loss


def objective(name: str, given: Mapping[str, Any], *, weight: float = 1.0) -> Objective:
    """The objective called `name`. Of `given` its own parameters go to it, the others to modifiers, which they turn on."""
    return bound(name, LOSSES[name], given, weight=weight)


def bound(name: str, function: Callable[..., Outcome], given: Mapping[str, Any], *, weight: float = 1.0) -> Objective:
    """`function` as an objective, registered or not, with its parameters out of `given`."""
    own = {p: given.get(p, default) for p, default in parameters(function).items()}
    on = []
    for modifier in modifiers(function).values():
        usual = parameters(modifier)
        bound = {p: given.get(p, default) for p, default in usual.items()}
        if bound != usual:
            on.append(Modifier(modifier, bound, tuple(a.record for a in _arguments(modifier)[1:])))
    return Objective(name, weight, function, own, _arguments(function), tuple(on), get_type_hints(function)["return"])


def goal_of(config: Config) -> tuple[Objective, ...]:
    """The objectives that `config` asks for, with their weights."""
    sections = [section.model_dump() for section in config.losses]
    return tuple(objective(s.pop("name"), s, weight=s.pop("weight", 1.0)) for s in sections)


def _arguments(function: Callable[..., Any]) -> tuple[Argument, ...]:
    hints = get_type_hints(function, include_extras=True)
    del hints["return"]
    taken = [hint for name, hint in hints.items() if name not in parameters(function)]
    return tuple(Argument(get_args(h)[0], True) if WHOLE_STEP in get_args(h)[1:] else Argument(h, False) for h in taken)
