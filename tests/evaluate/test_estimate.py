"""Intervals against their definitions, and against how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.evaluate.estimate import bootstrap, mean, wilson


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.3027), (7, 2.4469), (11, 2.2281), (31, 2.0423), (1001, 1.9623)])
def test_a_mean_has_students_interval_of_the_prompts_means(n: int, t: float) -> None:
    values = [[math.sin(i), math.cos(i * i)] for i in range(n)]
    centres = [sum(v) / 2 for v in values]
    centre = sum(centres) / n
    sd = math.sqrt(sum((c - centre) ** 2 for c in centres) / (n - 1))
    found = mean(values)
    assert found.value == pytest.approx(centre) and found.n == n
    assert found.high - found.low == pytest.approx(2 * t * sd / math.sqrt(n), rel=1e-3)


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilsons_interval_is_where_the_score_test_does_not_reject(n: int, part: float) -> None:
    right = round(2 * n * part) / 2  # ties count one half
    share, low, high, of = wilson(right, n)
    assert 0 <= low <= share <= high <= 1 and of == n
    for edge in (low, high):
        if 1e-9 < edge < 1 - 1e-9:
            assert abs(share - edge) == pytest.approx(1.959964 * math.sqrt(edge * (1 - edge) / n), rel=1e-5, abs=1e-9)


def test_nothing_measured_is_no_number() -> None:
    assert math.isnan(wilson(0.0, 0).value) and math.isnan(mean([]).value) and math.isnan(bootstrap([]).value)
    assert bootstrap([[3.0]])[:3] == (3.0, -math.inf, math.inf)


def test_bootstrap_is_seeded_draws_prompts_and_not_replies_and_agrees_with_the_t_interval_where_both_hold() -> None:
    draw = np.random.default_rng(0)
    values = [[x, x] for x in draw.normal(size=400)]
    found, again, other = bootstrap(values, seed=3), bootstrap(values, seed=3), bootstrap(values, seed=4)
    assert found == again and found != other
    expected = mean(values)
    assert found.value == expected.value
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_bootstrap_of_a_large_set_draws_in_parts_what_it_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [[float(i % 7)] for i in range(100)]
    whole = bootstrap(values, n_resamples=50)
    monkeypatch.setattr("preftune.evaluate.estimate._DRAWN_AT_ONCE", 700)
    assert bootstrap(values, n_resamples=50) == whole
