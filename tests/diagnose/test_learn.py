from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.diagnose.learn import RIDGE, cross_validated, fit, rows_of


def newton(x: np.ndarray) -> np.ndarray:
    """The same objective by Newton's method on dense rows, in float64."""
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(x @ w))
        gradient = RIDGE * w - x.T @ p
        w = w - np.linalg.solve(RIDGE * np.eye(len(w)) + (x * (p * (1 - p))[:, None]).T @ x, gradient)
    return w


@given(st.integers(0, 10_000))
def test_the_fit_is_the_minimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(5, 60)), int(rng.integers(1, 6))
    dense = rng.normal(size=(n, d)) * (rng.random((n, d)) < 0.7)
    dense[:, 0] += 0.5
    table = rows_of([{str(c): float(v) for c, v in enumerate(row) if v} for row in dense], min_rows=1)
    columns = [int(name) for name in table.names]
    scaled = dense[:, columns] / np.array([np.sqrt(np.mean(dense[dense[:, c] != 0, c] ** 2)) for c in columns])
    assert fit(table) == pytest.approx(newton(scaled), abs=2e-3)


def test_swapping_the_sides_turns_the_score() -> None:
    rng = np.random.default_rng(0)
    rows = [{"a": float(v), "b": float(u)} for v, u in rng.normal(size=(50, 2))]
    groups = [str(n) for n in range(50)]
    turned = [{k: -v for k, v in row.items()} for row in rows]
    assert fit(rows_of(turned)) == pytest.approx(-fit(rows_of(rows)))
    assert len(cross_validated(rows_of(rows), groups).score) == 50


def test_a_prompt_is_never_judged_by_a_model_that_has_seen_it() -> None:
    """Each prompt has a word of its own that always wins there: useless elsewhere, so accuracy stays at one half."""
    rows = [{f"only{n}": 1.0} for n in range(60) for _ in range(5)]
    groups = [f"prompt {n}" for n in range(60) for _ in range(5)]
    outcome = cross_validated(rows_of(rows), groups)
    assert set(outcome.correct) == {0.5}
    assert cross_validated(rows_of([{"w": 1.0}] * 100), [str(n) for n in range(100)]).correct.mean() == 1.0


def test_rare_features_and_empty_rows() -> None:
    table = rows_of([{"rare": 1.0}, {}, {"common": 1.0}, {"common": 2.0}, {"common": -1.0}])
    assert table.names == ["common"] and table.n_rows == 5
    assert fit(rows_of([{}, {}])).shape == (0,)
