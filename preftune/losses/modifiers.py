"""What composes with every objective on `RefPairs`: other divergences (f-DPO), less weight on length (LD-DPO, R-DPO), WPO.

A modifier that returns `RefPairs` puts other log-ratios in the place of those that the objective sees; one that returns a
tensor multiplies the losses of the pairs.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from preftune.losses.records import OnPolicy, Prefixes, RefPairs
from preftune.section import setting

Divergence = Literal["reverse_kl", "forward_kl", "js"] | Annotated[float, Field(gt=0, lt=1)]


def ld(
    pairs: RefPairs,
    prefixes: Prefixes,
    *,
    ld_alpha: Annotated[
        float, setting("weight of the tokens by which one response is longer than the other", unit="fraction", ge=0, le=1)
    ] = 1.0,
) -> RefPairs:
    """LD-DPO (Liu et al., 2024, arXiv 2409.06411): the tokens beyond the shorter response's length count α of the others.

    log π̂(y|x) = log π(first min(|y_w|, |y_l|) tokens) + α·log π(the rest), of policy and reference alike. α = 1 is no change.
    """
    sums = (start + ld_alpha * (whole - start) for whole, start in zip(pairs[:4], prefixes, strict=True))
    return pairs._replace(**dict(zip(Prefixes._fields, sums, strict=True)))


def f_divergence(
    pairs: RefPairs,
    *,
    divergence: Annotated[
        Divergence, setting("what ties to the reference; a number between 0 and 1 is the α of an α-divergence")
    ] = "reverse_kl",
) -> RefPairs:
    """f-DPO (Wang et al., 2023, arXiv 2309.16240), table 1: f'(π/π_ref) in the place of log(π/π_ref), up to a constant.

    With u = π/π_ref: reverse KL log u, forward KL 1 − 1/u, Jensen–Shannon log(2u/(1+u)), α-divergence (1 − u^−α)/α, which is
    the reverse KL as α falls to 0 and the forward KL as it rises to 1. What is returned has the policy's log-prob such that its
    log-ratio is that value. The derivation holds for objectives of the *difference* of both sides, where the prompt's constant
    cancels (`dpo`, `hinge`, `ipo`, `exo`, `robust`, …), and is an analogy for others.
    """
    if divergence == "reverse_kl":
        return pairs
    chosen, rejected = (_f_prime(h, divergence) for h in (pairs.chosen_log_ratio, pairs.rejected_log_ratio))
    return pairs._replace(
        chosen_logp_sum=pairs.ref_chosen_logp_sum + chosen, rejected_logp_sum=pairs.ref_rejected_logp_sum + rejected
    )


def length_margin(
    pairs: RefPairs,
    *,
    length_margin: Annotated[
        float, setting("how much less a preference for a longer response counts, per token (α/β)", unit="nats per token", ge=0)
    ] = 0.0,
) -> RefPairs:
    """R-DPO (Park et al., 2024, arXiv 2403.19159): −log σ(βh + α|y_w| − α|y_l|), the optimum of a reward that pays −α a token.

    α is β times this setting: both log-ratios grow by it per token, so the reward is β·log-ratio + α|y| in every objective.
    """
    return pairs._replace(
        chosen_logp_sum=pairs.chosen_logp_sum + length_margin * pairs.chosen_n_tokens,
        rejected_logp_sum=pairs.rejected_logp_sum + length_margin * pairs.rejected_n_tokens,
    )


def wpo(
    pairs: RefPairs,
    on_policy: OnPolicy,
    *,
    wpo: Annotated[bool, setting("weigh pairs by how likely the policy itself is to write them")] = False,
) -> Float[Tensor, "pair"]:
    """Weighted Preference Optimization (Zhou et al., 2024, arXiv 2406.11827), equation 2, with its "sampled alignment".

    w(y_w)·w(y_l), log w(y) the mean over tokens of log π(y_t) − log Σ_v π(v)²: about 0 for text that the policy samples.
    """
    if not wpo:
        return torch.ones_like(on_policy.chosen_logp_mean)
    return torch.exp(on_policy.chosen_logp_mean + on_policy.rejected_logp_mean)


def _f_prime(log_ratio: Float[Tensor, "pair"], divergence: Divergence) -> Float[Tensor, "pair"]:
    if divergence == "js":
        return math.log(2) + logsigmoid(log_ratio)
    alpha = 1.0 if divergence == "forward_kl" else float(divergence)
    return _one_minus_exp(-alpha * log_ratio) / alpha


def _one_minus_exp(x: Float[Tensor, "pair"]) -> Float[Tensor, "pair"]:
    """1 − eˣ, straight on from where eˣ is the cube root of the largest number, so that gradients can still be squared."""
    cap = math.log(torch.finfo(x.dtype).max) / 3
    return -torch.expm1(x.clamp(max=cap)) - math.exp(cap) * relu(x - cap)
