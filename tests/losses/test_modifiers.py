"""Modifiers: other divergences, less weight on length, on-policy weights; each against its paper's formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp
from objectives_for_tests import columns, record
from oracles_for_losses import DIGITS, Row, f_prime
from torch import Tensor

from preftune.losses.dpo import dpo
from preftune.losses.modifiers import f_divergence, ld, length_margin, wpo
from preftune.losses.records import OnPolicy, Prefixes, RefPairs

DIVERGENCES = ["reverse_kl", "forward_kl", "js", 0.1, 0.5, 0.9]
LOG_RATIO = st.floats(-60, 60)
PAIR = st.tuples(st.floats(-300, 0), st.floats(-300, 0), st.floats(-300, 0), st.floats(-300, 0))


def pairs(*rows: Row, dtype: torch.dtype = torch.float64) -> RefPairs:
    made: RefPairs = record(RefPairs, columns(rows, dtype))
    return made


def same(a: RefPairs, b: RefPairs) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@given(h_w=LOG_RATIO, h_l=LOG_RATIO)
def test_a_divergence_puts_its_derivative_in_the_place_of_the_log_ratio(divergence: Any, h_w: float, h_l: float) -> None:
    before = pairs(Row(h_w, h_l))
    after = f_divergence(before, divergence=divergence)
    sides = (
        (h_w, after.chosen_log_ratio, before.chosen_logp_sum),
        (h_l, after.rejected_log_ratio, before.rejected_logp_sum),
    )
    for h, got, leaf in sides:
        with mp.workdps(DIGITS):
            value = float(f_prime(mp.exp(mp.mpf(h)), divergence))
            slope = float(mp.diff(lambda x: f_prime(mp.exp(x), divergence), mp.mpf(h), h=mp.mpf(10) ** -20))
        assert got.item() == pytest.approx(value, rel=1e-12, abs=1e-12)
        (gradient,) = torch.autograd.grad(got.sum(), leaf)
        assert gradient.item() == pytest.approx(slope, rel=1e-9, abs=1e-9)


@given(values=PAIR, other=PAIR)
def test_the_usual_divergence_changes_nothing(values: tuple[float, ...], other: tuple[float, ...]) -> None:
    before = pairs(Row(*values), Row(*other))
    assert same(f_divergence(before, divergence="reverse_kl"), before)


@given(LOG_RATIO)
def test_alpha_runs_from_the_reverse_to_the_forward_kl(h: float) -> None:
    before = pairs(Row(h))

    def log_ratio(divergence: Any) -> float:
        return f_divergence(before, divergence=divergence).chosen_log_ratio.item()

    assert log_ratio(1e-9) == pytest.approx(log_ratio("reverse_kl"), rel=1e-6, abs=1e-6)
    assert log_ratio(1 - 1e-12) == pytest.approx(log_ratio("forward_kl"), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_out_a_divergence_keeps_order_and_stays_finite(divergence: Any, dtype: torch.dtype) -> None:
    """e^10000 is no number: from where its square would overflow the value goes straight on, and so does the order of pairs."""
    rows = [Row(h, -h / 2) for h in (-1e4, -5e3, -100.0, -40.0, 0.0, 1e4)]
    before = pairs(*rows, dtype=dtype)
    after = f_divergence(before, divergence=divergence)
    loss = dpo(after, beta=0.1).loss
    loss.sum().backward()
    for x in (*after, loss, before.chosen_logp_sum.grad, before.rejected_logp_sum.grad):
        assert x is not None and x.isfinite().all() and x.square().isfinite().all()
    assert (after.chosen_log_ratio[:-1] <= after.chosen_log_ratio[1:]).all()
    assert (after.chosen_log_ratio[:2] < after.chosen_log_ratio[3]).all()


@given(values=PAIR, start=PAIR, alpha=st.floats(0, 1))
def test_ld_counts_what_is_longer_less(values: tuple[float, ...], start: tuple[float, ...], alpha: float) -> None:
    before = pairs(Row(*values))
    prefixes = Prefixes(*(torch.tensor([x], dtype=torch.float64) for x in start))
    after = ld(before, prefixes, ld_alpha=alpha)
    for got, whole, first in zip(after[:4], values, start, strict=True):
        assert got.item() == pytest.approx(first + alpha * (whole - first), rel=1e-12, abs=1e-12)
    assert after[4:] == before[4:]
    after.chosen_logp_sum.sum().backward()
    gradient = before.chosen_logp_sum.grad
    assert gradient is not None and gradient.item() == pytest.approx(alpha)


@given(values=PAIR, n_w=st.integers(1, 300), n_l=st.integers(1, 300), alpha=st.floats(0, 0.1), beta=st.floats(0.01, 1))
def test_length_margin_makes_dpo_r_dpo(values: tuple[float, ...], n_w: int, n_l: int, alpha: float, beta: float) -> None:
    """α of the paper is β times the setting."""
    row = Row(*values, float(n_w), float(n_l))
    got = dpo(length_margin(pairs(row), length_margin=alpha / beta), beta=beta).loss.item()
    inner = beta * row.h + (alpha * n_w - alpha * n_l)
    expected = math.log1p(math.exp(-inner)) if inner > 0 else -inner + math.log1p(math.exp(inner))
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_length_margin_holds_a_longer_answer_back() -> None:
    longer, shorter = Row(nw=100.0, nl=50.0), Row(nw=50.0, nl=100.0)
    loss = dpo(length_margin(pairs(longer, shorter), length_margin=0.1), beta=0.1).loss
    assert loss[0] < math.log(2) < loss[1], "a longer winner has less to gain, a shorter one more"


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_wpo_weighs_by_both_likelihoods(chosen: float, rejected: float) -> None:
    on_policy = OnPolicy(*(torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected)))
    weights: Tensor = wpo(pairs(Row()), on_policy, wpo=True)
    assert weights.item() == pytest.approx(math.exp(chosen) * math.exp(rejected), rel=1e-12)
    assert wpo(pairs(Row()), on_policy).tolist() == [1.0]
