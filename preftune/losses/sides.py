"""Objectives that say of each side by itself where its probability should go; the difference alone decides nothing here.

h_w and h_l are the log-ratios log(π(y|x)/π_ref(y|x)) of the chosen and the rejected response in nats.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch.nn.functional import logsigmoid

from preftune.losses.records import Confidence, PairLoss, RefPairs, WholeStep
from preftune.losses.terms import Beta, rewards
from preftune.section import setting


def nca(pairs: RefPairs, *, beta: Beta = 0.01) -> PairLoss:
    """Noise contrastive alignment of a pair (Chen et al., 2024, arXiv 2402.05369), section 4.1.

    −log σ(βh_w) − ½·log σ(−βh_w) − ½·log σ(−βh_l): each response is told from noise, not from its rival.
    """
    chosen, rejected = reward = rewards(pairs, beta)
    return PairLoss(-logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected), *reward)


def sppo(pairs: RefPairs, sure: Confidence, *, beta: Beta = 0.1) -> PairLoss:
    """Self-Play Preference Optimization (Wu et al., 2024, arXiv 2405.00675), equation 4.7, for a pair.

    (h_w − (p − ½)/β)² + (h_l + (p − ½)/β)², their η is 1/β. p is the data's confidence that the chosen response is better: 1
    where they do not say, which is the hard version. The authors take η = 1000, which asks for log-ratios of ±500 nats:
    a constant pull, to be ended early.
    """
    target = (sure.confidence - 0.5) / beta
    loss = (pairs.chosen_log_ratio - target).square() + (pairs.rejected_log_ratio + target).square()
    return PairLoss(loss, *rewards(pairs, beta))


def apo_zero(pairs: RefPairs, *, beta: Beta = 0.1) -> PairLoss:
    """Anchored Preference Optimization, zero (D'Oosterlinck et al., 2024, arXiv 2408.06266), equation 7: σ(−βh_w) + σ(βh_l).

    The chosen gains probability and the rejected loses it: for chosen responses better than what the model writes itself.
    """
    reward = rewards(pairs, beta)
    return PairLoss(torch.sigmoid(-reward.chosen) + torch.sigmoid(reward.rejected), *reward)


def apo_down(pairs: RefPairs, *, beta: Beta = 0.1) -> PairLoss:
    """Anchored Preference Optimization, down (D'Oosterlinck et al., 2024, arXiv 2408.06266), equation 8: σ(βh_w) + σ(−βh).

    h = h_w − h_l. Both lose probability, the rejected more: for chosen responses worse than what the model writes itself.
    """
    reward = rewards(pairs, beta)
    return PairLoss(torch.sigmoid(reward.chosen) + torch.sigmoid(-reward.margin), *reward)


def bco_pair(
    pairs: RefPairs,
    step: WholeStep[RefPairs],
    *,
    beta: Beta = 0.1,
    shift: Annotated[bool, setting("compare rewards with the mean reward of the step (δ), not with 0")] = True,
) -> PairLoss:
    """Binary Classifier Optimization on pairs (Jung et al., 2024, arXiv 2404.04656): −log σ(βh_w − δ) − log σ(δ − βh_l).

    δ is the mean reward of all responses of the step, taken as given. The authors estimate it by a moving average over earlier
    batches; the mean over the step needs no memory, so that a step depends on its own pairs alone.
    """
    reward = rewards(pairs, beta)
    delta = torch.cat(rewards(step, beta)).mean() if shift else 0.0
    return PairLoss(-logsigmoid(reward.chosen - delta) - logsigmoid(delta - reward.rejected), *reward)
