"""One optimizer step's forward and backward: the only place where the engine and the losses meet.

The types of an objective's arguments say what is computed: records are built from the batch's log-probs, the objective gives
one loss per unit, and their sum is divided by the number of units in the *whole* step (all micro-batches, all ranks). Of
several objectives each has its own units and its own number of them. Nothing here knows an objective by name.

Where an objective asks for records of the whole step, they are collected first, by a pass without gradients over all
micro-batches and ranks. An objective *over* the step is then evaluated once, on every rank, which gives d loss / d log-prob;
each micro-batch is read again, and its backward pass starts from these. That is the exact gradient, however the step is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preftune.engine.batch import Batch
from preftune.engine.distribution import Predictions, kl, log_collision
from preftune.engine.inplace import gradients_in_place
from preftune.losses.objective import Objective, Outcome, Records, losses_of
from preftune.losses.records import Mismatched, OnPolicy, SequentialKL
from preftune.training.assemble import Known, Scored, Whole, build
from preftune.training.dist import ONE, Ranks
from preftune.training.metrics import Sums, add, measure_batch, measure_losses

Item = TypeVar("Item")
Kept = TypeVar("Kept")
Goal = Sequence[Objective]
"""The weighted sum of objectives that is minimised."""


class Micro(NamedTuple):
    """A micro-batch, its reference log-probs where an objective asks for them, its weight (0: it only keeps ranks in step)."""

    batch: Batch
    ref_logps: Float[Tensor, "S"] | None
    weight: float = 1.0
    mismatched: tuple[Batch, Float[Tensor, "M"]] | None = None  # its prompts with responses to others, and the reference there
    reference: Predictions | None = None  # the reference's distributions, where an objective asks for them
    known: Known | None = None  # of replies that the policy wrote


def backward(policy: nn.Module, micros: Iterable[Micro], goal: Goal, *, n_units: Sequence[int], ranks: Ranks = ONE) -> Sums:
    """Accumulates the gradient of the step's loss and returns its metric sums, over this rank, still on the device.

    n_units: per objective, units of the whole step over all ranks.
    """
    sums: Sums = {}
    step = _Step(goal, n_units)
    if step.asked:
        micros = list(micros)
        step.collect(policy, micros, ranks)
    for (i, micro), last in _one_ahead(enumerate(micros)):
        with nullcontext() if last or ranks.world == 1 else policy.no_sync():  # type: ignore[operator]
            step.draw_again(i)
            scored = _scored(policy, micro, step.read)
            loss, outcomes = step.loss(build(step.read, scored), i)
            # DistributedDataParallel averages over ranks: the factor undoes that
            with gradients_in_place(ranks.world == 1):
                (loss * (micro.weight * ranks.world)).backward()
        scored = Scored(micro.batch, scored.logps.detach(), micro.ref_logps, known=micro.known)
        add(sums, measure_losses(goal, outcomes) | measure_batch(goal, scored), micro.weight)
    return sums


@dataclass(frozen=True)
class Judged(Generic[Kept]):
    """What the objectives say of a micro-batch, and what was kept of its log-probs."""

    weight: float  # 0: it only keeps ranks in step
    kept: Kept
    outcomes: list[tuple[Outcome, Any]]  # of each objective what it gave, and the record of its units


@torch.no_grad()
def judged(
    policy: nn.Module,
    micros: Iterable[Micro],
    goal: Goal,
    keep: Callable[[Scored], Kept],
    *,
    ranks: Ranks = ONE,
    as_reference: bool = False,
) -> list[Judged[Kept]]:
    """Of each micro-batch what the objectives say, without gradients or dropout.

    All of them are read first, since an objective may ask for records of the whole step.

    keep: of a micro-batch's log-probs what is held until then. What an objective asks of a step is taken over all of `micros`
    and ranks.
    as_reference: as if the policy were its own reference, which is what it must be before the first update.
    """
    was_training = policy.training
    policy.eval()
    step = _Step(goal, [1] * len(goal))
    parts, weights, kept = [], [], []
    for micro in micros:
        scored = _scored(policy, micro, step.read | step.asked, as_reference)
        kept.append(keep(scored))
        parts.append(_part(policy, micro, step.read | step.asked, scored, as_reference))
        weights.append(micro.weight)
    if step.asked:
        step.join(parts, weights, ranks)
    policy.train(was_training)
    told = zip(parts, weights, kept, strict=True)
    return [Judged(weight, one, step.loss(part, i)[1]) for i, (part, weight, one) in enumerate(told)]


def evaluate(policy: nn.Module, micros: Iterable[Micro], goal: Goal, *, ranks: Ranks = ONE, as_reference: bool = False) -> Sums:
    """Metric sums of micro-batches, as `judged` gives them."""
    sums: Sums = {}

    def keep(scored: Scored) -> Sums:
        return measure_batch(goal, scored)

    for one in judged(policy, micros, goal, keep, ranks=ranks, as_reference=as_reference):
        add(sums, one.kept | measure_losses(goal, one.outcomes), one.weight)
    return sums


class _Step:
    """What the micro-batches of a step share: the records of the whole step, and what objectives over it say of each part."""

    def __init__(self, goal: Goal, n_units: Sequence[int]) -> None:
        self.goal, self.n_units = goal, n_units
        self.read: frozenset[type] = frozenset().union(*(o.units for o in goal))  # records asked for of each micro-batch
        self.asked: frozenset[type] = frozenset().union(*(o.given | (o.units if o.over_step else set()) for o in goal))
        self._whole: Whole | None = None
        self._alone = False
        self._over: dict[int, _Over] = {}
        self._draws: list[_Random] = []

    @torch.no_grad()
    def collect(self, policy: nn.Module, micros: Sequence[Micro], ranks: Ranks) -> None:
        """Reads all micro-batches for what is asked of the whole step; one by itself is that step, and is read once."""
        self._alone = len(micros) == 1 and ranks.world == 1
        asked = self.asked & {Mismatched} if self._alone else self.asked
        parts = []
        for micro in micros:
            if not self._alone:
                self._draws.append(_Random.now(micro.batch.tokens.device))
            scored = _scored(policy, micro, asked) if asked - {Mismatched} else None
            parts.append(_part(policy, micro, asked, scored))
        self.join(parts, [m.weight for m in micros], ranks)

    def join(self, parts: Sequence[Records], weights: Sequence[float], ranks: Ranks) -> None:
        """Makes one of the parts of all ranks; those of weight 0 are no part of the step."""
        real = [
            p if w else {r: r(*(f[:0] for f in fields)) for r, fields in p.items()} for p, w in zip(parts, weights, strict=True)
        ]
        self._whole = Whole(real, ranks)
        if not self._alone:
            self._over = {
                k: self._over_step(o, n) for k, (o, n) in enumerate(zip(self.goal, self.n_units, strict=True)) if o.over_step
            }

    def _over_step(self, objective: Objective, n_units: int) -> _Over:
        assert self._whole is not None
        with torch.enable_grad():
            leaves = {r: _leaves(self._whole.records[r]) for r in objective.units}
            outcome = objective(leaves, self._whole.records)
            learns = [(r, i, f) for r, fields in leaves.items() for i, f in enumerate(fields) if f.requires_grad]
            loss = losses_of(outcome).sum() * (objective.weight / max(n_units, 1))
            grads = torch.autograd.grad(loss, [f for _, _, f in learns], allow_unused=True)
        slopes = {(r, i): g for (r, i, _), g in zip(learns, grads, strict=True) if g is not None}
        return _Over(outcome, slopes)

    def loss(self, found: Records, i: int) -> tuple[Tensor, list[tuple[Outcome, Any]]]:
        """The share of micro-batch `i` in the step's loss, and of every objective what it gave for these units."""
        shares: list[Tensor] = []
        outcomes: list[tuple[Outcome, Any]] = []
        step = {} if self._whole is None else self._whole.records
        if self._alone:
            step = {r: r(*(f.detach() for f in found[r])) for r in self.asked - {Mismatched}} | step
        for k, (objective, n) in enumerate(zip(self.goal, self.n_units, strict=True)):
            if k in self._over:
                assert self._whole is not None
                share, outcome, record = self._over[k].share(self._whole, objective.record, found, i)
            else:
                outcome, record = objective(found, step), found[objective.record]
                share = losses_of(outcome).sum() * (objective.weight / max(n, 1))
            shares.append(share)
            outcomes.append((outcome, record))
        return torch.stack([share.double() for share in shares]).sum(), outcomes

    def draw_again(self, i: int) -> None:
        """Dropout of micro-batch `i` as it was when it was read for the whole step."""
        if self._draws:
            self._draws[i].again()


class _Over(NamedTuple):
    """An objective over the whole step, evaluated once: what it gave, and d loss / d record."""

    outcome: Outcome
    slopes: dict[tuple[type, int], Tensor]

    def share(self, whole: Whole, record: type, found: Records, i: int) -> tuple[Tensor, Outcome, Any]:
        """A scalar whose gradient is that of the step's loss for micro-batch `i`, and its part of outcome and record."""
        parts = [(found[r][f], slope[whole.span(r, i, f)]) for (r, f), slope in self.slopes.items()]
        total = torch.stack([(field[: len(slope)] * slope).double().sum() for field, slope in parts]).sum()
        at = whole.span(record, i)
        outcome = self.outcome[at] if isinstance(self.outcome, Tensor) else type(self.outcome)(*(f[at] for f in self.outcome))
        return total, outcome, record(*(f[whole.span(record, i, n)] for n, f in enumerate(whole.records[record])))


class _Random(NamedTuple):
    """A state of the generators that dropout draws from."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _Random:
        return cls(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def again(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def _leaves(record: Any) -> Any:
    return type(record)(*(f.detach().requires_grad_() if f.is_floating_point() else f for f in record))


def _scored(policy: nn.Module, micro: Micro, asked: Collection[type], as_reference: bool = False) -> Scored:
    """The log-probs of a micro-batch, and what else is asked for of its distributions."""
    beside: dict[type, Callable[[Predictions], Tensor]] = {}
    if OnPolicy in asked:
        beside[OnPolicy] = log_collision
    if SequentialKL in asked:
        frozen = None if as_reference else micro.reference
        assert as_reference or frozen is not None, "the reference has to be held beside the policy"
        beside[SequentialKL] = lambda own: kl(frozen or own.detach(), own)
    if not beside:
        logps = policy(micro.batch)
        return Scored(micro.batch, logps, logps if as_reference else micro.ref_logps, known=micro.known)
    logps, *others = policy(micro.batch, beside=tuple(beside.values()))
    return Scored(micro.batch, logps, logps if as_reference else micro.ref_logps, dict(zip(beside, others, strict=True)))


def _part(
    policy: nn.Module, micro: Micro, asked: Collection[type], scored: Scored | None, as_reference: bool = False
) -> Records:
    """The records of a micro-batch that are asked for."""
    own = build([r for r in asked if r is not Mismatched], scored) if scored else {}
    if Mismatched not in asked:
        return own
    assert micro.mismatched is not None
    batch, ref_logps = micro.mismatched
    logps = policy(batch)
    return {**own, **build([Mismatched], Scored(batch, logps, logps if as_reference else ref_logps))}


def _one_ahead(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Each item and whether it is the last. The next one is made (packed, and on its way) before this one is computed."""
    ahead = iter(items)
    for item in ahead:
        for following in ahead:
            yield item, False
            item = following
        yield item, True
