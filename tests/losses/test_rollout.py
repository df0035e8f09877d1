"""Objectives on rollouts and their advantages against the papers' formulas, written out in plain Python and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.losses.advantages import gae, group_relative, leave_one_out, token_rewards, whiten
from preftune.losses.objective import losses_of
from preftune.losses.records import Replies, Rollout, Values
from preftune.losses.rollout import clipped_value, grpo, ppo, rloo

NATS = st.floats(-3, 3)
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(data: st.DataObject, n: int, low: float = -3, high: float = 3) -> list[float]:
    return data.draw(st.lists(st.floats(low, high), min_size=n, max_size=n))


def split(values: list[float], lengths: list[int]) -> list[list[float]]:
    at, parts = 0, []
    for n in lengths:
        parts.append(values[at : at + n])
        at += n
    return parts


# Advantages


@given(lengths=LENGTHS, data=st.data(), gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
@settings(max_examples=30)
def test_gae_is_the_weighted_sum_of_n_step_errors(lengths: list[int], data: st.DataObject, gamma: float, lam: float) -> None:
    """The definition, A_t = Σ_k (γλ)^k δ_{t+k}, without the recursion."""
    rewards, values = (drawn(data, sum(lengths)) for _ in range(2))
    found = gae(f64(rewards), f64(values), torch.tensor(lengths), gamma=gamma, lam=lam)
    expected = []
    for r, v in zip(split(rewards, lengths), split(values, lengths), strict=True):
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        expected += [sum((gamma * lam) ** k * delta[t + k] for k in range(len(r) - t)) for t in range(len(r))]
    assert found.advantage.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert (found.returns - found.advantage).tolist() == pytest.approx(values, abs=1e-12)


@given(lengths=LENGTHS, data=st.data())
def test_with_lambda_1_the_returns_are_the_rewards_to_go_whatever_the_critic_says(
    lengths: list[int], data: st.DataObject
) -> None:
    rewards, values = (drawn(data, sum(lengths)) for _ in range(2))
    found = gae(f64(rewards), f64(values), torch.tensor(lengths), gamma=1.0, lam=1.0)
    to_go = [sum(r[t:]) for r in split(rewards, lengths) for t in range(len(r))]
    assert found.returns.tolist() == pytest.approx(to_go, abs=1e-12)


def test_gae_by_hand() -> None:
    found = gae(f64([0.0, 1.0, 5.0]), f64([0.5, 0.25, 2.0]), torch.tensor([2, 1]), gamma=1.0, lam=0.5)
    # reply 1: δ = (0 + 0.25 − 0.5, 1 − 0.25) = (−0.25, 0.75); A = (−0.25 + 0.5·0.75, 0.75). Reply 2 sees nothing of it: 5 − 2
    assert found.advantage.tolist() == [0.125, 0.75, 3.0]
    assert found.returns.tolist() == [0.625, 1.0, 5.0]


@given(lengths=LENGTHS, data=st.data(), beta=st.sampled_from([0.0, 0.05, 2.0]))
def test_token_rewards_add_up_to_the_score_minus_beta_times_the_log_ratio(
    lengths: list[int], data: st.DataObject, beta: float
) -> None:
    logp, ref = (drawn(data, sum(lengths), -9, 0) for _ in range(2))
    score = drawn(data, len(lengths))
    found = token_rewards(f64(score), f64(logp), f64(ref), torch.tensor(lengths), beta=beta)
    parts = zip(split(found.tolist(), lengths), split(logp, lengths), split(ref, lengths), score, strict=True)
    for rewards, ours, theirs, s in parts:
        penalties = [-beta * (a - b) for a, b in zip(ours, theirs, strict=True)]
        assert rewards[:-1] == pytest.approx(penalties[:-1], abs=1e-12)
        assert rewards[-1] == pytest.approx(penalties[-1] + s, abs=1e-12)


def test_baselines_of_a_group_by_hand() -> None:
    total = f64([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert leave_one_out(total).tolist() == [[1 - 4.0, 2 - 3.5, 6 - 1.5], [0.0, 0.0, 0.0]]
    assert group_relative(total, scale=False).tolist() == [[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]
    deviation = math.sqrt((4 + 1 + 9) / 2)
    assert group_relative(total, scale=True).tolist() == [
        pytest.approx([-2 / deviation, -1 / deviation, 3 / deviation]),
        [0.0, 0.0, 0.0],
    ]


def test_whitened_is_of_mean_0_and_deviation_1_in_the_same_order() -> None:
    found = whiten(f64([3.0, -1.0, 4.0, 1.0]))
    assert found.mean().item() == pytest.approx(0, abs=1e-12) and found.square().mean().item() == pytest.approx(1, abs=1e-6)
    assert found.argsort().tolist() == [1, 3, 0, 2]
    assert whiten(f64([2.0, 2.0])).tolist() == [0.0, 0.0]


# Objectives: values and gradients


def gone_too_far(log_ratio: float, advantage: float, clip: float) -> bool:
    """Whether the ratio is beyond the clip on the side to which the advantage pulls."""
    ratio = math.exp(log_ratio)
    return ratio > 1 + clip if advantage > 0 else advantage < 0 and ratio < 1 - clip


def clipped_by_hand(log_ratio: float, advantage: float, clip: float) -> tuple[float, float]:
    """Loss and its slope in the log-ratio: 0 where the ratio has gone too far to where the advantage pulls."""
    ratio = math.exp(log_ratio)
    if clip and gone_too_far(log_ratio, advantage, clip):
        return -advantage * (1 + clip if advantage > 0 else 1 - clip), 0.0
    return -advantage * ratio, -advantage * ratio


@given(lengths=LENGTHS, data=st.data(), clip=st.sampled_from([0.0, 0.1, 0.2]))
@settings(max_examples=40)
def test_ppo(lengths: list[int], data: st.DataObject, clip: float) -> None:
    n = sum(lengths)
    logp, old, advantage = drawn(data, n, -2, 0), drawn(data, n, -2, 0), drawn(data, n)
    at = f64(logp).requires_grad_()
    found = ppo(Rollout(at, f64(old), f64(advantage)), clip=clip)
    found.loss.sum().backward()
    wanted = [clipped_by_hand(a - b, x, clip) for a, b, x in zip(logp, old, advantage, strict=True)]
    assert found.loss.tolist() == pytest.approx([w for w, _ in wanted], abs=1e-12)
    assert at.grad is not None and at.grad.tolist() == pytest.approx([g for _, g in wanted], abs=1e-12)
    stopped = [bool(clip) and gone_too_far(a - b, x, clip) for a, b, x in zip(logp, old, advantage, strict=True)]
    assert [bool(c) for c in found.clipped] == stopped


@given(lengths=LENGTHS, data=st.data(), clip=st.sampled_from([0.0, 0.2]))
@settings(max_examples=40)
def test_rloo(lengths: list[int], data: st.DataObject, clip: float) -> None:
    logp, old = (drawn(data, sum(lengths), -1, 0) for _ in range(2))
    advantage = drawn(data, len(lengths))
    at = f64(logp).requires_grad_()
    found = rloo(Replies(at, f64(old), f64(old), torch.tensor(lengths), f64(advantage)), clip=clip)
    found.loss.sum().backward()
    sums = [sum(a) - sum(b) for a, b in zip(split(logp, lengths), split(old, lengths), strict=True)]
    wanted = [clipped_by_hand(s, x, clip) for s, x in zip(sums, advantage, strict=True)]
    assert found.loss.tolist() == pytest.approx([w for w, _ in wanted], abs=1e-10)
    slopes = [g for (_, g), n in zip(wanted, lengths, strict=True) for _ in range(n)]
    assert at.grad is not None and at.grad.tolist() == pytest.approx(slopes, abs=1e-10)


def test_at_the_start_rloo_is_reinforce() -> None:
    logp = f64([-1.0, -2.0, -0.5]).requires_grad_()
    replies = Replies(logp, logp.detach(), logp.detach(), torch.tensor([2, 1]), f64([3.0, -2.0]))
    rloo(replies).loss.sum().backward()
    assert logp.grad is not None and logp.grad.tolist() == [-3.0, -3.0, 2.0], "−A ∇ log π(y|x), for every token of the reply"


@given(lengths=LENGTHS, data=st.data(), beta=st.sampled_from([0.0, 0.04, 1.0]), mean=st.booleans())
@settings(max_examples=40)
def test_grpo(lengths: list[int], data: st.DataObject, beta: float, mean: bool) -> None:
    n = sum(lengths)
    logp, old, ref = (drawn(data, n, -2, 0) for _ in range(3))
    advantage = drawn(data, len(lengths))
    at = f64(logp).requires_grad_()
    replies = Replies(at, f64(old), f64(ref), torch.tensor(lengths), f64(advantage))
    found = grpo(replies, beta=beta, lengths="mean" if mean else "sum")
    found.loss.sum().backward()
    losses, slopes = [], []
    for ours, before, theirs, x in zip(*(split(v, lengths) for v in (logp, old, ref)), advantage, strict=True):
        weight = 1 / len(ours) if mean else 1.0
        tokens = [clipped_by_hand(a - b, x, 0.2) for a, b in zip(ours, before, strict=True)]
        k3 = [math.exp(r - a) - (r - a) - 1 for a, r in zip(ours, theirs, strict=True)]
        losses.append(weight * sum(loss + beta * k for (loss, _), k in zip(tokens, k3, strict=True)))
        pulls = [beta * (1 - math.exp(r - a)) for a, r in zip(ours, theirs, strict=True)]
        slopes += [weight * (g + pull) for (_, g), pull in zip(tokens, pulls, strict=True)]
    assert found.loss.tolist() == pytest.approx(losses, abs=1e-10)
    assert at.grad is not None and at.grad.tolist() == pytest.approx(slopes, abs=1e-10)


@given(value=NATS, old=NATS, returns=NATS, clip=st.sampled_from([0.0, 0.2]))
def test_the_critic_does_not_gain_by_leaping(value: float, old: float, returns: float, clip: float) -> None:
    at = f64([value]).requires_grad_()
    loss = losses_of(clipped_value(Values(at, f64([old]), f64([returns])), clip=clip))
    near = min(max(value, old - clip), old + clip)
    plain, bounded = (value - returns) ** 2, (near - returns) ** 2 if clip else 0.0
    assert loss.item() == pytest.approx(0.5 * max(plain, bounded), abs=1e-12)
    (slope,) = torch.autograd.grad(loss.sum(), [at])
    if abs(plain - bounded) > 1e-9:
        assert slope.item() == pytest.approx(value - returns if plain > bounded else 0.0, abs=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_a_policy_that_ran_away_gives_no_nan(far: float, advantage: float) -> None:
    logp = f64([far]).requires_grad_()
    zero, one = f64([0.0]), torch.tensor([1])
    ppo(Rollout(logp, zero, f64([advantage]))).loss.sum().backward()
    rloo(Replies(logp, zero, zero, one, f64([advantage]))).loss.sum().backward()
    grpo(Replies(logp, zero, zero, one, f64([advantage]))).loss.sum().backward()
    assert logp.grad is not None and bool(logp.grad.isfinite().all())
