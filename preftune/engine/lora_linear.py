"""A linear layer with a low-rank adapter on a CPU in one function: y = x Wᵀ + s · (x Aᵀ) Bᵀ, where W does not learn.

PEFT writes it as five operations, of which four make a tensor of the layer's own width and as many for their gradients. Here
what the adapter adds goes straight into the product with W, forward and backward, and x Aᵀ with its 16 columns or so is all
that is kept besides x (or the recipe for it). Several adapters at once, dropout, DoRA and the like stay PEFT's own.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from preftune.engine.linear import Recipe, product_t


class _LoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, recipe: Recipe | None
    ) -> Tensor:
        ctx.shared, ctx.scale = recipe.shared if recipe is not None else None, scale
        if ctx.shared is not None:
            ctx.shared.readers += 1
        low, out = _product(x, weight, bias, a, b, scale)
        ctx.save_for_backward(weight, a, b, low, *((x,) if recipe is None else recipe.inputs))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, low, *kept = ctx.saved_tensors
        x = kept[0] if ctx.shared is None else ctx.shared.read(*kept)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_low = product_t(flat, b.T, least=0).mul_(ctx.scale)
        # [r, n] and not [n, r]: oneDNN reads the long side of a tall product fast in one of the two alone
        grad_b = product_t(low.T, flat.T, least=0).mul_(ctx.scale).T
        grad_a = grad_low.T @ x.reshape(-1, x.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product_t(flat, weight.T).addmm_(grad_low, a).view_as(x)
        return grad_x, None, None, grad_a, grad_b, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x Aᵀ as a matrix, and the result."""
    flat = x.reshape(-1, x.shape[-1])
    low = flat @ a.T
    return low, product_t(flat, weight, bias).addmm_(low, b.T, alpha=scale).view(*x.shape[:-1], len(weight))


def is_lora_linear(module: nn.Module) -> bool:
    """Whether it is PEFT's linear layer over a plain one."""
    return hasattr(module, "lora_A") and type(module).__name__ == "Linear" and type(module.base_layer) is nn.Linear


def lora_linear(module: Any, x: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows n"]:
    """The forward pass of PEFT's linear layer, the adapter on or off."""
    found = None if module.disable_adapters else _adapter(module, x)
    if found is None:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    weight, bias = module.base_layer.weight, module.base_layer.bias
    if not torch.is_grad_enabled():
        return _product(x, weight, bias, *found)[1]
    return _LoraLinear.apply(x, weight, bias, *found, Recipe.of(x))  # type: ignore[no-any-return, no-untyped-call]


def _adapter(module: Any, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """The matrices of the one adapter that is on, and their factor; None where this is not served."""
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or module.merged or module.lora_variant or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    a, b, base = module.lora_A[active[0]], module.lora_B[active[0]], module.base_layer
    plain = {type(a), type(b)} == {nn.Linear} and b.bias is None and type(module.lora_dropout[active[0]]) is nn.Identity
    learns = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    if not plain or learns or len({x.dtype, a.weight.dtype, b.weight.dtype, base.weight.dtype}) > 1:
        return None
    return a.weight, b.weight, module.scaling[active[0]]
