"""KL(policy‖reference) on the policy's own samples, in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.data.types import Branch, Tree
from preftune.engine.policy import Policy
from preftune.engine.score import logps_of_all
from preftune.evaluate.estimate import Estimate, mean
from preftune.generate import Reply


class KL(NamedTuple):
    """The divergence for a whole reply and for one token of it."""

    per_response: Estimate
    per_token: Estimate


def trees_of(prompts: Sequence[NDArray[np.int32]], replies: Sequence[Sequence[Reply]]) -> list[Tree]:
    """One tree a prompt, with the replies that were sampled for it as branches. [prompt][reply]."""
    return [
        Tree(str(i), prompt, tuple(Branch(r.ids, np.ones(len(r.ids), np.bool_)) for r in answers))
        for i, (prompt, answers) in enumerate(zip(prompts, replies, strict=True))
    ]


def kl_on_samples(policy: Policy, reference: Policy, trees: Sequence[Tree], *, budget: int = 8192) -> KL:
    """Mean over replies y ~ policy of log π(y|x) − log π_ref(y|x).

    trees: prompts with the policy's own replies (`trees_of`), drawn at temperature 1 without truncation: only then is the mean
    the KL. budget: tokens in one forward pass.
    """
    ratios: list[list[float]] = []
    per_token: list[list[float]] = []
    for ours, theirs in zip(logps_of_all(policy, trees, budget), logps_of_all(reference, trees, budget), strict=True):
        sums = [float((a.astype(np.float64) - b).sum()) for a, b in zip(ours, theirs, strict=True)]
        ratios.append(sums)
        per_token.append([sum(sums) / max(1, sum(len(a) for a in ours))])
    return KL(mean(ratios), mean(per_token))
