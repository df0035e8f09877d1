"""One optimizer step's forward and backward: the only place where the engine and the losses meet.

The type of the objective's first argument says what is computed: the record is built from the batch's log-probs, the objective
gives one value per unit, the values are summed and divided by the number of units in the *whole* step (all micro-batches, all
ranks). Nothing here knows an objective by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from preftune.data.types import Pair, Tree
from preftune.engine.batch import Batch
from preftune.engine.policy import response_sums
from preftune.errors import DataError
from preftune.losses.records import RefPairs, Tokens
from preftune.registry import LOSSES

Sums = dict[str, Float[Tensor, "2"]]
"""Per metric: the sum over what it is a mean of, and how many those are."""


class Objective(NamedTuple):
    """An objective with its parameters bound."""

    name: str
    function: Callable[..., Tensor]
    parameters: Mapping[str, Any]
    record: type[Tokens] | type[RefPairs]

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen reference has to be scored."""
        return self.record is RefPairs

    def __call__(self, record: Tokens | RefPairs) -> Float[Tensor, "unit"]:
        """One value per unit."""
        return self.function(record, **self.parameters)


def objective(name: str, parameters: Mapping[str, Any]) -> Objective:
    """The objective called `name`; its record is read from the annotation of its first argument."""
    function = LOSSES[name]
    first = next(iter(inspect.signature(function).parameters))
    return Objective(name, function, dict(parameters), get_type_hints(function)[first])


class Material(NamedTuple):
    """Trees in the form that an objective trains on, with what was left out and why."""

    trees: list[Tree]
    n_units: NDArray[np.int64]  # per tree: pairs, or scored tokens
    dropped: list[tuple[str, str]]  # id, reason
    notes: list[str]


def material(trees: Sequence[Tree], record: type[Tokens] | type[RefPairs], *, name: str) -> Material:
    """Only what the record needs: branches that no unit uses are not read. Raises DataError when nothing is left."""
    kept, units, dropped = [], [], []
    reshape = _for_pairs if record is RefPairs else _for_tokens
    for tree in trees:
        shaped = reshape(tree)
        if isinstance(shaped, str):
            dropped.append((tree.id, shaped))
            continue
        kept.append(shaped)
        units.append(len(shaped.pairs) if record is RefPairs else sum(int(b.scored.sum()) for b in shaped.branches))
    if not kept:
        reason = f"the first: {dropped[0][1]}" if dropped else "there are none"
        raise DataError(f"loss.name={name}: none of the {len(trees)} examples can be used; {reason}")
    notes = []
    if record is Tokens and any(t.pairs for t in trees):
        notes.append("the data are preferences: sft trains on the chosen responses alone (preferred fine-tuning)")
    return Material(kept, np.array(units, np.int64), dropped, notes)


def _for_pairs(tree: Tree) -> Tree | str:
    clear = [p for p in tree.pairs if p.confidence > 0.5]
    if not clear:
        if tree.pairs:
            return "a tie: neither response is preferred"
        return "it has no preference (no chosen and rejected response); demonstrations are for loss.name=sft"
    used = sorted({k for p in clear for k in p[:2]})
    new = {old: k for k, old in enumerate(used)}
    pairs = tuple(Pair(new[p.winner], new[p.loser], p.confidence, p.margin) for p in clear)
    return Tree(tree.id, tree.prompt, tuple(tree.branches[k] for k in used), pairs)


def _for_tokens(tree: Tree) -> Tree | str:
    losers = {p.loser for p in tree.pairs} | {p.winner for p in tree.pairs if p.confidence <= 0.5}
    bad = {k for k, label in enumerate(tree.labels) if label is False}
    good = [b for k, b in enumerate(tree.branches) if k not in losers | bad and b.scored.any()]
    return Tree(tree.id, tree.prompt, tuple(good)) if good else "every response of it is a rejected one"


def record_of(
    kind: type[Tokens] | type[RefPairs], batch: Batch, logps: Float[Tensor, "S"], ref_logps: Float[Tensor, "S"] | None
) -> Tokens | RefPairs:
    """What the objective asks for, from the log-probs of the batch's scored tokens."""
    if kind is Tokens:
        return Tokens(logps)
    assert ref_logps is not None
    winner, loser = batch.pairs.unbind(1)
    policy = response_sums(logps, batch.owner, batch.n_responses)
    reference = response_sums(ref_logps.to(logps.dtype), batch.owner, batch.n_responses)
    n_tokens = batch.n_scored.to(logps.dtype)
    return RefPairs(policy[winner], policy[loser], reference[winner], reference[loser], n_tokens[winner], n_tokens[loser])


class Micro(NamedTuple):
    """A micro-batch, its reference log-probs where the objective asks for them, its weight (0: it only keeps ranks in step)."""

    batch: Batch
    ref_logps: Float[Tensor, "S"] | None
    weight: float = 1.0


def backward(policy: nn.Module, micros: Iterable[Micro], objective: Objective, *, n_units: int, world: int = 1) -> Sums:
    """Accumulates the gradient of the step's mean loss and returns its metric sums, over this rank, still on the device.

    n_units: units of the whole step over all ranks. DistributedDataParallel averages over ranks: `world` undoes that.
    """
    sums: Sums = {}
    for micro, last in _one_ahead(micros):
        with nullcontext() if last or world == 1 else policy.no_sync():  # type: ignore[operator]
            logps = policy(micro.batch)
            record = record_of(objective.record, micro.batch, logps, micro.ref_logps)
            values = objective(record)
            (values.sum() * (micro.weight * world / n_units)).backward()
        measured = measure(objective, micro, record, logps.detach(), values.detach())
        add(sums, {name: value * micro.weight for name, value in measured.items()})
    return sums


def _one_ahead(micros: Iterable[Micro]) -> Iterator[tuple[Micro, bool]]:
    """Each micro-batch and whether it is the last. The next one is packed, and on its way, before this one is computed."""
    ahead = iter(micros)
    for micro in ahead:
        for following in ahead:
            yield micro, False
            micro = following
        yield micro, True


@torch.no_grad()
def evaluate(policy: nn.Module, micros: Iterable[Micro], objective: Objective) -> Sums:
    """Metric sums without gradients or dropout."""
    was_training = policy.training
    policy.eval()
    sums: Sums = {}
    for micro in micros:
        logps = policy(micro.batch)
        record = record_of(objective.record, micro.batch, logps, micro.ref_logps)
        add(sums, measure(objective, micro, record, logps, objective(record)))
    policy.train(was_training)
    return sums


def add(sums: Sums, more: Sums) -> None:
    """Adds `more` into `sums`."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


@torch.no_grad()
def measure(
    objective: Objective, micro: Micro, record: Tokens | RefPairs, logps: Float[Tensor, "S"], values: Float[Tensor, "unit"]
) -> Sums:
    """What is logged of one micro-batch, as sums and counts. Names are TRL's where it has one."""
    sums = {"loss": _sum(values)}
    if isinstance(record, RefPairs):
        beta = float(objective.parameters.get("beta", 1.0))
        sums |= _pair_metrics(record, beta)
        sums["kl"] = _kl(micro, logps)
    return sums


def metric_names(record: type[Tokens] | type[RefPairs]) -> list[str]:
    """Names of what `measure` gives for an objective of this record."""
    return ["loss"] if record is Tokens else ["loss", "kl", *_pair_metrics(RefPairs(*[torch.zeros(1)] * 6), 1.0)]


BETTER = {
    "loss": -1,
    "kl": -1,
    "rewards/accuracies": 1,
    "rewards/margins": 1,
    "rewards/chosen": 1,
    "rewards/rejected": -1,
    "logps/chosen": 1,
    "logps/rejected": -1,
}
"""Whether more (1) or less (-1) of a metric is better. The others describe a batch, and name no best step."""


def _pair_metrics(pairs: RefPairs, beta: float) -> Sums:
    pairs = RefPairs(*(x.detach() for x in pairs))
    margin = pairs.chosen_log_ratio - pairs.rejected_log_ratio
    # a tie is a margin that rounding explains: it counts one half, so that an untrained model scores 0.5
    noise = 4 * torch.finfo(margin.dtype).eps * sum(x.abs() for x in pairs[:4])
    right = (margin > 0).to(margin.dtype).masked_fill(margin.abs() <= noise, 0.5)
    return {
        "rewards/chosen": _sum(beta * pairs.chosen_log_ratio),
        "rewards/rejected": _sum(beta * pairs.rejected_log_ratio),
        "rewards/margins": _sum(beta * margin),
        "rewards/accuracies": _sum(right),
        "logps/chosen": _sum(pairs.chosen_logp_sum),
        "logps/rejected": _sum(pairs.rejected_logp_sum),
        "lengths/chosen": _sum(pairs.chosen_n_tokens),
        "lengths/rejected": _sum(pairs.rejected_n_tokens),
    }


def _kl(micro: Micro, logps: Float[Tensor, "S"]) -> Float[Tensor, "2"]:
    """KL(policy‖reference) per response in nats, estimated on responses that neither model need have written.

    The KL is the mean over tokens of the reference of ρ log ρ − ρ + 1, ρ = π/π_ref, which no sample survives once π has moved
    (ρ of e⁶ is common). Taken as drawn from the even mixture of the two models instead (importance weight 2/(1+ρ), the
    balance heuristic of Veach & Guibas 1995), each token counts 2(ρ log ρ − ρ + 1)/(1+ρ): never negative, equal to the KL to
    second order whoever wrote the token, and growing like log ρ and no faster. With σ the logistic function of log ρ that is
    2(σ (log ρ − 2) + 1).
    """
    assert micro.ref_logps is not None
    log_ratio = (logps - micro.ref_logps.to(logps.dtype)).double()
    total = (2 * (torch.sigmoid(log_ratio) * (log_ratio - 2) + 1)).sum().clamp(min=0.0)
    return torch.stack([total, total.new_full((), micro.batch.n_responses)])


def _sum(values: Tensor) -> Float[Tensor, "2"]:
    values = values.detach().double()  # metrics are the same to the last printed digit however a step is cut
    # new_full, unlike new_tensor, copies nothing from the host, which would wait for the device
    return torch.stack([values.sum(), values.new_full((), values.numel())])
