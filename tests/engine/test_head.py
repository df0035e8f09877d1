from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.engine import head as module
from preftune.engine.head import HeadShape, token_logps
from preftune.engine.inplace import gradients_in_place


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shape: HeadShape) -> Tensor:
    """The definition: all logits, log_softmax, gather."""
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * shape.scale
    logits = logits if shape.softcap is None else shape.softcap * torch.tanh(logits / shape.softcap)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def inputs(n: int = 11, width: int = 7, vocab: int = 13, *, bias: bool = True, seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    target = torch.randint(vocab, (n,), generator=generator)
    return made(n, width), made(vocab, width), made(vocab) if bias else None, target


@settings(max_examples=120)
@given(
    n=st.integers(0, 12),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3, 4.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    tile=st.sampled_from([1, 13, 40, 1 << 24]),
    rows=st.sampled_from([1, 3, 5, 1 << 10]),
    keep=st.sampled_from([0, 300, 1 << 26]),
    in_place=st.booleans(),
    frozen=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_equal_log_softmax(
    n: int, bias: bool, scale: float, softcap: float | None, tile: int, rows: int, keep: int, in_place: bool, frozen: bool,
    seed: int,
) -> None:  # fmt: skip
    hidden, weight, b, target = inputs(n, bias=bias, seed=seed)
    shape = HeadShape(scale, softcap)
    for x in (weight, b):
        if x is not None and frozen:
            x.requires_grad_(False)
    leaves = [x for x in (hidden, weight, b) if x is not None and x.requires_grad]
    expected = plain(hidden, weight, b, target, shape)
    out = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE_ELEMENTS", tile)
        patch.setattr(module, "_TILE_ROWS", rows)
        got = token_logps(hidden, weight, target, bias=b, shape=shape, keep=keep)
        if in_place:
            with gradients_in_place():
                got.backward(out)
            found = tuple(x.grad for x in leaves)
        else:
            found = torch.autograd.grad(got, leaves, out)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for a, e in zip(found, torch.autograd.grad(expected, leaves, out), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-10)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 26)
    hidden, weight, bias, target = inputs(5)

    def call(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return token_logps(h, w, target, bias=b, shape=HeadShape(0.7, softcap))

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: tuple[int, ...]) -> None:
    *leaves, target = inputs()
    everything = torch.autograd.grad(token_logps(leaves[0], leaves[1], target, bias=leaves[2]).sum(), leaves)
    some = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(leaves)]
    token_logps(some[0], some[1], target, bias=some[2]).sum().backward()
    for i, (leaf, expected) in enumerate(zip(some, everything, strict=True)):
        assert (leaf.grad is None) if i in frozen else torch.equal(leaf.grad, expected)


def test_a_tied_weight_gets_both_gradients() -> None:
    _, weight, _, target = inputs(6)
    tokens = torch.arange(6)
    token_logps(weight[tokens].tanh(), weight, target).sum().backward()
    tied, weight.grad = weight.grad, None
    plain(weight[tokens].tanh(), weight, None, target, HeadShape()).sum().backward()
    torch.testing.assert_close(tied, weight.grad, rtol=0, atol=1e-12)


def test_kept_or_made_again_is_the_same_bit_for_bit_and_twice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 26)
    *leaves, target = inputs()
    found = []
    for keep in (0, 200, 1 << 20):
        logps = token_logps(leaves[0], leaves[1], target, bias=leaves[2], keep=keep)
        found += [torch.autograd.grad(logps.sum(), leaves, retain_graph=True) for _ in range(2)]
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


def test_in_place_adds_to_what_is_there_and_makes_no_buffer_of_its_own() -> None:
    hidden, weight, _, target = inputs()
    token_logps(hidden, weight, target).sum().backward()
    once, buffer = weight.grad.clone(), weight.grad
    with gradients_in_place():
        token_logps(hidden, weight, target).sum().backward()
    assert weight.grad is buffer
    torch.testing.assert_close(weight.grad, 2 * once, rtol=0, atol=1e-12)


def test_without_gradients_the_same_values() -> None:
    hidden, weight, bias, target = inputs(40)
    with torch.no_grad():
        torch.testing.assert_close(
            token_logps(hidden, weight, target, bias=bias), plain(hidden, weight, bias, target, HeadShape()), rtol=0, atol=1e-12
        )


def test_extreme_logits_stay_finite() -> None:
    hidden = (torch.eye(3, dtype=torch.float32) * 1e4).requires_grad_()
    weight = torch.eye(5, 3).requires_grad_()
    logps = token_logps(hidden, weight, torch.tensor([0, 0, 4]))
    assert logps.tolist() == [0.0, -1e4, -1e4]
    logps.sum().backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that forward and backward make is counted: none has more elements than a block or the inputs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, Tensor):
                    self.n = max(self.n, x.numel())
            return result

    hidden, weight, bias, target = inputs(3000, 4, 500)
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 20_000)
    with Largest() as largest:
        token_logps(hidden, weight, target, bias=bias, shape=HeadShape(1.1, 5.0)).sum().backward()
    assert largest.n <= 20_000, "3000 × 500 logits would be 1.5 million"
    with Largest() as largest:  # the measure itself notices them
        plain(hidden, weight, bias, target, HeadShape()).sum().backward()
    assert largest.n == 1_500_000


def test_bf16_hidden_states_over_float32_weights() -> None:
    hidden, weight, _, target = inputs(200, 64, 300)
    hidden, weight = hidden.detach(), weight.detach() / 8
    low, leaf = hidden.bfloat16().requires_grad_(), weight.float().requires_grad_()
    got = token_logps(low, leaf, target)
    got.mean().backward()
    exact_hidden, exact_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = plain(exact_hidden, exact_weight, None, target, HeadShape())
    expected.mean().backward()
    assert got.dtype == torch.float32 and low.grad.dtype == torch.bfloat16 and leaf.grad.dtype == torch.float32
    assert float((got - expected).detach().abs().max()) < 0.05, "bf16 has 8 bits"
    for a, b in ((low.grad, exact_hidden.grad), (leaf.grad, exact_weight.grad)):
        assert float((a.double() - b).norm() / b.norm()) < 0.01
