"""Objectives on pairs that need no reference: the policy's own log-probs are the reward."""

from __future__ import annotations

from typing import Annotated, Literal

from torch.nn.functional import logsigmoid

from preftune.losses.records import PairLoss, Pairs
from preftune.losses.terms import Rewards, log1mexp
from preftune.section import setting


def orpo(
    pairs: Pairs,
    *,
    odds_weight: Annotated[float, setting("weight of the odds-ratio term beside the likelihood of the chosen (λ)", ge=0)] = 0.1,
) -> PairLoss:
    """Odds ratio preference optimization (Hong et al., 2024, arXiv 2403.07691), equations 6 and 7.

    L_SFT + λ·(−log σ(log odds of the chosen − log odds of the rejected)), odds = P/(1−P), log P(y|x) the *mean* log-prob per
    token (equation 2), L_SFT = −log P of the chosen. Both terms are of the response's tokens alone, as the paper writes
    them; its authors' code counts the prompt's likelihood too unless told otherwise.
    """
    chosen, rejected = pairs.chosen_logp_mean, pairs.rejected_logp_mean
    log_odds = Rewards(chosen - log1mexp(chosen), rejected - log1mexp(rejected))
    return PairLoss(-chosen - odds_weight * logsigmoid(log_odds.margin), *log_odds)


def simpo(
    pairs: Pairs,
    *,
    beta: Annotated[float, setting("scale of the reward", unit="reward per nat", gt=0)] = 2.0,
    gamma: Annotated[float, setting("reward margin that is asked for (γ)", unit="reward", ge=0)] = 1.0,
) -> PairLoss:
    """Simple Preference Optimization (Meng et al., 2024, arXiv 2405.14734), equation 6.

    −log σ(β·log π(y_w|x)/|y_w| − β·log π(y_l|x)/|y_l| − γ). β ties to no reference, since there is none: it sets how
    large a reward is beside γ. Its authors use β of 2 to 10 and begin their search at γ/β = 0.5.
    """
    reward = Rewards(beta * pairs.chosen_logp_mean, beta * pairs.rejected_logp_mean)
    return PairLoss(-logsigmoid(reward.margin - gamma), *reward)


def cpo(
    pairs: Pairs,
    *,
    beta: Annotated[float, setting("scale of the reward", unit="reward per nat", gt=0)] = 0.1,
    nll_weight: Annotated[float, setting("weight of the likelihood of the chosen response", ge=0)] = 1.0,
    nll: Annotated[
        Literal["mean", "sum"], setting("likelihood of the chosen: mean over its tokens (as its authors computed), or the sum")
    ] = "mean",
) -> PairLoss:
    """Contrastive Preference Optimization (Xu et al., 2024, arXiv 2401.08417): L_prefer + L_NLL.

    −log σ(β·log π(y_w|x) − β·log π(y_l|x)) − log π(y_w|x). The paper writes both with whole responses; its authors' code takes
    the likelihood per token, hence the default.
    """
    reward = Rewards(beta * pairs.chosen_logp_sum, beta * pairs.rejected_logp_sum)
    likelihood = pairs.chosen_logp_mean if nll == "mean" else pairs.chosen_logp_sum
    return PairLoss(-logsigmoid(reward.margin) - nll_weight * likelihood, *reward)


def preferred_ft(
    pairs: Pairs,
    *,
    lengths: Annotated[
        Literal["mean", "sum"], setting("likelihood of a response: mean over its tokens (every pair counts alike), or the sum")
    ] = "mean",
) -> PairLoss:
    """Supervised fine-tuning on the chosen responses, Preferred-FT (Rafailov et al., 2023, arXiv 2305.18290, section 6).

    −log π(y_w|x)/|y_w|, or the sum. The way to a reference where no model was fine-tuned on such answers; added to `dpo` it is
    RPO (Pang et al., 2024, arXiv 2404.19733, equation 2). `sft` differs in that every *token* counts alike.
    """
    if lengths == "mean":
        reward = Rewards(pairs.chosen_logp_mean, pairs.rejected_logp_mean)
    else:
        reward = Rewards(pairs.chosen_logp_sum, pairs.rejected_logp_sum)
    return PairLoss(-reward.chosen, *reward)
