"""Token-level DPO: DPO's margin, corrected by how far the policy has moved along each response."""

from __future__ import annotations

from typing import Annotated

from torch.nn.functional import logsigmoid

from preftune.losses.records import PairLoss, RefPairs, SequentialKL
from preftune.losses.terms import Beta, Rewards
from preftune.section import setting


def tdpo1(pairs: RefPairs, kl: SequentialKL, *, beta: Beta = 0.1) -> PairLoss:
    """Token-level DPO, TDPO₁ (Zeng et al., 2024, arXiv 2404.11999): −log σ(β(h_w + D_w) − β(h_l + D_l)).

    D is the sequential KL of a response, Σ_t KL(π_ref ‖ π) over its tokens; h is its log-ratio, nats.
    """
    reward = Rewards(beta * (pairs.chosen_log_ratio + kl.chosen_kl), beta * (pairs.rejected_log_ratio + kl.rejected_kl))
    return PairLoss(-logsigmoid(reward.margin), *reward)


def tdpo2(
    pairs: RefPairs,
    kl: SequentialKL,
    *,
    beta: Beta = 0.1,
    kl_weight: Annotated[float, setting("weight of the sequential KL (α)", ge=0)] = 0.5,
) -> PairLoss:
    """Token-level DPO, TDPO₂ (Zeng et al., 2024, arXiv 2404.11999): −log σ(β(h_w + α·sg(D_w)) − β(h_l + α·D_l)).

    D and h as in TDPO₁. The KL of the chosen response is taken as given (sg stops its gradient), so that nothing pays the
    policy for moving away from the reference there.
    """
    reward = Rewards(
        beta * (pairs.chosen_log_ratio + kl_weight * kl.chosen_kl.detach()),
        beta * (pairs.rejected_log_ratio + kl_weight * kl.rejected_kl),
    )
    return PairLoss(-logsigmoid(reward.margin), *reward)
