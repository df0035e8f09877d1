"""A mean with its 95 % confidence interval, where several values belong to one prompt.

Replies to one prompt are not independent, so the interval is that of the prompts' means: half-width
t · sd / √(number of prompts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its 95 % confidence interval. `n` is the number of prompts that it rests on."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean(values: Sequence[Sequence[float]]) -> Estimate:
    """Mean over prompts of the mean over each prompt's values; [prompt][value], every prompt with one value or more."""
    per_prompt = np.array([np.mean(v) for v in values], np.float64)
    n = len(per_prompt)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    half = _t95(n - 1) * per_prompt.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    centre = float(per_prompt.mean())
    return Estimate(centre, centre - float(half), centre + float(half), n)


def win_rate(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Estimate:
    """How often a reply of ours scores higher than one of theirs to the same prompt; a tie counts one half.

    ours, theirs: [prompt][reply] scores. Every reply of one side meets every reply of the other.
    """
    table = []
    for a, b in zip(ours, theirs, strict=True):
        difference = np.subtract.outer(np.asarray(a, np.float64), np.asarray(b, np.float64))
        table.append([float(np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5)).mean())])
    return mean(table)


def _t95(degrees: int) -> float:
    """Student's t at 97.5 %, from the Cornish-Fisher expansion around the normal; within 0.5 % from 4 degrees of freedom on."""
    z = 1.959963984540054
    d = max(degrees, 1)
    return (
        z
        + (z**3 + z) / (4 * d)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    )
