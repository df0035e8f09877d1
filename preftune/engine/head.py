"""log softmax(hidden · Wᵀ + b) at one token per row, without ever holding [rows, vocabulary] beyond a fixed budget.

The head is read in blocks of rows. The gradient of a block's logits is g · (onehot(target) − softmax), where g is one number a
row. What the backward pass needs is had in the cheapest exact way:

    frozen head (LoRA)    the forward pass makes d log p / d hidden at once, and the backward pass only scales it
    learning head         the first `_KEPT_ELEMENTS` probabilities are kept, those of further rows are computed again
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function

from preftune.engine.linear import product_t

_BLOCK_ELEMENTS = 1 << 23  # logits made at once: 32 MiB in float32
_KEPT_ELEMENTS = 1 << 26  # probabilities kept for the backward pass: 256 MiB in float32


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
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if learns and any(x is not None and x.requires_grad for x in (weight, bias)):
        return _LearningHead.apply(hidden, weight, bias, target, shape)  # type: ignore[no-any-return, no-untyped-call]
    head = _Head.of(hidden, weight, bias, shape)
    if learns:
        return _FrozenHead.apply(hidden, target, head)  # type: ignore[no-any-return, no-untyped-call]
    return _logps(hidden, target, head)


class _Head(NamedTuple):
    """A head in the dtype of its hidden states."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None
    shape: HeadShape

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> _Head:
        """The head for these hidden states; in bf16 this copies the weight."""
        return cls(weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype), shape)

    def blocks(self, n_rows: int) -> Iterator[slice]:
        """Rows in blocks whose logits fit."""
        size = max(1, _BLOCK_ELEMENTS // self.weight.shape[0])
        return (slice(at, at + size) for at in range(0, n_rows, size))

    def logits(self, hidden: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Logits of some rows, in float32 or better."""
        logits = product_t(hidden, self.weight)
        if self.bias is not None:
            logits += self.bias
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.shape.scale != 1.0:
            logits *= self.shape.scale
        if self.shape.softcap is not None:
            logits.div_(self.shape.softcap).tanh_().mul_(self.shape.softcap)
        return logits

    def slope(self, logits: Float[Tensor, "R V"]) -> Tensor | float:
        """d logits / d (hidden · Wᵀ + b), from the logits themselves."""
        if self.shape.softcap is None:
            return self.shape.scale
        return (1 - (logits / self.shape.softcap) ** 2) * self.shape.scale


def _logps(hidden: Tensor, target: Tensor, head: _Head) -> Tensor:
    # by the same steps as where there is a gradient: a frozen reference is bit for bit what the policy gives before it moves
    parts = [_softmax_(head.logits(hidden[rows]), target[rows]) for rows in head.blocks(len(target))]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _softmax_(logits: Tensor, target: Tensor) -> Tensor:
    """Turns logits into probabilities, in place, and returns the log-probability of each row's target.

    The normaliser is read off the likeliest token, log Z = z_max − log p_max: a target of tiny probability loses no digit.
    """
    chosen, highest = logits.gather(1, target[:, None])[:, 0], logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    return chosen - highest + logits.amax(1).log()


class _FrozenHead(Function):
    """The gradient goes to the hidden states alone, and is known up to one factor a row in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, head: _Head) -> Tensor:
        unit = torch.empty_like(hidden)
        parts = []
        for rows in head.blocks(len(target)):
            logits = head.logits(hidden[rows])
            slope = head.slope(logits)
            parts.append(_softmax_(logits, target[rows]))
            logits.neg_().scatter_add_(1, target[rows, None], torch.ones_like(parts[-1])[:, None])
            logits *= slope
            unit[rows] = product_t(logits.to(hidden.dtype), head.weight.T)
        ctx.save_for_backward(unit)
        return torch.cat(parts) if parts else _logps(hidden, target, head)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return unit * grad[:, None].to(unit.dtype), None, None


class _LearningHead(Function):
    """The gradient goes to the weight (and bias) too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shape: HeadShape) -> Tensor:
        head = _Head.of(hidden, weight, bias, shape)
        parts: list[Tensor] = []
        kept: list[Tensor] = []  # probabilities of the first blocks
        room = _KEPT_ELEMENTS if shape.softcap is None else 0  # a capped logit's slope needs the logits, not the probabilities
        for rows in head.blocks(len(target)):
            logits = head.logits(hidden[rows])
            room -= logits.numel()
            parts.append(_softmax_(logits, target[rows]))
            if room >= 0:
                kept.append(logits.to(hidden.dtype))
        logp = torch.cat(parts) if parts else _logps(hidden, target, head)
        ctx.save_for_backward(hidden, weight, bias, target, *kept)
        ctx.shape = shape
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, *kept = ctx.saved_tensors
        head = _Head.of(hidden, weight, bias, ctx.shape)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for i, rows in enumerate(head.blocks(len(target))):
            slope: Tensor | float = head.shape.scale
            if i < len(kept):
                block = kept[i] * -grad[rows, None].to(hidden.dtype)
            else:
                block = head.logits(hidden[rows])
                slope = head.slope(block)
                torch.softmax(block, 1, out=block)
                block *= -grad[rows, None]
            block.scatter_add_(1, target[rows, None], grad[rows, None].to(block.dtype))
            if not (isinstance(slope, float) and slope == 1.0):
                block *= slope
            block = block.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = product_t(block, head.weight.T)
            if need_weight and grad_weight is None:
                grad_weight = product_t(block.T, hidden[rows].T).to(weight.dtype)
            elif grad_weight is not None and weight.dtype == hidden.dtype:
                grad_weight.addmm_(block.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += block.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += block.sum(0).to(grad_bias.dtype)
        if need_weight and grad_weight is None:  # nothing was scored
            grad_weight = torch.zeros_like(weight)
        return grad_hidden, grad_weight, grad_bias, None, None
