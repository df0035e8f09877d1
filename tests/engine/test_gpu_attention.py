"""The attentions of a GPU against the dense mask, the choice among them, and the head's tiles: on the GPU itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from preftune.engine.attention import Forest, Unmodelled, dense_attention
from preftune.engine.backends import BACKENDS, Backend, available
from preftune.engine.batch import Batch, pack
from preftune.engine.head import HeadShape, token_logps
from preftune.engine.policy import Path, Policy
from preftune.model.compile import use_compiled_layers

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # torch's compiler warns of much

MODULE: Any = nn.Identity()
CUDA = torch.device("cuda")


def installed(backend: Backend) -> Backend:
    if not backend.installed():
        pytest.skip(f"{backend.what} is not installed")
    return backend


def wide_forest(seed: int, *, n: int, k: int, longest: int) -> Batch:
    rng = np.random.default_rng(seed)
    trees = [
        tiny.random_tree(rng, prompt=int(rng.integers(1, longest)), lengths=rng.integers(0, longest, k).tolist())
        for _ in range(n)
    ]
    return pack(trees)


def inputs(batch: Batch, dtype: torch.dtype, *, width: int, heads: int, groups: int) -> list[Tensor]:
    """Numbers that `dtype` holds, in float64."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, h, batch.tokens.shape[1], width, generator=generator).to(dtype).double()
        for h in (heads, heads // groups, heads // groups)
    ]


def with_gradients(attention: Any, qkv: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    out, _ = attention(MODULE, *leaves, None, **given)
    weight = torch.linspace(-1, 2, out.numel(), device=out.device, dtype=torch.float64).reshape(out.shape)
    gradients = torch.autograd.grad((out.double() * weight).sum(), leaves)
    return [x.detach().double().cpu() for x in (out, *gradients)]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (37, None), (None, 5.0)])
@pytest.mark.parametrize(("width", "groups", "k", "longest"), [(64, 1, 2, 300), (128, 4, 5, 60), (256, 2, 1, 40)])
def test_values_and_gradients_are_those_of_the_dense_mask(
    backend: Backend,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    width: int,
    groups: int,
    k: int,
    longest: int,
) -> None:
    """The dense mask is evaluated in float64, on the numbers that the kernel is given."""
    batch = wide_forest(1, n=4, k=k, longest=longest)
    qkv = inputs(batch, dtype, width=width, heads=4, groups=groups)
    given: dict[str, Any] = {"sliding_window": window, "softcap": softcap, "scaling": width**-0.5}
    expected = with_gradients(dense_attention, qkv, given | {"forest": Forest(batch)})
    there = batch.to(CUDA)
    try:
        found = with_gradients(installed(backend).function, [x.to(CUDA, dtype) for x in qkv], given | {"forest": Forest(there)})
    except Unmodelled as refusal:
        assert backend.name != "preftune_flex", refusal
        assert dtype == torch.float32 or softcap is not None, refusal
        return
    bound = 1.5e-2 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < bound


def model_on_gpu(name: str = "llama", **more: Any) -> Any:
    """Heads of 64, which every kernel takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, **more,
    )).to(CUDA)  # fmt: skip


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_the_fastest_that_is_installed_is_chosen_and_said(autocast: torch.dtype | None) -> None:
    trees = tiny.forest(3, n=6, k=3, longest=60)
    policy = Policy.choose(model_on_gpu(), trees, autocast=autocast)
    names = [b.name for b in available(CUDA)]
    wanted = names[0] if autocast is not None else "preftune_flex"  # flash attention takes half precision alone
    assert policy.path.attention == wanted, policy.path.why
    assert "differs from one call per branch by" in policy.path.why
    exact = Policy(policy.model, Path("rows", "model", alone=True))
    off = (policy(policy.pack(trees)) - exact(exact.pack(trees))).abs().max()
    assert float(off) < (0.1 if autocast else 1e-3)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("shape", [HeadShape(), HeadShape(0.5, 20.0)])
def test_the_head_in_half_precision_is_as_near_as_half_precision_is(learns: bool, shape: HeadShape) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 96, generator=generator).bfloat16() for n in (700, 5000))
    target = torch.randint(0, 5000, (700,), generator=generator)

    def run(h: Tensor, w: Tensor, t: Tensor) -> list[Tensor]:
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_(learns)
        logps = token_logps(h, w, t, shape=shape)
        gradients = torch.autograd.grad(logps.sum(), [h, w] if learns else [h])
        return [x.detach().double().cpu() for x in (logps, *gradients)]

    expected = run(hidden.double(), weight.double(), target)
    found = run(hidden.to(CUDA), weight.to(CUDA), target.to(CUDA))
    assert float((found[0] - expected[0]).abs().max()) < 1e-4, "logits are summed in float32 and stay there"
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-2


def test_compiled_layers_give_the_same() -> None:
    trees = tiny.forest(3, n=6, k=3, longest=60)
    policy = Policy.choose(model_on_gpu(), trees, autocast=torch.bfloat16)
    batches = [policy.pack(part) for part in (trees, trees[:3], trees[2:])]
    expected = [policy(batch).detach() for batch in batches]
    use_compiled_layers(policy.model, True)
    for batch, logps in zip(batches, expected, strict=True):
        assert float((policy(batch) - logps).detach().abs().max()) < 0.1
