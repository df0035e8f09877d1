"""Shares with their intervals, and how a severity follows from one: never from the point, always from the bound.

    >>> longer = share([True, True, False, True], groups=["a", "a", "b", "c"])
    >>> graded(longer, note=0.55, warning=0.6, error=0.7)
    'ok'

A severity is given where the whole 99.9 % interval lies beyond a threshold. So data that lie below it raise a false alarm in
one of 2000 checks at most, whatever their size, and small data are never accused on the strength of a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.diagnose.finding import Severity

Z95 = NormalDist().inv_cdf(0.975)
Z999 = NormalDist().inv_cdf(0.9995)


class Share(NamedTuple):
    """A fraction of `n` things, its 95 % interval, and the bounds at 99.9 % from which severities follow."""

    value: float
    low: float
    high: float
    surely_above: float
    surely_below: float
    n: int

    @property
    def interval(self) -> list[float]:
        """[low, high], rounded for JSON."""
        return [round(self.low, 4), round(self.high, 4)]

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def share(
    values: Sequence[float] | Sequence[bool] | NDArray[np.float64] | NDArray[np.bool_], groups: Sequence[Hashable]
) -> Share:
    """The mean of values in [0, 1], one or more, with Wilson's interval (Wilson 1927, J. Am. Stat. Assoc. 22).

    Values of one group (a prompt) depend on each other: n is divided by the design effect, the ratio of the variance of the
    mean between groups to that of independent values, where it is above 1.
    """
    found = np.asarray(values, np.float64)
    n, mean = len(found), float(found.mean())
    _, codes = np.unique(np.asarray([hash(g) for g in groups]), return_inverse=True)
    between = float((np.bincount(codes, weights=found - mean) ** 2).sum())
    within = mean * (1 - mean) * n
    effective = n / max(1.0, between / within) if within > 0 else float(codes.max() + 1)
    (low, high), (above, below) = (wilson(mean, effective, z) for z in (Z95, Z999))
    return Share(mean, low, high, above, below, n)


def wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's interval of a share `p` of `n` at ±`z` standard errors."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def graded(found: Share, *, note: float, warning: float, error: float = math.inf) -> Severity:
    """The severity of a share that should be small."""
    bound = found.surely_above
    return "error" if bound >= error else "warning" if bound >= warning else "note" if bound >= note else "ok"
