"""Best of n against the enumeration of all subsets and against distributions whose answer is known."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.errors import ConfigError
from preftune.evaluate.best_of import best_of, kl_at_most

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=3, max_size=7)


@given(SCORES, st.integers(1, 4))
def test_it_is_the_mean_over_all_subsets(row: list[float], n: int) -> None:
    n = min(n, len(row) - 1)
    found = best_of([row], n)
    assert found.score.value == pytest.approx(np.mean([max(s) for s in combinations(row, n)]))
    wins = []
    for j, other in enumerate(row):
        rest = row[:j] + row[j + 1 :]
        wins += [(max(s) > other) + 0.5 * (max(s) == other) for s in combinations(rest, n)]
    assert found.win_rate.value == pytest.approx(100 * float(np.mean(wins)))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=5), st.integers(1, 4))
def test_the_kl_with_ties_is_that_of_the_answers_themselves(answers: list[tuple[int, int]], n: int) -> None:
    """answers: the score of each and its weight; best of n by enumeration, a tie to whichever was drawn first."""
    scores, weights = np.array([s for s, _ in answers]), np.array([w for _, w in answers], float)
    p = weights / weights.sum()
    q = np.zeros(len(p))
    for drawn in product(range(len(p)), repeat=n):
        q[max(drawn, key=lambda k: scores[k])] += np.prod(p[list(drawn)])
    exact = float(np.sum(q[q > 0] * np.log(q[q > 0] / p[q > 0])))
    copies = 10  # each answer as often as its weight says: the scores' own distribution is then exact
    row = [float(s) for s, w in answers for _ in range(w * copies)]
    found = best_of([row], n)
    assert found.kl.value == pytest.approx(exact, abs=1e-12)
    assert 0 <= found.kl.value <= found.kl_at_most + 1e-12


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_without_ties_it_is_what_the_papers_say(n: int) -> None:
    found = best_of([list(np.arange(2000.0)), list(np.arange(2000.0)[::-1])], n)
    assert found.win_rate.value == pytest.approx(100 * n / (n + 1))
    assert found.score.value == pytest.approx(2001 * n / (n + 1) - 1)
    assert found.kl_at_most == kl_at_most(n) == pytest.approx(math.log(n) - (n - 1) / n)
    assert found.kl.value == pytest.approx(found.kl_at_most, abs=0.01)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_the_kl_that_is_seen_in_few_answers_is_hardly_too_low(n: int) -> None:
    for total, most in ((n + 1, 0.04), (2 * n, 0.02), (4 * n, 0.006)):
        low = kl_at_most(n) - best_of([list(map(float, range(total)))], n).kl.value
        assert 0 < low < most


def test_where_all_answers_tie_nothing_is_won_or_paid() -> None:
    found = best_of([[1.0] * 8], 4)
    assert (found.win_rate.value, found.kl.value, found.score.value) == (50.0, 0.0, 1.0)


def test_too_few_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="best of 4: needs 5 answers to each prompt.*has 3"):
        best_of([[1.0] * 9, [1.0] * 3], 4)
