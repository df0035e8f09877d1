"""Layers on a CPU that keep less for their backward pass: norms, gated MLPs, linear layers, embeddings.

What a linear layer keeps is its input. Where that is cheap to make again (a normalised hidden state, the product of a gated
MLP), the tensor carries the recipe for it, and the layers that read it keep the recipe: three or four tensors of the width of
an MLP a token and layer become two, and the normalised states nothing.

    RMSNorm          keeps its input and one number a row
    act(g) · u       keeps g and u
    embedding        adds its gradient to the weight's where that is allowed (`inplace`)
    adapters         are part of their layer (`lora_linear`)

A module is served by what it computes, not by its name: it is run once on random numbers, and one that gives anything else is
left alone. So is whatever is not on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.func import functional_call
from torch.nn.functional import embedding as usual_embedding

from preftune.engine.inplace import Sum
from preftune.engine.linear import Recipe, fast_linear
from preftune.engine.lora_linear import is_lora_linear, lora_linear


def use_fused(model: nn.Module, on: bool) -> None:
    """Gives the layers of a model these forward passes, or their own again."""
    known: dict[Any, Callable[..., Any] | None] = {}
    for module in model.modules():
        module.__dict__.pop("forward", None) if getattr(module.forward, "__func__", None) in _OURS else None
        if not on:
            continue
        kind = (type(module), type(getattr(module, "act_fn", None)))
        if kind not in known:
            known[kind] = _served(module)
        if (forward := known[kind]) is not None:
            module.forward = MethodType(forward, module)


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module was given the forward pass of a gated MLP, which treats each row by itself."""
    return getattr(module.forward, "__func__", None) is _gated_mlp


def _served(module: nn.Module) -> Callable[..., Any] | None:
    """The forward pass that serves such a module."""
    if type(module) is nn.Linear:
        return fast_linear
    if is_lora_linear(module):
        return lora_linear if _same(module, lora_linear, module) else None
    if type(module) is nn.Embedding:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return _embedding if plain else None
    if {name for name, _ in module.named_children()} >= {"gate_proj", "up_proj", "down_proj"}:
        return _gated_mlp if _same(module, _gated_mlp, module.gate_proj) else None
    if [name for name, _ in module.named_parameters()] == ["weight"] and _eps(module) is not None:
        return next((f for f in (_rms_norm, _rms_norm_around_one) if _same(module, f, None)), None)
    return None


@torch.no_grad()
def _same(module: nn.Module, forward: Callable[..., Any], first: Any) -> bool:
    """Whether `forward` gives what the module gives, on random numbers and, for a norm, with a random weight."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    was_training = module.training
    module.eval()
    try:
        width = weight.shape[0] if first is None else first.in_features
        weights = {} if first is not None else {"weight": random(width)}
        x = random(1, 3, width) * 2
        expected = functional_call(module, weights, (x,))
        module.forward = MethodType(forward, module)
        found = functional_call(module, weights, (x,))
    except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError):
        return False
    finally:
        module.__dict__.pop("forward", None)
        module.train(was_training)
    if not isinstance(expected, Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if isinstance(expected, FakeTensor):  # no numbers, only sizes, which are those of the layer that would be served
        return True
    return float((found - expected).abs().max()) <= 8 * torch.finfo(expected.dtype).eps * float(expected.abs().max())


def _eps(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


# RMSNorm: x / sqrt(mean(x²) + eps) · w, in float32 or better


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, around_one: bool) -> tuple[Tensor, Tensor]:
        rstd = _rstd(x, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.around_one = around_one
        return _scaled(x, weight, rstd, around_one), rstd

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        unit = x.to(rstd.dtype) * rstd
        g = grad.to(rstd.dtype)
        grad_weight = (g * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = g * (weight.to(rstd.dtype) + ctx.around_one)
        g -= unit.mul_((g * unit).mean(-1, keepdim=True))
        return g.mul_(rstd).to(x.dtype), grad_weight, None, None


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(-1, keepdim=True) + eps)


def _scaled(x: Tensor, weight: Tensor, rstd: Tensor, around_one: bool) -> Tensor:
    unit = x.to(rstd.dtype) * rstd
    if around_one:
        return unit.mul_(1.0 + weight.to(rstd.dtype)).to(x.dtype)
    unit = unit.to(x.dtype)
    return unit.mul_(weight) if unit.dtype == weight.dtype else unit * weight


def _normalised(module: Any, x: Tensor, around_one: bool) -> Tensor:
    if x.device.type != "cpu":
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    weight, eps = module.weight, _eps(module)
    assert eps is not None
    if not torch.is_grad_enabled():
        return _scaled(x, weight, _rstd(x, eps), around_one)
    out, rstd = _RmsNorm.apply(x, weight, eps, around_one)  # type: ignore[no-untyped-call]
    return Recipe(partial(_scaled, around_one=around_one), x, weight, rstd).attach(out)


def _rms_norm(module: Any, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    return _normalised(module, x, False)


def _rms_norm_around_one(module: Any, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    return _normalised(module, x, True)


# act(gate) · up


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.act(leaf)
        (grad_gate,) = torch.autograd.grad(active, leaf, grad * up)
        return grad_gate, grad * active.detach(), None


def _gated_mlp(module: Any, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    if x.device.type != "cpu":
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    act, gate, up = module.act_fn, module.gate_proj(x), module.up_proj(x)
    if not torch.is_grad_enabled():
        return module.down_proj(act(gate) * up)  # type: ignore[no-any-return]
    product: Tensor = _Gated.apply(gate, up, act)  # type: ignore[no-untyped-call]
    return module.down_proj(Recipe(lambda g, u: act(g) * u, gate, up).attach(product))  # type: ignore[no-any-return]


# Embedding


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding = padding
        return usual_embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, weight = ctx.saved_tensors
        if ctx.padding is not None:  # its row does not learn from here
            grad = grad.masked_fill((ids == ctx.padding)[..., None], 0.0)
        into = Sum(weight)
        into.value.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(weight.dtype))
        return None, into.result, None


def _embedding(module: Any, ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows d"]:
    if ids.device.type != "cpu" or not (torch.is_grad_enabled() and module.weight.requires_grad):
        return nn.Embedding.forward(module, ids)
    return _Embedding.apply(ids, module.weight, module.padding_idx)  # type: ignore[no-any-return, no-untyped-call]


_OURS = {fast_linear, lora_linear, _embedding, _gated_mlp, _rms_norm, _rms_norm_around_one}
