from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.diagnose.share import Z95, Z999, graded, share, wilson


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_wilson_solves_its_equation(n: int, p: float) -> None:
    """Both ends are the shares whose own standard error puts p at z."""
    for end in wilson(p, float(n), Z95):
        assert (p - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / n, abs=1e-9) or end in (0.0, 1.0)


def test_values_of_one_prompt_count_as_what_they_tell() -> None:
    apart = share([True, False] * 50, list(range(100)))
    together = share([True] * 50 + [False] * 50, [n // 10 for n in range(100)])  # ten prompts, each of one mind
    assert apart.value == together.value == 0.5
    assert (together.high - together.low) > 2.5 * (apart.high - apart.low)
    low, high = wilson(0.5, 10.0, Z95)
    assert (together.low, together.high) == (pytest.approx(low), pytest.approx(high))
    assert share([True] * 12, ["a"] * 12).low == pytest.approx(wilson(1.0, 1.0, Z95)[0])


@pytest.mark.parametrize("n", [60, 600])
def test_at_most_one_in_a_thousand_is_graded_although_it_lies_at_the_threshold(n: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.binomial(n, 0.6, 20_000)
    wrong = np.mean([wilson(c / n, float(n), Z999)[0] >= 0.6 for c in counts])
    assert wrong < 0.0012
    sure = [share([True] * c + [False] * (n - c), range(n)) for c in (math.ceil(0.85 * n), round(0.6 * n))]
    assert [graded(s, note=0.55, warning=0.6, error=0.95) for s in sure] == ["warning", "ok"]
