"""What several objectives are made of: the setting β, implicit rewards, and a logarithm that stays exact near 0."""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.losses.records import RefPairs
from preftune.section import setting

Beta = Annotated[float, setting("strength of the tie to the reference: larger stays closer to it", unit="reward per nat", gt=0)]


class Rewards(NamedTuple):
    """Implicit rewards of both sides of a pair."""

    chosen: Float[Tensor, "pair"]
    rejected: Float[Tensor, "pair"]

    @property
    def margin(self) -> Float[Tensor, "pair"]:
        """By how much the chosen response is rewarded more."""
        return self.chosen - self.rejected


def rewards(pairs: RefPairs, beta: float) -> Rewards:
    """β·log(π(y|x)/π_ref(y|x)) of both responses: DPO's reward (arXiv 2305.18290, equation 5) without log Z(x)."""
    return Rewards(beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio)


def mean_rewards(pairs: RefPairs, beta: float) -> Rewards:
    """The same with each log-ratio divided by the response's number of scored tokens."""
    return Rewards(beta * pairs.chosen_log_ratio_mean, beta * pairs.rejected_log_ratio_mean)


def log1mexp(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log(1 − eˣ) for x <= 0 (Mächler, 2012, "Accurately computing log(1 − exp(−|a|))"), with a finite gradient everywhere.

    At x = 0, where the logarithm has no value, it has that of the last number below 0, and no gradient. Each branch is given an
    argument that suits it wherever the other one counts: `where` alone lets an infinite gradient times 0 through as NaN.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    log_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    log1p_exp = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, log_expm1, log1p_exp)
