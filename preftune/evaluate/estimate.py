"""A number with its 95 % confidence interval, where several values belong to one prompt.

    mean        of values that are about symmetric, and of few prompts too: t · sd / √(number of prompts)
    ratio       of two sums, such as nats over tokens, in the same way
    wilson      a share of independent cases, such as right and wrong: an interval that never leaves 0 to 1
    bootstrap   a mean of values that are nothing like symmetric, by drawing the prompts anew

Replies to one prompt are not independent, so intervals are those of the prompts' means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054  # the normal's 97.5 % quantile
_T95 = (12.706204736, 4.302652730, 3.182446305, 2.776445105, 2.570581836)  # Student's, of 1 to 5 degrees of freedom
_DRAWN_AT_ONCE = 1 << 22  # indices of a bootstrap: 32 MiB


class Estimate(NamedTuple):
    """A mean and its 95 % confidence interval. `n` is the number of prompts that it rests on."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def not_negative(self) -> Estimate:
        """The same of a quantity that is never below 0, where its interval reaches no further."""
        return self._replace(low=max(0.0, self.low))


def mean(values: Sequence[Sequence[float]]) -> Estimate:
    """Mean over prompts of the mean over each prompt's values; [prompt][value], every prompt with one value or more."""
    per_prompt = np.array([np.mean(v) for v in values], np.float64)
    n = len(per_prompt)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    half = _t95(n - 1) * per_prompt.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    centre = float(per_prompt.mean())
    return Estimate(centre, centre - float(half), centre + float(half), n)


def ratio(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> Estimate:
    """Sum of `above` over sum of `below`, both [prompt][value], such as nats over tokens.

    The interval is that of the prompts' residuals, above − ratio · below (Cochran 1977, section 6.4).
    """
    tops, bottoms = (np.array([np.sum(v) for v in values], np.float64) for values in (above, below))
    if not bottoms.sum():
        return Estimate(math.nan, math.nan, math.nan, len(bottoms))
    centre = float(tops.sum() / bottoms.sum())
    residuals = (tops - centre * bottoms) / bottoms.mean()
    around = mean([[float(r)] for r in residuals])
    return Estimate(centre, centre + around.low - around.value, centre + around.high - around.value, around.n)


def shares(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[float]:
    """[prompt] how often a reply of ours scores higher than one of theirs to the same prompt; a tie counts one half.

    ours, theirs: [prompt][reply] scores. Every reply of one side meets every reply of the other.
    """
    found = []
    for a, b in zip(ours, theirs, strict=True):
        difference = np.subtract.outer(np.asarray(a, np.float64), np.asarray(b, np.float64))
        found.append(float(np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5)).mean()))
    return found


def win_rate(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Estimate:
    """The mean of `shares`, a fraction."""
    return mean([[share] for share in shares(ours, theirs)])


def wilson(n_right: float, n: int) -> Estimate:
    """The share `n_right` of `n` independent cases, a tie counting one half, with Wilson's score interval (1927, JASA 22)."""
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    share, z2 = n_right / n, _Z**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    # the interval touches 0 and 1 exactly where the share does: rounding must not leave it outside
    return Estimate(share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share), n)


def share(values: Sequence[Sequence[float]]) -> Estimate:
    """How often something holds, [prompt][reply] 1 or 0, with the interval of `wilson` as if each prompt had one reply.

    That is wide enough however alike the replies to a prompt are, and where all or none are 1 it is an interval still.
    """
    found = mean(values)
    return wilson(found.value * found.n, found.n) if found.n else found


def bootstrap(values: Sequence[Sequence[float]], *, seed: int = 0, n_resamples: int = 10_000) -> Estimate:
    """`mean` with the percentile interval of the bootstrap over prompts (Efron & Tibshirani 1993, chapter 13).

    Same seed, same interval. Of one prompt there is no interval: it is infinite, as that of `mean`.
    """
    per_prompt = np.array([np.mean(v) for v in values], np.float64)
    n = len(per_prompt)
    if n < 2:
        return mean(values)
    draw = np.random.Generator(np.random.Philox(key=seed))
    size = max(1, _DRAWN_AT_ONCE // n)
    parts = [min(size, n_resamples - at) for at in range(0, n_resamples, size)]
    means = np.concatenate([per_prompt[draw.integers(n, size=(rows, n))].mean(1) for rows in parts])
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(per_prompt.mean()), float(low), float(high), n)


def _t95(degrees: int) -> float:
    """Student's t at 97.5 %: from a table, then the Cornish-Fisher expansion around the normal, within 0.1 %."""
    if degrees <= len(_T95):
        return _T95[max(degrees, 1) - 1]
    z, d = _Z, degrees
    return (
        z
        + (z**3 + z) / (4 * d)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    )
