from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from preftune.config import Optim
from preftune.training.optim import WeightWatch, clip, learning_rate, make_optimizer


def rates(n: int, **settings: Any) -> list[float]:
    optim = Optim(lr=1.0, **settings)
    return [learning_rate(optim, step, n) for step in range(n)]


def test_constant_without_warmup() -> None:
    assert rates(3, schedule="constant", warmup=0) == [1.0, 1.0, 1.0]


def test_linear_falls_to_zero_after_the_last_step() -> None:
    assert rates(4, schedule="linear", warmup=0) == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(Optim(lr=1.0, schedule="linear", warmup=0), 4, 4) == 0.0


def test_cosine() -> None:
    assert rates(4, schedule="cosine", warmup=0) == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert learning_rate(Optim(lr=1.0, schedule="cosine", warmup=0), 4, 4) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "n", "rise"), [(0.25, 8, 2), (2, 8, 2), (1, 8, 1), (0.1, 4, 0), (0.1, 5, 0), (0.1, 10, 1)])
def test_warmup_is_a_fraction_below_one_else_a_number(schedule: str, warmup: float, n: int, rise: int) -> None:
    found = rates(n, schedule=schedule, warmup=warmup)
    assert found[:rise] == [(i + 1) / rise for i in range(rise)]
    assert found[rise] == 1.0, "the peak is reached"
    assert found[0] > 0, "the first update is not wasted"
    assert all(a >= b for a, b in zip(found[rise:], found[rise + 1 :], strict=False))


def test_a_warmup_longer_than_the_run_only_rises() -> None:
    assert rates(3, warmup=10.0) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_run_of_one_step(schedule: str) -> None:
    assert rates(1, schedule=schedule) == [1.0]


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.randn(5, generator=generator).to(dtype))
        self.experts = nn.Parameter(torch.randn(2, 3, 2, generator=generator).to(dtype))
        self.frozen = nn.Parameter(torch.ones(2, 2, dtype=dtype), requires_grad=False)


def test_matrices_decay_and_the_rest_does_not() -> None:
    model = Small()
    optimizer = make_optimizer(model, Optim(lr=1e-3, weight_decay=0.1))
    found = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert found == {id(model.matrix): 0.1, id(model.experts): 0.1, id(model.bias): 0.0}


def test_without_a_matrix_there_is_no_empty_group() -> None:
    model = Small()
    model.matrix.requires_grad_(False)
    model.experts.requires_grad_(False)
    assert len(make_optimizer(model, Optim(lr=1e-3)).param_groups) == 1


def test_updates_are_those_of_the_paper() -> None:
    """Algorithm 2 of arXiv 1711.05101 by hand, in float64, five steps at changing rates."""
    optim = Optim(lr=0.1, weight_decay=0.07, beta1=0.8, beta2=0.95, eps=1e-6, schedule="linear", warmup=0.4)
    model = Small()
    optimizer = make_optimizer(model, optim)
    by_hand = {name: p.detach().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in by_hand.items()}
    v = {name: torch.zeros_like(p) for name, p in by_hand.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        rate = learning_rate(optim, step, 5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            g = p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            m_hat, v_hat = m[name] / (1 - 0.8 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            decay = 0.07 if p.ndim > 1 else 0.0
            by_hand[name] = by_hand[name] * (1 - rate * decay) - rate * m_hat / (v_hat.sqrt() + 1e-6)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), by_hand[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("largest", "factor"), [(1.0, 1 / 5), (0.0, 1.0), (9.0, 1.0)])
def test_clipping(largest: float, factor: float) -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip(model, largest).item() == 5.0, "the norm before clipping"
    torch.testing.assert_close(model.weight.grad, torch.tensor([[3.0, 4.0]]) * factor, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "moved"), [(torch.bfloat16, 0.0), (torch.float32, 1.0)])
def test_weights_that_do_not_move_are_seen(dtype: torch.dtype, moved: float) -> None:
    """At a DPO learning rate an update is below bf16's resolution."""
    model = nn.Linear(50, 40, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(model.weight.abs() + 0.05)
    watch = WeightWatch(model)
    assert watch.moved()[0].item() == 0.0
    optimizer = make_optimizer(model, Optim(lr=1e-6))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert watch.moved()[0].item() == moved


def test_how_far_weights_have_come_is_measured_against_where_they_started() -> None:
    model = nn.Linear(30, 20, dtype=torch.float64)
    watch = WeightWatch(model)
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    with torch.no_grad():
        model.weight += torch.randn_like(model.weight)
    way = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    assert watch.moved()[1].item() == pytest.approx((way.norm() / start.norm()).item(), rel=1e-12)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert WeightWatch(model).moved()[1].item() == 0.0, "weights that start at 0 divide nothing by 0"


def test_the_watch_is_a_sample_of_every_trainable_tensor() -> None:
    model = Small()
    watch = WeightWatch(model, n=7)
    with torch.no_grad():
        model.bias += 1
        model.frozen += 1
    n = {name: -(-p.numel() // 4) for name, p in model.named_parameters() if p.requires_grad}  # 29 weights: every fourth
    assert watch.moved()[0].item() == pytest.approx(n["bias"] / sum(n.values()))
