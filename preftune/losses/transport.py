"""Alignment via Optimal Transport: distributions over the whole step are compared, not the two responses of one pair."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.records import PairLoss, RefPairs, WholeStep
from preftune.losses.terms import Beta, rewards


def aot(pairs: WholeStep[RefPairs], *, beta: Beta = 0.1) -> PairLoss:
    """Alignment via Optimal Transport (Melnyk et al., 2024, arXiv 2406.05882), section 3, paired.

    With u = log π(y_w|x) − log π(y_l|x) and u_ref the same of the reference, both sorted over the step, each pair has
    −log σ(β(u − the u_ref of the same rank)): the policy's margins as a distribution should exceed the reference's.
    """
    margin = pairs.chosen_logp_sum - pairs.rejected_logp_sum
    ref_margin = pairs.ref_chosen_logp_sum - pairs.ref_rejected_logp_sum
    matched = ref_margin.sort().values[_rank(margin)]
    return PairLoss(-logsigmoid(beta * (margin - matched)), *rewards(pairs, beta))


def aot_unpaired(pairs: WholeStep[RefPairs], *, beta: Beta = 0.1) -> PairLoss:
    """Alignment via Optimal Transport (Melnyk et al., 2024, arXiv 2406.05882), section 3, unpaired.

    The log-ratios of the chosen and of the rejected responses, each sorted over the step, are compared rank by rank:
    −log σ(β(h_w − the h_l of the same rank)). Who was compared with whom in the data plays no part.
    """
    reward = rewards(pairs, beta)
    matched = reward.rejected.sort().values[_rank(reward.chosen)]
    return PairLoss(-logsigmoid(reward.chosen - matched), *reward)


def _rank(values: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
    """How many come before each in ascending order; equals in the order in which they stand."""
    return torch.argsort(torch.argsort(values.detach(), stable=True))
