"""The adapter in one function gives what PEFT gives, and what it does not serve is PEFT's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from preftune.engine import lora_linear as fused
from preftune.engine.fused import use_fused


def adapted(*, dtype: torch.dtype = torch.float64, bias: bool = False, **config: Any) -> Any:
    """A linear layer of 5 inputs and 7 outputs with an adapter that does something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=bias)).to(dtype)
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["0"]} | config
    peft = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for p in peft.parameters():
        p.data = torch.randn_like(p)
    use_fused(peft, True)
    return peft.base_model.model[0]


def served(layer: Any, x: Tensor) -> bool:
    return layer.forward.__func__ is fused.lora_linear and fused._adapter(layer, x) is not None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 5), (2, 3, 5), (1, 0, 5)])
def test_values_and_gradients_are_the_formula(bias: bool, shape: tuple[int, ...]) -> None:
    layer = adapted(bias=bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert served(layer, x)
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ (w + 1.5 * b @ a).T + (layer.base_layer.bias if bias else 0)
    found = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), found)
    up = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, a, b), up) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_an_input_that_does_not_learn_gets_no_gradient() -> None:
    layer = adapted()
    layer(torch.randn(4, 5, dtype=torch.float64)).sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("config", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_what_has_more_than_two_matrices_is_pefts_own(config: dict[str, Any]) -> None:
    layer = adapted(bias=True, **config).eval()
    x = torch.randn(4, 5, dtype=torch.float64)
    assert served(layer, x) == ("use_rslora" in config)  # which is another factor and nothing else
    torch.testing.assert_close(layer(x), type(layer).forward(layer, x), rtol=0, atol=1e-12)


def test_off_merged_and_of_another_dtype() -> None:
    layer = adapted()
    x = torch.randn(4, 5, dtype=torch.float64)
    on = layer(x)
    layer.merge()
    assert not served(layer, x)
    torch.testing.assert_close(layer(x), on, rtol=0, atol=1e-12)
    layer.unmerge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T, rtol=0, atol=1e-12)
    layer.enable_adapters(True)
    layer.base_layer.bfloat16()
    assert not served(layer, x)
