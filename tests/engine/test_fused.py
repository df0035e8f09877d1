"""Layers that keep less give what the model's own give, values and gradients, and serve only what they model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from preftune.config import Lora
from preftune.engine.fused import use_fused
from preftune.engine.inplace import gradients_in_place
from preftune.engine.policy import Path, Policy
from preftune.model.lora import add_lora

TREES = tiny.forest(3, n=3)


def served(model: nn.Module) -> dict[str, str]:
    """Name of a module's class, and of the forward pass that it was given."""
    return {type(m).__name__: m.forward.__func__.__name__ for m in model.modules() if "forward" in m.__dict__}


def test_what_is_recognised() -> None:
    found = {name: set(served(Policy(tiny.model(name, dtype=torch.float32), Path("forest", "own")).model).values())
             for name in ("llama", "gemma2", "qwen3", "gpt2", "cohere")}  # fmt: skip
    # gemma2's embedding is more than a table, cohere's norm subtracts the mean, gpt2 has neither
    usual = {"fast_linear", "_embedding", "_gated_mlp"}
    assert found == {
        "llama": usual | {"_rms_norm"},
        "qwen3": usual | {"_rms_norm"},
        "gemma2": {"fast_linear", "_gated_mlp", "_rms_norm_around_one"},
        "cohere": usual,
        "gpt2": {"fast_linear", "_embedding"},
    }


class Shifted(nn.Module):
    """Looks like an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-6) * self.weight


def test_a_module_that_computes_something_else_is_left_alone() -> None:
    model = nn.Sequential(Shifted(), tiny.model("llama", dtype=torch.float32))
    mlp = model[1].model.layers[0].mlp

    class Doubled(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * 2

    model[1].model.layers[1].mlp.__class__ = Doubled
    use_fused(model, True)
    assert "forward" in mlp.__dict__ and "Doubled" not in served(model) and "Shifted" not in served(model)
    use_fused(model, False)
    assert served(model) == {}


def test_float64_is_not_served_where_the_model_computes_in_float32() -> None:
    """transformers' RMSNorm does, and the policy would not be the model any more."""
    assert "LlamaRMSNorm" not in served(Policy(tiny.model("llama"), Path("forest", "own")).model)
    with tiny.Float64():
        assert "LlamaRMSNorm" in served(Policy(tiny.model("llama"), Path("forest", "own")).model)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma2", "llama-bias"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_are_the_models_own(name: str, lora: bool, in_place: bool) -> None:
    model = tiny.model(name, pad_token_id=3)
    if lora:
        model._preftune_inference_attention = "eager"
        model = add_lora(model, Lora(r=3), base="base", seed=0).double()
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_B" in key:
                    p.normal_()
    with tiny.Float64():
        policy = Policy(model, Path("forest", "own")).eval()
        batch = policy.pack(TREES)

        def gradients(on: bool) -> tuple[Tensor, dict[str, Tensor]]:
            use_fused(policy, on)
            found = []
            for _ in range(2):  # two micro-batches: the second adds to the first
                found.append(policy(batch))
                with gradients_in_place(in_place):
                    found[-1].square().mean().backward()
            return found[0].detach(), tiny.gradients(policy)

        (ours, mine), (own, theirs) = gradients(True), gradients(False)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-11)
    assert tiny.relative(mine, theirs) < 1e-12


def kept(policy: Policy, batch: Any) -> int:
    """Bytes that the body keeps for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy._hidden(batch, batch.source)
    return sum(found.values())


@pytest.mark.parametrize("lora", [False, True])
def test_less_is_kept(lora: bool) -> None:
    model = tiny.model("llama", dtype=torch.float32, hidden_size=64, intermediate_size=192)
    if lora:
        model._preftune_inference_attention = "sdpa"
        model = add_lora(model, Lora(r=2), base="base", seed=0)
    policy = Policy(model, Path("forest", "own"))
    batch = policy.pack(tiny.forest(1, n=8, longest=40))
    lean = kept(policy, batch)
    use_fused(policy, False)
    assert lean < 0.7 * kept(policy, batch)


def test_a_second_backward_pass_is_the_same() -> None:
    policy = Policy(tiny.model("llama", dtype=torch.float32), Path("forest", "own"))
    logps = policy(policy.pack(TREES)).sum()
    leaves = list(policy.parameters())
    first, second = (torch.autograd.grad(logps, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_kept_and_then_changed_is_noticed() -> None:
    """The recipe's inputs are autograd's, which counts their changes."""
    norm = tiny.model("llama", dtype=torch.float32).model.norm
    layer = nn.Linear(32, 4)
    use_fused(nn.ModuleList([norm, layer]), True)
    x = torch.randn(3, 32, requires_grad=True) * 1
    out: Callable[..., Any] = layer(norm(x)).sum().backward
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out()


def test_sizes_without_numbers_pass_through() -> None:
    """A policy of made-up tensors keeps what a real one keeps, so that memory can be told before there are weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = Policy(AutoModelForCausalLM.from_config(tiny.config("llama")), Path("forest", "own"))
        assert "LlamaRMSNorm" in served(policy)
        policy(policy.pack(TREES)).sum().backward()
