"""Win rate of a policy's own answers against others' to the same prompts.

>>> counted([1.0, 0.75, 0.0, None], judge="the true reward", against="sft").win_rate.value
58.3
"""

from __future__ import annotations

from collections.abc import Sequence

from preftune.evaluate.estimate import bootstrap
from preftune.evaluate.record import Wins
from preftune.evaluate.winrate import win_rate


def counted(
    preferences: Sequence[float | None],
    *,
    judge: str,
    against: str,
    tokens: float | None = None,
    tokens_base: float | None = None,
    seed: int = 0,
) -> Wins:
    """The record of preferences, one a prompt: the probability that the policy's answer is the better; None: no verdict."""
    rate = win_rate(preferences)
    return Wins(
        judge=judge,
        against=against,
        n_total=rate.n_total,
        n_wins=rate.n_wins,
        n_wins_base=rate.n_wins_base,
        n_draws=rate.n_draws,
        n_unscored=rate.n_dropped,
        win_rate=bootstrap([[100 * p] for p in preferences if p is not None], seed=seed),
        standard_error=rate.standard_error if rate.n_total > 1 else None,
        length_controlled=None,
        tokens=tokens,
        tokens_base=tokens_base,
    )
