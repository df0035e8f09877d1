"""Each objective against its paper's formula in fifty digits: values to 1e-12, gradients to 1e-9, and never NaN or infinite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpmath import mp
from objectives_for_tests import CASES, LEARNT, Case, call, columns, defaults, plain_rows, some_parameters
from oracles_for_losses import DIGITS, Row, Rows, exact

names = pytest.mark.parametrize("name", CASES)
FAR = -1e4
EXTREME: dict[str, list[Row]] = {
    "chosen far up": [Row(-1.0, -2.0, FAR, -2.0, 3.0, 4.0)],
    "chosen far down": [Row(FAR, -2.0, -1.0, -2.0, 3.0, 4.0)],
    "rejected far up": [Row(-1.0, -2.0, -1.0, FAR, 3.0, 4.0)],
    "rejected far down": [Row(-1.0, FAR, -1.0, -2.0, 3.0, 4.0)],
    "apart": [Row(-1.0, FAR, FAR, -2.0, 1.0, 1.0, 0.7, 1.0, 1e4, 3.0)],
    "the wrong way": [Row(FAR, -1.0, -2.0, FAR, 1.0, 1.0, 0.7, 1.0, 3.0, 1e4)],
    "both far up": [Row(-1.0, -1.0, FAR, FAR, 2.0, 2.0)],
    "both far down": [Row(FAR, FAR, -1.0, -1.0, 2.0, 2.0)],
    "identical responses": [Row(-7.5, -7.5, -7.0, -7.0, 5.0, 5.0)],
    "at the reference": [Row(-7.5, -3.25, -7.5, -3.25, 5.0, 2.0)],
    "one token, nearly certain": [Row(-1e-9, -1e-12, -0.5, -0.25)],
    "one token, nearly impossible": [Row(-700.0, -900.0, -0.5, -0.25)],
    "undesirable": [Row(-1.0, -2.0, FAR, desirable=False), Row(FAR, -2.0, -1.0, desirable=False, opens=False)],
    "a far step": [
        Row(-1.0, -2.0, FAR, -2.0, 3.0, 4.0, other=1e4),
        Row(FAR, -2.0, -1.0, -2.0, 3.0, 4.0, other=1e4, desirable=False, opens=False),
        Row(-3.0, -2.0, -1.0, -2.0, 3.0, 4.0, other=-1e4, opens=False),
    ],
}
extremes = pytest.mark.parametrize("extreme", EXTREME)


# Comparisons


def expected_losses(case: Case, rows: Rows, parameters: dict[str, Any]) -> list[Any]:
    units = [exact(r) for r in rows]
    return case.oracle(units, units, **as_exact(parameters))


def as_exact(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: mp.mpf(x) if isinstance(x, float) else x for name, x in parameters.items()}


def expected_gradient(case: Case, rows: Rows, parameters: dict[str, Any], name: str, place: int) -> float:
    """d(sum of losses)/d(`name` of the unit at `place`), what is given held fast."""
    units = [exact(r) for r in rows]
    exactly = as_exact(parameters)

    def total(x: Any) -> Any:
        moved = [*units[:place], units[place]._replace(**{name: x}), *units[place + 1 :]]
        return sum(case.oracle(moved, units, **exactly))

    return float(mp.diff(total, getattr(units[place], name), h=mp.mpf(10) ** -20))


def check(name: str, rows: list[Row], parameters: dict[str, Any]) -> None:
    """Values to 1e-12 and gradients to 1e-9 of themselves or, below 1, absolutely. Parameters not named have their defaults."""
    case = CASES[name]
    parameters = defaults(case.function) | parameters
    values = columns(rows)
    found = call(case.function, values, parameters)
    with mp.workdps(DIGITS):
        wanted = [float(x) for x in expected_losses(case, rows, parameters)]
        losses = sorted(found.loss.tolist()) if case.by_rank else found.loss.tolist()
        assert losses == pytest.approx(sorted(wanted) if case.by_rank else wanted, rel=1e-12, abs=1e-12)
        found.loss.sum().backward()
        if not case.smooth(rows, **parameters):
            return
        for column in LEARNT:
            gradient = values[column].grad
            for place in range(len(rows)):
                expected = expected_gradient(case, rows, parameters, column, place)
                got = 0.0 if gradient is None else gradient[place].item()
                assert got == pytest.approx(expected, rel=1e-9, abs=1e-9), f"d/d{column}[{place}]"


@names
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
@given(data=st.data())
def test_is_its_papers_formula(name: str, data: st.DataObject) -> None:
    rows = [Row(*r) for r in data.draw(plain_rows())]
    check(name, rows, data.draw(some_parameters(CASES[name])))


@extremes
@names
def test_is_its_papers_formula_far_out(name: str, extreme: str) -> None:
    check(name, EXTREME[extreme], {})


@extremes
@names
def test_is_finite_in_float32_far_out(name: str, extreme: str) -> None:
    case = CASES[name]
    values = columns(EXTREME[extreme], torch.float32)
    found = call(case.function, values, {})
    found.loss.sum().backward()
    everything = [*found, *(values[c].grad for c in LEARNT if values[c].grad is not None)]
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in everything)


def test_no_parameter_is_left_untried() -> None:
    for name, case in CASES.items():
        assert set(defaults(case.function)) == set(case.parameters), name
