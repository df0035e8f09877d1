"""DPO and its nearest kin: −log σ of one margin between the implicit rewards of the chosen and the rejected response.

h_w and h_l are the log-ratios log(π(y|x)/π_ref(y|x)) of the chosen and the rejected response in nats, and h = h_w − h_l.
"""

from __future__ import annotations

from typing import Annotated

from torch.nn.functional import logsigmoid, relu

from preftune.losses.records import Confidence, Margin, PairLoss, RefPairs, WholeStep
from preftune.losses.terms import Beta, Rewards, mean_rewards, rewards
from preftune.section import setting


def dpo(
    pairs: RefPairs,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float, setting("probability that a preference is the wrong way round (conservative DPO)", unit="fraction", ge=0, lt=0.5)
    ] = 0.0,
) -> PairLoss:
    """Direct Preference Optimization (Rafailov et al., 2023, arXiv 2305.18290), equation 7: −log σ(βh).

    With label smoothing ε it is (1−ε)·(−log σ(βh)) + ε·(−log σ(−βh)) (Mitchell, "A note on DPO with noisy preferences", eq. 3).
    At h = 0 it is ln 2.
    """
    reward = rewards(pairs, beta)
    right, wrong = -logsigmoid(reward.margin), -logsigmoid(-reward.margin)
    return PairLoss((1 - label_smoothing) * right + label_smoothing * wrong, *reward)


def robust(
    pairs: RefPairs,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float, setting("probability that a preference is the wrong way round", unit="fraction", ge=0, lt=0.5)
    ] = 0.1,
) -> PairLoss:
    """Robust DPO (Chowdhury et al., 2024, arXiv 2403.00409), section 3.1: DPO's loss, unbiased when a share ε is swapped.

    ((1−ε)·(−log σ(βh)) − ε·(−log σ(−βh))) / (1−2ε). It has no lower bound: a pair that is very right still pulls, by ε/(1−2ε).
    """
    reward = rewards(pairs, beta)
    right, wrong = -logsigmoid(reward.margin), -logsigmoid(-reward.margin)
    return PairLoss(((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing), *reward)


def dpo_soft(pairs: RefPairs, sure: Confidence, *, beta: Beta = 0.1) -> PairLoss:
    """DPO with the data's confidence p as a soft label: p·(−log σ(βh)) + (1−p)·(−log σ(−βh)).

    Conservative DPO (Mitchell's note, equation 3) with 1−p of each pair in the place of one ε for all: the cross-entropy of the
    model's probability under the data's. It is least where both are equally sure, βh = log(p/(1−p)); at p = 1 it is DPO.
    """
    reward = rewards(pairs, beta)
    right, wrong = -logsigmoid(reward.margin), -logsigmoid(-reward.margin)
    return PairLoss(sure.confidence * right + (1 - sure.confidence) * wrong, *reward)


def odpo(
    pairs: RefPairs,
    scores: Margin,
    *,
    beta: Beta = 0.1,
    offset: Annotated[
        float, setting("reward that the margin has to exceed, per unit of the data's score difference (α)", ge=0)
    ] = 1.0,
) -> PairLoss:
    """DPO with an offset (Amini et al., 2024, arXiv 2402.10571): −log σ(βh − α·(score of the chosen − of the rejected)).

    The paper's offset is α·f(score difference) for an increasing f, and its experiments take f = log. That has no value for a
    pair whose scores are equal or unknown, and asks for a *negative* margin below a difference of 1. So f is the identity here,
    as in the margin of Llama 2's reward model; a pair without scores is one of DPO's.
    """
    reward = rewards(pairs, beta)
    return PairLoss(-logsigmoid(reward.margin - offset * scores.margin), *reward)


def dpo_norm(pairs: RefPairs, *, beta: Beta = 5.0) -> PairLoss:
    """Length-normalised DPO (Tülu 3, Lambert et al., 2024, arXiv 2411.15124): −log σ(β·(h_w/|y_w| − h_l/|y_l|)).

    β is larger than DPO's because a mean per token is smaller than a sum over the response; 5 is theirs.
    """
    reward = mean_rewards(pairs, beta)
    return PairLoss(-logsigmoid(reward.margin), *reward)


def dpop(
    pairs: RefPairs,
    *,
    beta: Beta = 0.3,
    penalty: Annotated[float, setting("weight of what the chosen response has lost against the reference (λ)", ge=0)] = 50.0,
) -> PairLoss:
    """DPO-Positive (Smaug, Pal et al., 2024, arXiv 2402.13228), equation 3: −log σ(β·(h − λ·max(0, −h_w))).

    The chosen response may not lose probability, which DPO allows as long as the rejected one loses more. At the reference the
    maximum has a corner; its slope there is 0. The penalty is part of the chosen response's reward.
    """
    plain = rewards(pairs, beta)
    reward = Rewards(plain.chosen - penalty * relu(-plain.chosen), plain.rejected)
    return PairLoss(-logsigmoid(reward.margin), *reward)


def beta_dpo(
    pairs: RefPairs,
    step: WholeStep[RefPairs],
    *,
    beta: Beta = 0.1,
    sensitivity: Annotated[
        float, setting("how much β grows with the step's mean reward margin (α)", unit="per reward", ge=0)
    ] = 0.6,
    typical_margin: Annotated[float, setting("the mean reward margin at which β stays as it is (M₀)", unit="reward")] = 0.0,
) -> PairLoss:
    """β-DPO (Wu et al., 2024, arXiv 2407.08639): DPO whose β is that of the step, β·(1 + α·(mean margin of the step − M₀)).

    The margin is that of DPO's reward, βh, averaged over all pairs of the step; β is taken as given (no gradient) and not let
    below 0.001, as in the authors' code. They let M₀ follow the steps' means, and draw which pairs of a batch count. Both make
    a step depend on earlier ones or on chance, so M₀ is a setting here and every pair counts.
    """
    mean_margin = rewards(step, beta).margin.mean()
    beta_of_step = (beta * (1 + sensitivity * (mean_margin - typical_margin))).clamp(min=1e-3)
    reward = Rewards(beta_of_step * pairs.chosen_log_ratio, beta_of_step * pairs.rejected_log_ratio)
    return PairLoss(-logsigmoid(reward.margin), *reward)
