"""Objectives on replies that the policy wrote itself: PPO, RLOO and GRPO, and the loss of the critic beside PPO.

All compare the policy with itself as it was when it wrote: ρ = π/π_old is 1 at the first update, and what moves it further than
`clip` allows, in the direction in which the advantage pulls, gains nothing more.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.losses.records import ClippedLoss, Replies, Rollout, Values
from preftune.section import setting

_FAR = 20.0  # nats: a ratio of e²⁰ is clipped or hopeless, and one of e⁸⁹ would be infinite, its gradient times 0 NaN


def ppo(
    rollout: Rollout,
    *,
    clip: Annotated[float, setting("how far π/π_old of a token may go and still gain; 0: any far", unit="ratio", ge=0)] = 0.2,
) -> ClippedLoss:
    """PPO (Schulman et al., 2017, arXiv 1707.06347, equation 7): −min(ρA, clip(ρ, 1−ε, 1+ε)A), per token."""
    log_ratio = rollout.logp - rollout.old_logp
    return _clipped(log_ratio, rollout.advantage, clip)


def rloo(
    replies: Replies,
    *,
    clip: Annotated[float, setting("how far π/π_old of a reply may go and still gain; 0: any far", unit="ratio", ge=0)] = 0.2,
) -> ClippedLoss:
    """REINFORCE on whole replies (Ahmadian et al., 2024, arXiv 2402.14740, section 3): −ρA, ρ = π(y|x)/π_old(y|x) clipped.

    At ρ = 1 its gradient is −A ∇ log π(y|x), the paper's; the ratio and its clip are what makes a second update on the same
    replies right.
    """
    log_ratio = _sums(replies.logp - replies.old_logp, replies.n_tokens)
    return _clipped(log_ratio, replies.advantage, clip)


def grpo(
    replies: Replies,
    *,
    clip: Annotated[float, setting("how far π/π_old of a token may go and still gain; 0: any far", unit="ratio", ge=0)] = 0.2,
    beta: Annotated[
        float, setting("tie to the reference, in the loss (see docs/ppo.md); 0: none", unit="per nat", ge=0)
    ] = 0.04,
    lengths: Annotated[
        Literal["mean", "sum"], setting("tokens of a reply; the mean favours short good and long bad replies (2503.20783)")
    ] = "mean",
) -> ClippedLoss:
    """GRPO (Shao et al., 2024, arXiv 2402.03300, equation 3): PPO's surrogate + β·k3 per token, mean over each reply's tokens.

    k3 = π_ref/π − log(π_ref/π) − 1 (its equation 4). With `lengths=sum` a reply's tokens are added up (Liu et al., 2025, arXiv
    2503.20783, equation 3 of Dr. GRPO, but for its constant divisor).
    """
    log_ratio = replies.logp - replies.old_logp
    found = _clipped(log_ratio, replies.advantage.repeat_interleave(replies.n_tokens), clip)
    behind = (replies.ref_logp - replies.logp).clamp(max=_FAR)
    totals = _sums(found.loss + beta * (behind.exp() - behind - 1), replies.n_tokens)
    return found._replace(loss=totals / replies.n_tokens.clamp(min=1) if lengths == "mean" else totals)


def clipped_value(
    values: Values,
    *,
    clip: Annotated[float, setting("how far a value may go from the old one and still gain; 0: any far", ge=0)] = 0.2,
) -> Float[Tensor, "token"]:
    """The critic's loss, ½ max((V − R)², (clip(V, V_old ± ε) − R)²), of Schulman's implementation of PPO (openai/baselines)."""
    errors = (values.value - values.returns).square()
    if clip:
        near = values.old_value + (values.value - values.old_value).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - values.returns).square())
    return 0.5 * errors


def _clipped(log_ratio: Float[Tensor, "n"], advantage: Float[Tensor, "n"], clip: float) -> ClippedLoss:
    ratio = log_ratio.clamp(max=_FAR).exp()
    loss = -advantage * ratio
    if not clip:
        return ClippedLoss(loss, log_ratio, torch.zeros_like(loss, dtype=torch.bool))
    bounded = -advantage * ratio.clamp(1 - clip, 1 + clip)
    return ClippedLoss(torch.maximum(loss, bounded), log_ratio, bounded > loss)


def _sums(values: Float[Tensor, "token"], n_tokens: Int[Tensor, "response"]) -> Float[Tensor, "response"]:
    owner = torch.repeat_interleave(n_tokens)
    return values.new_zeros(len(n_tokens), dtype=torch.float64).index_add(0, owner, values.double())
