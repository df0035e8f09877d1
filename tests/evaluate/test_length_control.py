"""Length control: the fit against its optimality conditions and another solver, the choice of C, and what cannot be fitted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.errors import DataError
from preftune.evaluate.length_control import (
    STRENGTHS,
    Gamed,
    Rows,
    best_strength,
    fit,
    length_controlled,
    standardised,
)


def random_rows(seed: int, n: int = 40, features: int = 3, *, labels: str = "soft") -> Rows:
    random = np.random.default_rng(seed)
    x = np.column_stack([np.tanh(random.normal(size=n)), random.normal(size=(n, features - 2)), random.random(n) < 0.7])
    y = {"soft": random.random(n), "hard": (random.random(n) < 0.5) * 1.0, "wins": np.ones(n)}[labels]
    return Rows(x.astype(np.float64), y, random.choice([0.1, 1.0, 3.0], n))


def slope(rows: Rows, strength: float, w: Any) -> Any:
    """Gradient of C·Σ s·CE by the definition."""
    p = np.array([1 / (1 + math.exp(-float(z))) for z in rows.x @ w])
    return strength * sum(s * (q - y) * x for s, q, y, x in zip(rows.weight, p, rows.y, rows.x, strict=True))


def by_proximal_gradient(rows: Rows, strength: float) -> Any:
    """The slow way: small steps along the slope, each followed by the shrinking that |w| asks for (Nesterov's momentum)."""
    rate = 4 / (strength * float((rows.weight[:, None] * rows.x**2).sum()))
    w = ahead = np.zeros(rows.x.shape[1])
    k, restart = 1.0, np.inf
    for _ in range(60_000):
        stepped = ahead - rate * slope_fast(rows, strength, ahead)
        new = np.sign(stepped) * np.maximum(np.abs(stepped) - rate, 0)
        value = float(np.abs(new).sum()) + strength * loss(rows, new)
        later = (1 + math.sqrt(1 + 4 * k * k)) / 2 if value <= restart else 1.0
        ahead = new + ((k - 1) / later if value <= restart else 0.0) * (new - w)
        if np.abs(new - w).max() < 1e-13 and value <= restart:
            return new
        w, k, restart = new, later, value
    return w


def slope_fast(rows: Rows, strength: float, w: Any) -> Any:
    return strength * ((rows.weight * (1 / (1 + np.exp(-(rows.x @ w))) - rows.y)) @ rows.x)


def loss(rows: Rows, w: Any) -> float:
    z = rows.x @ w
    return float((rows.weight * (np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0) - rows.y * z)).sum())


@pytest.mark.parametrize("strength", [1e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_another_solver_finds_the_same_weights(strength: float, labels: str) -> None:
    for seed in range(3):
        rows = random_rows(seed, labels=labels)
        assert fit(rows, strength) == pytest.approx(by_proximal_gradient(rows, strength), abs=1e-7)


@given(
    seed=st.integers(0, 10**6),
    strength=st.sampled_from([float(c) for c in STRENGTHS]),
    labels=st.sampled_from(["soft", "hard", "wins"]),
    features=st.sampled_from([2, 3]),
)
@settings(max_examples=60)
def test_the_optimality_conditions_hold_for_every_strength(seed: int, strength: float, labels: str, features: int) -> None:
    rows = random_rows(seed, features=features, labels=labels)
    w = fit(rows, strength)
    gradient = slope(rows, strength, w)
    room = 1e-8 * max(1.0, strength)
    for g, v in zip(gradient, w, strict=True):
        if v == 0:
            assert abs(g) <= 1 + room
        else:
            assert g == pytest.approx(-np.sign(v), abs=room)


@given(seed=st.integers(0, 10**6), where=st.integers(0, 2))
@settings(max_examples=30)
def test_starting_elsewhere_leads_to_the_same_place(seed: int, where: int) -> None:
    rows, start = random_rows(seed), np.zeros(3)
    start[where] = 4.0
    assert fit(rows, 2.0, start=start) == pytest.approx(fit(rows, 2.0), abs=1e-7)


def test_the_strength_is_the_best_of_cross_validation_by_its_definition() -> None:
    rows = random_rows(3, n=53)
    folds = [list(range(52 - k, -1, -5)) for k in range(5)]
    assert sorted(i for fold in folds for i in fold) == list(range(53))
    losses = []
    for strength in STRENGTHS:
        over_folds = []
        for fold in folds:
            rest = [i for i in range(53) if i not in fold]
            w = fit(Rows(rows.x[rest], rows.y[rest], rows.weight[rest]), float(strength))
            over_folds.append(loss(Rows(rows.x[fold], rows.y[fold], rows.weight[fold]), w) / len(fold))
        losses.append(sum(over_folds) / 5)
    assert best_strength(rows) == STRENGTHS[int(np.argmin(losses))]


def judged(n: int = 400, *, quality: float, pull: float, seed: int = 0) -> dict[str, Any]:
    """Preferences by a judge who knows `quality` and is pulled by the standardised difference in length."""
    random = np.random.default_rng(seed)
    base = random.integers(100, 900, n)
    ours = np.maximum(10, base + random.integers(-300, 600, n))
    delta = base - ours
    p = 1 / (1 + np.exp(-(quality + pull * np.tanh(delta / delta.std(ddof=1)))))
    return {"preferences": [float(v) for v in p], "lengths": ours.tolist(), "lengths_base": base.tolist()}


def test_what_length_adds_is_taken_off() -> None:
    case = judged(quality=0.4, pull=-1.5)
    found = length_controlled(**case)
    assert 100 * np.mean(case["preferences"]) > 68, "the longer answers win more than their quality is worth"
    assert found.win_rate == pytest.approx(100 / (1 + math.exp(-0.4)), abs=1.0)
    assert found.low < found.win_rate < found.high and found.length < -1 and found.standard_error is None
    again = length_controlled(**case)
    assert again == found, "the same rows give the same figures, the bootstrap included"
    longer = length_controlled(case["preferences"], [3 * v for v in case["lengths"]], [3 * v for v in case["lengths_base"]])
    assert longer.win_rate == pytest.approx(found.win_rate, abs=1e-9), "the unit of length does not matter"


def test_sides_exchanged_the_win_rates_add_up() -> None:
    case = judged(quality=0.4, pull=-1.5)
    other = length_controlled([1 - p for p in case["preferences"]], case["lengths_base"], case["lengths"])
    assert other.win_rate + length_controlled(**case).win_rate == pytest.approx(100, abs=1e-6)


def test_a_row_without_verdict_is_not_fitted_but_counts_in_the_mean() -> None:
    case, n = judged(n=60, quality=0.0, pull=-1.0), 60
    difficulty = np.linspace(-1, 2, n).tolist()
    case["preferences"][5] = None
    found = length_controlled(**case, difficulty=difficulty)
    w = np.array([found.length, found.difficulty, found.model])
    at_equal = 100 / (1 + np.exp(-(w[1] * np.array(difficulty) + w[2])))
    assert found.n == 59 and found.win_rate == pytest.approx(at_equal.mean())
    assert found.standard_error == pytest.approx(at_equal.std(ddof=1) / math.sqrt(60))


def test_gamed_rows_pull_at_a_tenth_of_the_weight() -> None:
    case = judged(n=50, quality=0.2, pull=-0.5)
    gamed = Gamed(np.full(20, 0.9), np.full(20, -1.0), np.zeros(20))
    with_them = length_controlled(**case, difficulty=[0.0] * 50, gamed=gamed)
    assert with_them.length < length_controlled(**case).length
    delta = standardised(np.array(case["lengths_base"], np.float64) - case["lengths"])
    x = np.concatenate([np.column_stack([np.full(20, np.tanh(-1.0)), np.zeros((20, 2))]),
                        np.column_stack([np.tanh(delta), np.zeros(50), np.ones(50)])])  # fmt: skip
    rows = Rows(x, np.array([0.9] * 20 + case["preferences"]), np.array([0.1] * 20 + [1.0] * 50))
    assert with_them.length == pytest.approx(fit(rows, with_them.strength)[0], abs=1e-8)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_hard_cases_have_finite_figures(p: float) -> None:
    random = np.random.default_rng(0)
    found = length_controlled([p] * 30, random.integers(1, 99, 30).tolist(), random.integers(1, 99, 30).tolist())
    assert 0 <= found.low <= found.win_rate <= found.high <= 100
    assert found.win_rate == pytest.approx(100 * p, abs=5)
    same = length_controlled([p] * 30, [7] * 30, [7] * 30)
    assert same.length == 0 and same.win_rate == pytest.approx(100 * p, abs=5)


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(DataError, match="9 rows have a preference, expected 10 or more"):
        length_controlled([0.5] * 9 + [None, 2.0], [1] * 11, [2] * 11)
    with pytest.raises(DataError, match="every answer is 5 characters longer than the baseline's"):
        length_controlled([0.5] * 20, [15] * 20, [10] * 20)
