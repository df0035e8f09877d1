"""Objectives on responses that are good or bad by themselves: thumbs up and thumbs down, no pairs."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.records import Labels, Mismatched, ResponseLoss, WholeStep
from preftune.losses.terms import Beta
from preftune.section import setting

DesirableWeight = Annotated[float, setting("weight of a desirable response (λ_D)", gt=0)]
UndesirableWeight = Annotated[float, setting("weight of an undesirable response (λ_U)", gt=0)]


def kto(
    labels: Labels,
    other: WholeStep[Mismatched],
    *,
    beta: Beta = 0.1,
    desirable_weight: DesirableWeight = 1.0,
    undesirable_weight: UndesirableWeight = 1.0,
) -> ResponseLoss:
    """Kahneman-Tversky Optimization (Ethayarajh et al., 2024, arXiv 2402.01306), equation 7.

    λ_D·σ(β(z − h)) for a desirable response, λ_U·σ(β(h − z)) for an undesirable one, h its log-ratio. z, the reference point,
    is KL(π ‖ π_ref) estimated as the mean log-ratio of responses beside prompts that they do not belong to, over the whole
    step, not below 0, taken as given. For classes of unequal size the authors want λ_D·n_desirable / (λ_U·n_undesirable)
    between 1 and 4/3 (equation 8).
    """
    z = other.log_ratio.mean().clamp(min=0)
    towards = labels.log_ratio - z
    weight = _weights(labels, desirable_weight, undesirable_weight)
    return ResponseLoss(weight * torch.sigmoid(-beta * _signed(labels, towards)), beta * labels.log_ratio)


def bco(
    labels: Labels,
    step: WholeStep[Labels],
    *,
    beta: Beta = 0.1,
    desirable_weight: DesirableWeight = 1.0,
    undesirable_weight: UndesirableWeight = 1.0,
) -> ResponseLoss:
    """Binary Classifier Optimization (Jung et al., 2024, arXiv 2404.04656): −log σ(βh − δ) if desirable, else −log σ(δ − βh).

    δ is half the mean reward of the step's desirable responses plus half that of its undesirable ones, taken as given; a class
    that the step lacks counts as reward 0, that of the reference. The authors keep a moving average of δ; the step's own needs
    no memory. Their weights against a shift between the prompts of both classes (which take a prompt encoder) are left out.
    """
    reward = beta * labels.log_ratio
    of_step = beta * step.log_ratio
    delta = 0.5 * (_mean_of(of_step, step.desirable) + _mean_of(of_step, ~step.desirable))
    weight = _weights(labels, desirable_weight, undesirable_weight)
    return ResponseLoss(-weight * logsigmoid(_signed(labels, reward - delta)), reward)


def apo_zero_unpaired(
    labels: Labels,
    *,
    beta: Beta = 0.1,
    desirable_weight: DesirableWeight = 1.0,
    undesirable_weight: UndesirableWeight = 1.0,
) -> ResponseLoss:
    """Anchored Preference Optimization, zero, unpaired (after D'Oosterlinck et al., 2024, arXiv 2408.06266, equation 7).

    σ(−βh) for a desirable response, σ(βh) for an undesirable one: the two terms of `apo_zero`, each by itself; KTO with z = 0.
    """
    reward = beta * labels.log_ratio
    weight = _weights(labels, desirable_weight, undesirable_weight)
    return ResponseLoss(weight * torch.sigmoid(-_signed(labels, reward)), reward)


def _signed(labels: Labels, value: Float[Tensor, "response"]) -> Float[Tensor, "response"]:
    return torch.where(labels.desirable, value, -value)


def _weights(labels: Labels, desirable: float, undesirable: float) -> Float[Tensor, "response"]:
    """In the dtype of the log-probs, which `where` of two numbers is not."""
    return torch.where(labels.desirable, torch.full_like(labels.logp_sum, desirable), undesirable)


def _mean_of(values: Float[Tensor, "response"], chosen: Bool[Tensor, "response"]) -> Float[Tensor, ""]:
    """Mean where `chosen`; 0 where there is none."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)
