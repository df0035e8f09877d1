"""Matrix products in float32 on a CPU, by oneDNN where torch's usual route (MKL) is slower.

On the processors where it was measured (docs/performance.md) the usual route runs at about half the speed of oneDNN, which
comes with the same torch. Both compute in float32. The choice depends on the build of torch and on sizes alone, never on a
timing, so that a resumed run makes the same one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear as usual_linear

_SMALLEST = 1 << 16  # weights of a matrix: below this, preparing oneDNN for each new number of rows costs more than it gains
_LEAST_WORK = 1 << 20  # multiply-adds of a product: below this a call of oneDNN takes longer than the usual route
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

# What oneDNN prepares for a product is held for each new number of rows, by oneDNN and again by torch: together some 0.6 MiB,
# up to 1,024 times, between the activations and longer than they. A micro-batch meets its own shapes layer after layer, the
# next one has others. Eight pairs of long answers are as fast with 128 as with all, with 64 their attention is not.
# Both caches read their size at the first product; whoever has set them keeps what was set.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")


def product_t(
    a: Float[Tensor, "*rows k"], b: Float[Tensor, "n k"], bias: Tensor | None = None, *, least: int | None = None
) -> Float[Tensor, "*rows n"]:
    """a · bᵀ (+ bias), without a gradient of its own; `least`: elements of b from which oneDNN is asked."""
    if _served(a, b, _SMALLEST if least is None else least):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return result
    return usual_linear(a, b, bias)


def _served(a: Tensor, b: Tensor, least: int) -> bool:
    return (
        _AVAILABLE
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and b.numel() >= least
        and a.numel() * b.shape[0] >= _LEAST_WORK
    )


class Recipe:
    """How the input of linear layers is made again, so that they need not keep it.

    It travels with the tensor. Layers that read the same tensor share it: the backward pass makes it once for all of them, and
    lets it go after the last.
    """

    _NAME = "_preftune_recipe"

    def __init__(self, make: Callable[..., Tensor], *inputs: Tensor) -> None:
        """`make(*inputs)` gives the tensor, bit for bit as it was. `inputs` are what is kept instead."""
        self.inputs = tuple(x.detach() for x in inputs)
        self.shared = _Shared(make)

    def attach(self, made: Tensor) -> Tensor:
        """`made`, from which whoever is given this very tensor can tell how it is made."""
        setattr(made, self._NAME, self)
        return made

    @classmethod
    def of(cls, x: Tensor) -> Recipe | None:
        """The recipe that a tensor carries."""
        return getattr(x, cls._NAME, None)


class _Shared:
    """What the readers of one recipe share in the backward pass. The inputs are autograd's to keep and to let go."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self.readers = 0
        self._made: Tensor | None = None

    def read(self, *inputs: Tensor) -> Tensor:
        made = self._make(*inputs) if self._made is None else self._made
        self.readers -= 1
        self._made = made if self.readers > 0 else None
        return made


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe | None) -> Tensor:
        learns = ctx.needs_input_grad[1]
        ctx.shared = recipe.shared if recipe is not None and learns else None
        if ctx.shared is not None:
            ctx.shared.readers += 1
        ctx.save_for_backward(weight, *(() if not learns else recipe.inputs if recipe is not None else (x,)))
        return product_t(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = product_t(grad, weight.T) if need_x else None
        grad_weight = None
        if need_weight:
            x = kept[0] if ctx.shared is None else ctx.shared.read(*kept)
            grad_weight = product_t(flat.T, x.reshape(-1, x.shape[-1]).T)
        return grad_x, grad_weight, flat.sum(0) if need_bias else None, None


def fast_linear(module: nn.Linear, x: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows n"]:
    """The forward pass of a linear layer."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or x.dtype != module.weight.dtype:
        return usual_linear(x, module.weight, module.bias)
    if not torch.is_grad_enabled():
        return product_t(x, module.weight, module.bias)
    return _Linear.apply(x, module.weight, module.bias, Recipe.of(x))  # type: ignore[no-any-return, no-untyped-call]
