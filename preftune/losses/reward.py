"""Reward models: a scalar score that is higher for the preferred response."""

from __future__ import annotations

from typing import Annotated

from torch.nn.functional import logsigmoid

from preftune.losses.records import Margin, PairLoss, Scores
from preftune.section import setting


def bradley_terry(
    scores: Scores,
    data: Margin,
    *,
    margin: Annotated[
        float, setting("score difference that is asked for, per unit of the data's score difference; 0: none", ge=0)
    ] = 0.0,
    centering: Annotated[float, setting("weight of (sum of both scores)², which keeps scores around 0", ge=0)] = 0.0,
) -> PairLoss:
    """Reward model under Bradley–Terry (Ouyang et al., 2022, arXiv 2203.02155, equation 1): −log σ(r_w − r_l).

    With a margin, −log σ(r_w − r_l − m·margin of the data) (Llama 2, arXiv 2307.09288, equation 2); with centering η, plus
    η·(r_w + r_l)² (Eisenstein et al., 2023, arXiv 2312.09244), since a constant added to all scores changes nothing else.
    """
    asked = margin * data.margin
    loss = -logsigmoid(scores.chosen_score - scores.rejected_score - asked)
    loss = loss + centering * (scores.chosen_score + scores.rejected_score).square()
    return PairLoss(loss, scores.chosen_score, scores.rejected_score)
