"""Matrix products in float32 on a CPU, by oneDNN where torch's usual route (MKL) is slower.

On the processors where it was measured (docs/performance.md) the usual route runs at about half the speed of oneDNN, which
comes with the same torch. Both compute in float32. The choice depends on the build of torch and on sizes alone, never on a
timing, so that a resumed run makes the same one.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear as usual_linear

_SMALLEST = 1 << 16  # weights of a matrix: below this, preparing oneDNN for each new number of rows costs more than it gains
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product_t(a: Float[Tensor, "*rows k"], b: Float[Tensor, "n k"], bias: Tensor | None = None) -> Float[Tensor, "*rows n"]:
    """a · bᵀ (+ bias), without a gradient of its own."""
    if _served(a, b):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return result
    return usual_linear(a, b, bias)


def _served(a: Tensor, b: Tensor) -> bool:
    return (
        _AVAILABLE
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and b.numel() >= _SMALLEST
        and a.numel() > 0
    )


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product_t(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = product_t(grad, weight.T) if need_x else None
        grad_weight = product_t(flat.T, x.reshape(-1, x.shape[-1]).T) if need_weight else None
        return grad_x, grad_weight, flat.sum(0) if need_bias else None


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    if not _served(x, module.weight) or torch.is_autocast_enabled(x.device.type):
        return usual_linear(x, module.weight, module.bias)
    return _Linear.apply(x, module.weight, module.bias)  # type: ignore[no-any-return, no-untyped-call]


def use_fast_products(model: nn.Module, on: bool) -> None:
    """Gives the linear layers of a model this forward pass, or their own again."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__dict__.pop("forward", None)
            if on:
                module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
