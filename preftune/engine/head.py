"""log softmax(hidden · Wᵀ + b) at one token per row, without ever holding [rows, vocabulary].

The head is read in blocks of rows. The forward pass keeps one number per row (the log-sum-exp); the backward pass computes
each block's logits again. The gradient of the logits is g · (onehot(target) − softmax), so the block that is made is used at
once for the gradients of the hidden states, the weight and the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

_BLOCK_ELEMENTS = 1 << 24  # logits held at once: 64 MiB in float32


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a model does to its logits after the matrix product: scale, then soft-cap (cap · tanh(x / cap))."""

    scale: float = 1.0
    softcap: float | None = None


def token_logps(
    hidden: Float[Tensor, "S D"],
    weight: Float[Tensor, "V D"],
    target: Int[Tensor, "S"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    shape: HeadShape = HeadShape(),
) -> Float[Tensor, "S"]:
    """Log-probability of each target in nats: float32, or float64 for a float64 model."""
    result: Tensor = _TokenLogps.apply(hidden, weight, bias, target, shape)  # type: ignore[no-untyped-call]
    return result


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits += bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if shape.scale != 1.0:
        logits *= shape.scale
    if shape.softcap is not None:
        logits.div_(shape.softcap).tanh_().mul_(shape.softcap)
    return logits


class _TokenLogps(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shape: HeadShape) -> Tensor:
        w, b = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        block = max(1, _BLOCK_ELEMENTS // weight.shape[0])
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(len(target), dtype=accumulate, device=hidden.device)
        norm = torch.empty_like(logp)
        for at in range(0, len(target), block):
            rows = slice(at, at + block)
            logits = _logits(hidden[rows], w, b, shape)
            norm[rows] = torch.logsumexp(logits, dim=1)
            logp[rows] = logits.gather(1, target[rows, None])[:, 0] - norm[rows]
        ctx.save_for_backward(hidden, weight, bias, target, norm)
        ctx.shape, ctx.block = shape, block
        return logp

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, norm = ctx.saved_tensors  # type: ignore[attr-defined]
        shape, block = ctx.shape, ctx.block  # type: ignore[attr-defined]
        w, b = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for at in range(0, len(target), block):
            rows = slice(at, at + block)
            logits = _logits(hidden[rows], w, b, shape)
            capped = None if shape.softcap is None else 1 - (logits / shape.softcap) ** 2
            logits = logits.sub_(norm[rows, None]).exp_().mul_(-grad[rows, None])  # −g · softmax
            logits.scatter_add_(1, target[rows, None], grad[rows, None])
            if capped is not None:
                logits *= capped
            if shape.scale != 1.0:
                logits *= shape.scale
            block_grad = logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(block_grad, w, out=grad_hidden[rows])
            if grad_weight is not None:
                if weight.dtype == hidden.dtype:
                    grad_weight.addmm_(block_grad.T, hidden[rows])
                else:
                    grad_weight += block_grad.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += block_grad.sum(0).to(grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None
