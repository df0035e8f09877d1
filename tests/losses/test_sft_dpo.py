from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.losses.dpo import dpo
from preftune.losses.records import RefPairs, Tokens
from preftune.losses.sft import sft

NATS = st.floats(-500, 0)


def one(chosen: float, rejected: float, ref_chosen: float = 0.0, ref_rejected: float = 0.0) -> RefPairs:
    values = (chosen, rejected, ref_chosen, ref_rejected, 3.0, 4.0)
    return RefPairs(*(torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in values))


@given(NATS, NATS, NATS, NATS, st.floats(0.001, 2), st.floats(0, 0.49))
def test_dpo_is_the_formula(w: float, lo: float, rw: float, rl: float, beta: float, smoothing: float) -> None:
    def minus_log_sigmoid(x: float) -> float:
        return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))

    h = (w - rw) - (lo - rl)
    expected = (1 - smoothing) * minus_log_sigmoid(beta * h) + smoothing * minus_log_sigmoid(-beta * h)
    got = dpo(one(w, lo, rw, rl), beta=beta, label_smoothing=smoothing).loss
    assert got.shape == (1,)
    assert got.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(st.floats(-20, 20), st.floats(0.01, 1), st.floats(0, 0.49))
def test_dpo_pulls_by_how_wrong_it_is(h: float, beta: float, smoothing: float) -> None:
    """d loss / d log π(y_w|x) = −β(σ(−βh) − ε), and the opposite for y_l; nothing else gets a gradient of another size."""
    pairs = one(h, 0.0)
    dpo(pairs, beta=beta, label_smoothing=smoothing).loss.sum().backward()
    expected = -beta * (1 / (1 + math.exp(beta * h)) - smoothing)
    grads = [x.grad.item() if x.grad is not None else None for x in pairs]  # type: ignore[union-attr]
    assert grads[:2] == pytest.approx([expected, -expected], abs=1e-12)
    assert grads[4:] == [None, None], "sums, not means: lengths play no part"


def test_at_the_reference_dpo_is_ln_2() -> None:
    assert dpo(one(-7.0, -9.0, -7.0, -9.0)).loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert dpo(one(-7.0, -9.0, -7.0, -9.0), label_smoothing=0.3).loss.item() == pytest.approx(math.log(2), abs=1e-15)


def test_a_larger_beta_asks_for_a_smaller_log_ratio() -> None:
    """β is the tie to the reference: at the same log-ratio a larger one is sooner content."""

    def pull(beta: float) -> float:
        pairs = one(5.0, 0.0)
        (dpo(pairs, beta=beta).loss / beta).sum().backward()
        return abs(pairs.chosen_logp_sum.grad.item())  # type: ignore[union-attr]

    assert pull(0.01) > pull(0.1) > pull(1.0)


@pytest.mark.parametrize("h", [1e4, -1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite(h: float, smoothing: float, dtype: torch.dtype) -> None:
    pairs = RefPairs(*(x.detach().to(dtype).requires_grad_() for x in one(h, 0.0)))
    value = dpo(pairs, beta=0.5, label_smoothing=smoothing).loss
    value.sum().backward()
    share = smoothing if h > 0 else 1 - smoothing
    assert value.item() == pytest.approx(share * 0.5e4, rel=1e-5)
    assert pairs.chosen_logp_sum.grad.item() == pytest.approx(math.copysign(share * 0.5, h), abs=1e-6)  # type: ignore[union-attr]


@given(st.lists(st.floats(-1e4, 0), min_size=1, max_size=9))
def test_sft_is_the_negative_log_likelihood(logps: list[float]) -> None:
    logp = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    values = sft(Tokens(logp))
    assert values.tolist() == [-x for x in logps]
    values.sum().backward()
    assert logp.grad is not None and logp.grad.tolist() == [-1.0] * len(logps)
