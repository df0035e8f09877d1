"""Best of n: draw n answers of the reference, keep the one that scores best. What every policy should beat at equal KL.

    >>> found = best_of([[1.0, 3.0, 2.0, 0.0], [2.0, 2.0, 5.0, 1.0]], 2)
    >>> found.kl_at_most
    0.193

All of it is measured on answers of the reference alone, N of them to each prompt, N ≥ n: nothing is trained, and no subset is
drawn, since the mean over all subsets has a closed form.

Its KL from the reference is log n − (n − 1)/n nats a response where no two answers tie (Stiennon et al. 2020, arXiv 2009.01325,
appendix G.3), and less where they do (Beirami et al. 2024, arXiv 2401.01879). With ties broken at random the answer is the
reference's own among those of its score, so the KL is that of the scores: a score v that the reference reaches with probability
p(v), and nothing above it with probability F(v), is kept with probability q(v) = F(v)ⁿ − (F(v) − p(v))ⁿ, and
KL = Σ q(v) log(q(v)/p(v)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.errors import ConfigError
from preftune.evaluate.estimate import Estimate, mean


class BestOf(NamedTuple):
    """What keeping the best of `n` answers of the reference comes to."""

    n: int
    score: Estimate  # expected score of the answer that is kept
    win_rate: Estimate  # percent: how often it beats one more answer of the reference, a tie one half
    kl_at_most: float  # nats a response: log n − (n − 1)/n, its KL where no answers tie
    kl: Estimate  # nats a response, with the ties that were seen; of N = n + 1 answers up to 0.04 too low, of 2n up to 0.02


def kl_at_most(n: int) -> float:
    """log n − (n − 1)/n, in nats a response."""
    return math.log(n) - (n - 1) / n


def best_of(scores: Sequence[Sequence[float]], n: int) -> BestOf:
    """Measured on [prompt][answer] scores of independent answers of the reference, more than `n` to each prompt.

    Raises ConfigError where a prompt has too few answers.
    """
    if n < 1 or any(len(row) <= n for row in scores):
        fewest = min((len(row) for row in scores), default=0)
        raise ConfigError(
            f"best of {n}: needs {n + 1} answers to each prompt, n and one to compare with; a prompt has {fewest}"
        )
    tables = [np.sort(np.array(row, np.float64)) for row in scores]
    return BestOf(
        n=n,
        score=mean([[_expected_best(row, n)] for row in tables]),
        win_rate=mean([[100 * _wins(row, n)] for row in tables]),
        kl_at_most=kl_at_most(n),
        kl=mean([[_kl(row, n)] for row in tables]),
    )


def _expected_best(row: NDArray[np.float64], n: int) -> float:
    """Mean over all subsets of n of their best: the k-th lowest of N is the best of C(k − 1, n − 1) of C(N, n)."""
    total = len(row)
    weights = [math.comb(k, n - 1) / math.comb(total, n) for k in range(total)]
    return float(np.dot(weights, row))


def _wins(row: NDArray[np.float64], n: int) -> float:
    """Mean over each answer as the other one and all subsets of n of the rest: the best of those wins 1, ties ½."""
    total = len(row)
    below, up_to = np.searchsorted(row, row, "left"), np.searchsorted(row, row, "right")
    subsets = math.comb(total - 1, n)
    lost = [math.comb(int(b), n) / subsets for b in below]  # all n below it
    not_won = [math.comb(int(u) - 1, n) / subsets for u in up_to]  # none above it; itself is not among them
    return float(np.mean([1 - (a + b) / 2 for a, b in zip(lost, not_won, strict=True)]))


def _kl(row: NDArray[np.float64], n: int) -> float:
    """The KL of the scores' own distribution, as it was seen."""
    _, counts = np.unique(row, return_counts=True)
    p = counts / counts.sum()
    reached = np.cumsum(p)
    q = reached**n - (reached - p).clip(min=0.0) ** n
    kept = q > 0
    return max(0.0, float(np.sum(q[kept] * np.log(q[kept] / p[kept]))))  # rounding alone makes it less
