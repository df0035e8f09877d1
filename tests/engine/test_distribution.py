"""Whole distributions at the scored tokens, against plain float64 on logits that are held whole."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from preftune.engine import distribution
from preftune.engine.distribution import Predictions, compare, kl, log_collision
from preftune.engine.head import HeadShape
from preftune.engine.policy import Path, Policy


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


@pytest.mark.parametrize("path", [Path("rows", "model"), Path("rows", "model", alone=True), Path("forest", "own", alone=True)])
def test_a_path_without_our_head_gives_the_same_distributions(path: Path) -> None:
    """The model's own logits then, and one response at a time where the path is so."""
    trees, model = tiny.forest(3, n=3), tiny.model("gemma2")  # whose head scales and caps
    with tiny.Float64():
        ours = Policy(model, Path("rows", "own"))
        batch = ours.pack(trees)
        expected, collision = ours(batch, beside=(log_collision,))
        policy = Policy(model, path)
        found = policy(policy.pack(trees), beside=(log_collision,))
    assert torch.allclose(found[0], expected, atol=1e-10) and torch.allclose(found[1], collision, atol=1e-10)


@pytest.mark.parametrize("block", [11, 33, 1 << 20])
def test_two_distributions_compared_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(distribution, "_BLOCK_ELEMENTS", block)
    p, q = predictions(0, HeadShape(0.5, 3.0), bias=True), predictions(1, HeadShape(), bias=False)
    target = torch.arange(7) % 11
    a, b = logps(p).detach(), logps(q).detach()
    found = compare(p, q, target)
    assert torch.allclose(found.kl, (a.exp() * (a - b)).sum(1), atol=1e-12, rtol=0)
    assert torch.allclose(found.logp, a.gather(1, target[:, None])[:, 0], atol=1e-12, rtol=0)
    assert torch.allclose(found.other_logp, b.gather(1, target[:, None])[:, 0], atol=1e-12, rtol=0)
    assert not found.kl.requires_grad
    nearly = p._replace(hidden=(p.hidden * (1 + 1e-9)).float(), weight=p.weight.float(), bias=None)  # type: ignore[union-attr]
    assert compare(nearly, nearly._replace(hidden=nearly.hidden * (1 + 1e-7)), target).kl.min() >= 0
    assert compare(
        predictions(0, HeadShape(), bias=True, n=0), predictions(0, HeadShape(), bias=True, n=0), target[:0]
    ).kl.shape == (0,)
