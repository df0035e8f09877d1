"""Direct Preference Optimization (Rafailov et al., 2023, arXiv 2305.18290)."""

from __future__ import annotations

from typing import Annotated

from torch.nn.functional import logsigmoid

from preftune.config import setting
from preftune.losses.records import PairLoss, RefPairs


def dpo(
    pairs: RefPairs,
    *,
    beta: Annotated[
        float, setting("strength of the tie to the reference: larger stays closer to it", unit="reward per nat", gt=0)
    ] = 0.1,
    label_smoothing: Annotated[
        float, setting("probability that a preference is the wrong way round (conservative DPO)", unit="fraction", ge=0, lt=0.5)
    ] = 0.0,
) -> PairLoss:
    """Equation 7 of the paper, one value per pair: −log σ(β·h), h = log-ratio of the chosen − log-ratio of the rejected.

    With label smoothing ε it is (1−ε)·(−log σ(βh)) + ε·(−log σ(−βh)) (Mitchell, "A note on DPO with noisy preferences", eq. 3).
    At h = 0 it is ln 2.
    """
    chosen, rejected = beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return PairLoss(loss, chosen, rejected)
