"""oneDNN's products give what torch's own give, values and gradients, and are used only where they are meant to be."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from preftune.engine import linear as module
from preftune.engine.fused import use_fused
from preftune.engine.linear import product_t
from preftune.engine.policy import Path, Policy

needs_onednn = pytest.mark.skipif(not module._AVAILABLE, reason="this build of torch has no oneDNN linear")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALLEST", 1)


def close(found: torch.Tensor | None, exact: torch.Tensor | None) -> None:
    assert found is not None and exact is not None and found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=3e-6 * float(exact.abs().max() + 1))


_MEMORY_OF_SHAPES = """
import ctypes, torch
from preftune.engine.linear import product_t

class Heap(ctypes.Structure):
    _fields_ = [(f, ctypes.c_size_t) for f in "arena ordblks smblks hblks hblkhd usmblks fsmblks used free keep".split()]

mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo.restype = Heap
torch.set_num_threads(1)
weight, found = torch.randn(256, 256), []
for rows in range(64, 364):
    product_t(torch.randn(rows, 256), weight)
    found.append((mallinfo().used + mallinfo().hblkhd) / 2**20)
print(found[150], found[-1])
"""


@needs_onednn
@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.33"), reason="only glibc tells what is in use")
def test_numbers_of_rows_that_are_not_met_again_take_no_memory() -> None:
    caches = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    fresh = {name: value for name, value in os.environ.items() if name not in caches}
    command = [sys.executable, "-c", _MEMORY_OF_SHAPES]
    said = subprocess.run(command, env=fresh, check=True, capture_output=True, text=True, timeout=300).stdout
    after_150, after_300 = map(float, said.split())
    assert after_300 - after_150 < 10  # MiB; some 80 where all are kept


@needs_onednn
@given(
    rows=st.sampled_from([(1,), (7,), (1, 33), (2, 3, 5)]), k=st.integers(1, 40), n=st.integers(1, 40), bias=st.booleans(),
    learns=st.booleans(), strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_values_and_gradients(
    rows: tuple[int, ...], k: int, n: int, bias: bool, learns: bool, strided: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(k, n, bias=bias)
    layer.weight.requires_grad_(learns)
    oracle = copy.deepcopy(layer).double()
    x = (torch.randn(k, *rows).movedim(0, -1) if strided else torch.randn(*rows, k)).requires_grad_()
    y = x.detach().double().requires_grad_()
    out = torch.randn(*rows, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SMALLEST", 1)
        use_fused(layer, True)
        found = layer(x)
        found.backward(out)
    oracle(y).backward(out.double())
    close(found.detach(), oracle(y).detach())
    close(x.grad, y.grad)
    assert (layer.weight.grad is not None) == learns
    if learns:
        close(layer.weight.grad, oracle.weight.grad)
    if bias:
        close(layer.bias.grad, oracle.bias.grad)


def test_other_types_and_small_matrices_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*args: object) -> None:
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", unexpected)
    for dtype in (torch.float64, torch.bfloat16):
        big = torch.ones(300, 300, dtype=dtype)
        assert torch.equal(product_t(big, big), big @ big.T)
    small = torch.ones(8, 8)
    assert torch.equal(product_t(small, small), small @ small.T)
    layer = nn.Linear(300, 300)
    use_fused(layer, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 300)).dtype == torch.bfloat16


@needs_onednn
@pytest.mark.parametrize("lora", [False, True])
def test_a_policy_scores_and_learns_the_same(everywhere: None, lora: bool) -> None:
    model = tiny.model("llama", dtype=torch.float32)
    if lora:
        from preftune.config import Lora
        from preftune.model.lora import add_lora

        model._preftune_inference_attention = "sdpa"
        model = add_lora(model, Lora(r=4), base="base", seed=0)
    policy = Policy(model, Path("forest", "own"))
    assert any("forward" in m.__dict__ for m in model.modules() if type(m) is nn.Linear)
    batch = policy.pack(tiny.forest(3, n=5))
    found = policy(batch)
    found.sum().backward()
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    use_fused(policy, False)
    usual = policy(batch)
    usual.sum().backward()
    torch.testing.assert_close(found, usual, rtol=1e-5, atol=1e-5)
    for name, p in policy.named_parameters():
        if p.grad is not None:
            assert float((gradients[name] - p.grad).norm()) <= 1e-5 * float(p.grad.norm() + 1e-3), name


def test_a_copy_has_its_own_weights(everywhere: None) -> None:
    layer = nn.Linear(4, 4, bias=False)
    use_fused(layer, True)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    assert float(layer(torch.ones(4)).detach().abs().sum()) > 0
    assert float(other(torch.ones(4)).detach().abs().sum()) == 0
    use_fused(layer, False)
    assert "forward" not in layer.__dict__
