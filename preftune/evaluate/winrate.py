"""Win rate of one model's answers against another's, as AlpacaEval counts it, from preferences or from judgments.

    >>> found = win_rate([0.0, 1.0, 1.0, 0.5, None])
    >>> found.win_rate, found.n_total, found.n_dropped
    (62.5, 4, 1)

A preference is the probability that the evaluated model's answer is the better one; None is no verdict and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from preftune.data.judgments import mirrored, settled, share_of_i
from preftune.data.types import Judgment


class WinRate(NamedTuple):
    """Win rate and its standard error in percent; NaN where nothing was judged (the error: fewer than two)."""

    n_total: int  # preferences that count
    n_wins: int  # above one half
    n_wins_base: int  # below one half
    n_draws: int  # exactly one half
    win_rate: float  # mean preference
    standard_error: float  # sd with n - 1, over √n
    discrete_win_rate: float  # the share of wins, a draw counting one half
    n_dropped: int  # without a verdict

    def as_dict(self) -> dict[str, Any]:
        """For JSON: None in the place of NaN."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in self._asdict().items()}


def win_rate(preferences: Sequence[float | None]) -> WinRate:
    """The figures over all preferences that are a number from 0 to 1; the others are dropped and counted."""
    # sorted: the order in which verdicts came must not change the last digit
    kept = np.sort(np.array([p for p in preferences if p is not None and 0 <= p <= 1], np.float64))
    n = len(kept)
    wins, losses = int((kept > 0.5).sum()), int((kept < 0.5).sum())
    draws = n - wins - losses
    return WinRate(
        n_total=n,
        n_wins=wins,
        n_wins_base=losses,
        n_draws=draws,
        win_rate=100 * float(kept.mean()) if n else math.nan,
        standard_error=100 * float(kept.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan,
        discrete_win_rate=100 * (wins + draws / 2) / n if n else math.nan,
        n_dropped=len(preferences) - n,
    )


def preference(coded: float | int | None) -> float | None:
    """AlpacaEval's code as a probability: 1 the baseline's answer is better, 2 the model's, 1.5 (in old files 0) a tie.

    None for null, NaN and what lies outside: a judgment that failed.
    """
    if coded is None or math.isnan(coded):
        return None
    coded = 1.5 if coded == 0 else coded
    return coded - 1 if 1 <= coded <= 2 else None


def preferences_for(judgments: Iterable[Judgment], response: int = 1) -> list[float | None]:
    """What each settled judgment that compares `response` with another one says for it (`share_of_i`)."""
    found: list[float | None] = []
    for one in settled(judgments):
        if response in (one.i, one.j):
            found.append(share_of_i(one if one.i == response else mirrored(one)))
    return found
