"""Whole distributions at the scored tokens, against plain float64 on logits that are held whole."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from preftune.engine import distribution
from preftune.engine.distribution import Predictions, kl, log_collision
from preftune.engine.head import HeadShape
from preftune.engine.policy import Path, Policy
from preftune.errors import ModelError


def predictions(seed: int, shape: HeadShape, *, bias: bool, n: int = 7) -> Predictions:
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randn(*size, generator=draw, dtype=torch.float64).requires_grad_() for size in ((n, 5), (11, 5), (11,))]
    return Predictions(parts[0], parts[1], parts[2] if bias else None, shape)


def logps(p: Predictions) -> Tensor:
    logits = p.hidden @ p.weight.T + (0 if p.bias is None else p.bias)
    logits = logits * p.shape.scale
    if p.shape.softcap:
        logits = p.shape.softcap * torch.tanh(logits / p.shape.softcap)
    return logits - logits.exp().sum(1, keepdim=True).log()


@pytest.mark.parametrize("shape", [HeadShape(), HeadShape(0.5, 3.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [11, 33, 1 << 20])
def test_kl_and_collision_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, shape: HeadShape, bias: bool, block: int
) -> None:
    monkeypatch.setattr(distribution, "_BLOCK_ELEMENTS", block)
    policy, reference = predictions(0, shape, bias=bias), predictions(1, shape, bias=bias)
    p, q = logps(policy), logps(reference).detach()
    expected = (q.exp() * (q - p)).sum(1)
    factor = torch.linspace(-1, 2, 7, dtype=torch.float64)
    learns = [x for x in policy[:3] if x is not None]
    wanted = torch.autograd.grad((expected * factor).sum(), learns)  # type: ignore[arg-type]
    got = kl(reference, policy)
    assert torch.allclose(got, expected, atol=1e-12, rtol=0)
    for a, b in zip(torch.autograd.grad((got * factor).sum(), learns), wanted, strict=True):  # type: ignore[arg-type]
        assert torch.allclose(a, b, atol=1e-12, rtol=0)
    assert torch.allclose(log_collision(policy), p.exp().square().sum(1).log().detach(), atol=1e-12, rtol=0)


def test_of_itself_the_kl_is_nothing_and_of_nothing_it_is_empty() -> None:
    policy = predictions(0, HeadShape(), bias=True)
    assert kl(policy.detach(), policy).abs().max() < 1e-14
    none = predictions(0, HeadShape(), bias=True, n=0)
    assert kl(none.detach(), none).shape == log_collision(none).shape == (0,)


@pytest.mark.parametrize("layout", ["forest", "rows"])
def test_they_stand_beside_the_log_probs_of_a_policy(layout: str) -> None:
    trees = tiny.forest(3, n=3)
    with tiny.Float64():
        policy = Policy(tiny.model("llama"), Path(layout, "own"))  # type: ignore[arg-type]
        batch = policy.pack(trees)
        logp, collision = policy(batch, beside=(log_collision,))
        assert torch.allclose(logp, policy(batch), atol=1e-12)
        found = policy.predictions(batch)
        assert torch.allclose(collision, logps(found).exp().square().sum(1).log(), atol=1e-12)
        assert torch.allclose(logps(found).gather(1, batch.target[:, None])[:, 0], logp, atol=1e-12)


def test_a_path_without_our_head_says_that_it_cannot() -> None:
    policy = Policy(tiny.model("llama"), Path("rows", "model", "its head carries an adapter"))
    with pytest.raises(ModelError, match="whole distributions .* its head carries an adapter"):
        policy(policy.pack(tiny.forest(3, n=2)), beside=(log_collision,))
