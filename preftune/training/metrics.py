"""What is logged of an objective: sums over micro-batches, and counts, so that their means do not depend on how a step is cut.

Rewards are those that the objective itself returns, so that accuracy and loss never disagree about who wins. Names are TRL's
where it has one. Of several objectives each has its `loss/NAME`, and the rewards are those of the first that has rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.losses.objective import Objective, Outcome, losses_of
from preftune.losses.records import ClippedLoss, Labels, PairLoss, Pairs, Ranked, RefPairs, ResponseLoss
from preftune.training.assemble import Scored

Sums = dict[str, Float[Tensor, "2"]]
"""Per metric: the sum over what it is a mean of, and how many those are."""

_NOISE = 1e-3  # reward: what rounding of log-probs can make of one, and less than a modifier adds to one on purpose
_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
_SIDES = ("logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected")
_RATIOS = ("log_ratios/chosen", "log_ratios/rejected")

BETTER = {
    "loss": -1,
    "kl": -1,
    "objective/kl": -1,
    "objective/scores": 1,
    "objective/rlhf_reward": 1,
    "rewards/accuracies": 1,
    "rewards/margins": 1,
    "rewards/chosen": 1,
    "rewards/rejected": -1,
    "logps/chosen": 1,
    "logps/rejected": -1,
}
"""Whether more (1) or less (-1) of a metric is better. The others describe a batch, and name no best step."""


def loss_names(goal: Sequence[Objective]) -> list[str]:
    """Names under which the means of the objectives are logged, each once."""
    if len(goal) == 1:
        return ["loss"]
    names = [o.name.rpartition(":")[2] for o in goal]
    return [f"loss/{n}" if names.count(n) == 1 else f"loss/{n}.{i}" for i, n in enumerate(names)]


def metric_names(goal: Sequence[Objective]) -> list[str]:
    """Names of all that is measured for these objectives."""
    rewards = next((o for o in goal if o.returns in (PairLoss, ResponseLoss)), None)
    names = ["loss", *loss_names(goal)]
    names += [n for n in BETTER if n.startswith("objective/") and any(o.needs_rollouts for o in goal)]
    names += ["kl"] * any(o.needs_reference for o in goal)
    if rewards is not None:
        names += [n for n in _REWARDS if rewards.record is not Labels or n != "rewards/accuracies"]
    if any(o.record in (Pairs, RefPairs, Labels) for o in goal):
        names += [*_SIDES, *(_RATIOS if any(o.needs_reference for o in goal) else ())]
    return list(dict.fromkeys(names))


def means(goal: Sequence[Objective], table: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Metrics from their sums and counts; of several objectives, "loss" is the weighted sum of their means."""
    metrics = {name: total / n for name, (total, n) in table.items() if n}
    if len(goal) > 1:
        parts = zip(goal, loss_names(goal), strict=True)
        metrics["loss"] = sum(o.weight * metrics.get(name, 0.0) for o, name in parts)
    if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():  # of labels there are no pairs to take margins of
        metrics.setdefault("rewards/margins", metrics["rewards/chosen"] - metrics["rewards/rejected"])
    return metrics


def add(sums: Sums, more: Sums, weight: float = 1.0) -> None:
    """Adds `more`, times `weight`, into `sums`."""
    for name, value in more.items():
        value = value * weight
        sums[name] = sums[name] + value if name in sums else value


@torch.no_grad()
def measure_losses(goal: Sequence[Objective], outcomes: Sequence[tuple[Outcome, Any] | None]) -> Sums:
    """Losses and rewards from (what an objective returned, the record of its units); None: measured elsewhere."""
    sums: Sums = {}
    for objective, name, found in zip(goal, loss_names(goal), outcomes, strict=True):
        if found is None:
            continue
        outcome, record = found
        sums[name] = total(losses_of(outcome))
        if isinstance(outcome, ClippedLoss):
            sums |= _ratios(outcome)
        elif not isinstance(outcome, Tensor) and objective is _with_rewards(goal):
            sums |= _pair_rewards(outcome, record) if isinstance(outcome, PairLoss) else _response_rewards(outcome, record)
    return sums


def _with_rewards(goal: Sequence[Objective]) -> Objective | None:
    return next((o for o in goal if o.returns in (PairLoss, ResponseLoss)), None)


def _ratios(outcome: ClippedLoss) -> Sums:
    """How far the policy is from where it wrote the replies: ½ log²(π/π_old) is the KL to second order."""
    log_ratio = outcome.log_ratio
    return {
        "policy/clipfrac_avg": total(outcome.clipped),
        "policy/approxkl_avg": total(0.5 * log_ratio.square()),
        "val/ratio": total(log_ratio.exp()),
    }


def _pair_rewards(outcome: PairLoss, record: Any) -> Sums:
    margin = outcome.chosen_reward - outcome.rejected_reward
    right = (margin > 0).to(margin.dtype).masked_fill(margin == 0, 0.5)
    if isinstance(record, RefPairs):
        # a policy that rounding alone sets apart from its reference prefers nothing: it counts one half
        eps = 4 * torch.finfo(torch.float32).eps  # of a token's log-prob, whatever it is summed in
        still = [
            (logp - ref).abs() <= eps * (logp.abs() + ref.abs()) for logp, ref in zip(record[:2], record[2:4], strict=True)
        ]
        right = right.masked_fill(still[0] & still[1] & (margin.abs() < _NOISE), 0.5)
    return {
        "rewards/chosen": total(outcome.chosen_reward),
        "rewards/rejected": total(outcome.rejected_reward),
        "rewards/margins": total(margin),
        "rewards/accuracies": total(right),
    }


def _response_rewards(outcome: ResponseLoss, record: Any) -> Sums:
    reward = outcome.reward
    if isinstance(record, Labels):
        return _by_label("rewards", reward, record.desirable)
    assert isinstance(record, Ranked)
    last = record.list_size.cumsum(0) - 1
    best = last - record.list_size + 1
    neighbours = torch.ones_like(reward).index_fill(0, last, 0.0)[:-1]  # 1 where the next response is of the same list
    margin = reward[:-1] - reward[1:]
    right = (margin > 0).to(margin.dtype).masked_fill(margin == 0, 0.5) * neighbours
    return {
        "rewards/chosen": total(reward[best]),
        "rewards/rejected": total(reward[last]),
        "rewards/margins": total(reward[best] - reward[last]),
        "rewards/accuracies": torch.stack([right.double().sum(), neighbours.double().sum()]),
    }


def _by_label(name: str, values: Float[Tensor, "N"], desirable: Tensor) -> Sums:
    masks = {"chosen": desirable, "rejected": ~desirable}
    return {
        f"{name}/{side}": torch.stack([values.double().masked_fill(~mask, 0.0).sum(), mask.double().sum()])
        for side, mask in masks.items()
    }


@torch.no_grad()
def measure_batch(goal: Sequence[Objective], scored: Scored) -> Sums:
    """What is logged of a micro-batch whatever the objective: log-probs and lengths by side, and how far the reference is."""
    sums: Sums = {}
    records = {o.record for o in goal}
    against = any(o.needs_reference for o in goal)
    sided = records & {Pairs, RefPairs, Labels}
    values = {"logps": scored.logp_sum, "lengths": scored.n_tokens} if sided else {}  # a reward model has no log-probs
    values |= {"log_ratios": scored.logp_sum - scored.ref_logp_sum} if sided and against else {}
    for name, one in values.items():
        if records & {Pairs, RefPairs}:
            sums |= {f"{name}/{side}": total(v) for side, v in zip(("chosen", "rejected"), scored.of_pairs(one), strict=True)}
        elif Labels in records:
            sums |= _by_label(name, one[scored.units.labelled], scored.units.desirable)
    if against:
        sums["kl"] = _kl(scored)
    return sums


def _kl(scored: Scored) -> Float[Tensor, "2"]:
    """KL(policy‖reference) per response in nats, estimated on responses that neither model need have written.

    The KL is the mean over tokens of the reference of ρ log ρ − ρ + 1, ρ = π/π_ref, which no sample survives once π has moved
    (ρ of e⁶ is common). Taken as drawn from the even mixture of the two models instead (importance weight 2/(1+ρ), the
    balance heuristic of Veach & Guibas 1995), each token counts 2(ρ log ρ − ρ + 1)/(1+ρ): never negative, equal to the KL to
    second order whoever wrote the token, and growing like log ρ and no faster. With σ the logistic function of log ρ that is
    2(σ (log ρ − 2) + 1).
    """
    log_ratio = (scored.logps - scored.ref_logps).double()
    found = (2 * (torch.sigmoid(log_ratio) * (log_ratio - 2) + 1)).sum().clamp(min=0.0)
    return torch.stack([found, found.new_full((), scored.batch.n_responses)])


def total(values: Tensor) -> Float[Tensor, "2"]:
    """The sum of some values and their number."""
    values = values.detach().double()  # metrics are the same to the last printed digit however a step is cut
    # new_full, unlike new_tensor, copies nothing from the host, which would wait for the device
    return torch.stack([values.sum(), values.new_full((), values.numel())])
