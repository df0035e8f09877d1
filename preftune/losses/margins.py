"""Other functions of DPO's reward margin: squared (IPO), hinge (SLiC), reverse KL (EXO), and a discovered one (DiscoPOP).

h_w and h_l are the log-ratios log(π(y|x)/π_ref(y|x)) of the chosen and the rejected response in nats, and h = h_w − h_l.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch.nn.functional import logsigmoid, relu

from preftune.losses.records import PairLoss, RefPairs
from preftune.losses.terms import Beta, mean_rewards, rewards
from preftune.section import setting


def ipo(
    pairs: RefPairs,
    *,
    beta: Beta = 0.1,
    lengths: Annotated[
        Literal["mean", "sum"], setting("a response's log-ratio: mean over its tokens (as its authors computed), or the sum")
    ] = "mean",
) -> PairLoss:
    """Identity Preference Optimization (Azar et al., 2023, arXiv 2310.12036), equation 17: (h − 1/(2β))², their τ is our β.

    The paper writes h with whole responses. Its authors confirmed (says TRL's source) that their results are those of the mean
    per token, hence the default: with sums, the target 1/(2β) asks for less the longer the responses are.
    """
    reward = mean_rewards(pairs, beta) if lengths == "mean" else rewards(pairs, beta)
    return PairLoss(((reward.margin - 0.5) / beta).square(), *reward)


def hinge(pairs: RefPairs, *, beta: Beta = 0.1) -> PairLoss:
    """SLiC's hinge loss (Zhao et al., 2023, arXiv 2305.10425) with a reference: max(0, 1 − βh).

    SLiC-HF itself compares log-probs and adds a likelihood term; RSO (Liu et al., 2023, arXiv 2309.06657) put the reference in,
    which makes it comparable with DPO. A pair whose reward margin is above 1 has no gradient.
    """
    reward = rewards(pairs, beta)
    return PairLoss(relu(1 - reward.margin), *reward)


def exo(
    pairs: RefPairs,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float, setting("probability that a preference is the wrong way round", unit="fraction", gt=0, lt=0.5)
    ] = 1e-3,
) -> PairLoss:
    """Efficient exact optimization, EXO (Ji et al., 2024, arXiv 2402.00856), equation 16: KL(model's preference ‖ the data's).

    σ(βh)·(log σ(βh) − log(1−ε)) + σ(−βh)·(log σ(−βh) − log ε): DPO's KL the other way round. ε = 0 would make every value
    infinite; the paper uses 1e-3.
    """
    reward = rewards(pairs, beta)
    margin = reward.margin
    right, wrong = torch.sigmoid(margin), torch.sigmoid(-margin)
    log_right, log_wrong = math.log1p(-label_smoothing), math.log(label_smoothing)
    return PairLoss(right * (logsigmoid(margin) - log_right) + wrong * (logsigmoid(-margin) - log_wrong), *reward)


def discopop(
    pairs: RefPairs,
    *,
    beta: Beta = 0.05,
    tau: Annotated[float, setting("width of the switch between the two losses (τ)", unit="reward", gt=0, lt=1)] = 0.05,
) -> PairLoss:
    """DiscoPOP, the log-ratio modulated loss (Lu et al., 2024, arXiv 2406.08414), equation 5.

    (1 − σ(ρ/τ))·(−log σ(ρ)) + σ(ρ/τ)·e^−ρ, ρ = βh. The second product is taken in logarithms: e^−ρ alone overflows where the
    product is 0. It is not monotone: with τ = 0.05 it rises at ρ = 0 and has a dip at ρ = −0.12, into which a pair that
    starts at the reference is pulled.
    """
    reward = rewards(pairs, beta)
    margin = reward.margin
    logistic = -torch.sigmoid(-margin / tau) * logsigmoid(margin)
    exponential = torch.exp(logsigmoid(margin / tau) - margin)
    return PairLoss(logistic + exponential, *reward)
