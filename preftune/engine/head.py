"""log softmax(hidden · Wᵀ + b) at one token per row, without ever holding [rows, vocabulary] beyond a budget.

Rows and vocabulary are read in tiles, and the normaliser is summed as they come (Milakov & Gimelshein 2018, arXiv 1805.02867).
With p the softmax, the gradient of row r's logits is g_r · (onehot(target_r) − p_r), where g is one number a row, so

    d hidden_r = g_r · u_r,   u_r = W[target_r] − Σ_v p_rv W_v      u is made in the forward pass, tile by tile
    d W_v      = Σ_r g_r (onehot(target_r)_v − p_rv) hidden_r       the backward pass; a frozen head has none

Neither asks for a pass over [rows, vocabulary]: g and what a tile's softmax lacks to be the whole vocabulary's are one number a
row, and multiply the small operand. Tiles are kept for the backward pass up to `keep` bytes; those beyond are made again, which
is one matrix product more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function

from preftune.engine.inplace import Sum
from preftune.engine.linear import product_t

# Of a tile, and of its part of the weight. 16 MiB in float32: what is larger, glibc takes from the system anew each time.
_TILE_ELEMENTS = 1 << 22
_TILE_ROWS = 1 << 10
_KEEP_BYTES = 1 << 26  # short answers whole; long ones trade a product for memory
# A GPU has no cache to fit into, and wants large products: 512 MiB in float32, 2 GiB of bf16 probabilities.
_GPU_TILE_ELEMENTS = 1 << 27
_GPU_TILE_ROWS = 1 << 12
_GPU_KEEP_BYTES = 1 << 31
_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype")  # of half precision, left in float32 as they were summed: CUDA alone


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
    keep: int | None = None,
) -> Float[Tensor, "S"]:
    """Log-probability of each target in nats: float32, or float64 for a float64 model.

    keep: bytes of probabilities that may be held until the backward pass, None for what is usual on the device; the values are
    the same whatever it is.
    """
    if keep is None:
        keep = _GPU_KEEP_BYTES if hidden.is_cuda else _KEEP_BYTES
    leaves = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        return _Logps.apply(hidden, weight, bias, target, shape, keep)  # type: ignore[no-any-return, no-untyped-call]
    # by the same steps as where there is a gradient: a frozen reference is bit for bit what the policy gives before it moves
    return _forward(_Head.of(hidden, weight, bias, shape), hidden, target, unit=False, keep=0).logp


class _Tile(NamedTuple):
    """Softmax of some rows over a part of the vocabulary, times the slope of the soft-cap."""

    p: Float[Tensor, "R C"]
    log_z: Float[Tensor, "R"]  # in float64


class _Head(NamedTuple):
    """A head in the dtype of its hidden states."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None
    shape: HeadShape

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> _Head:
        """The head for these hidden states; in bf16 this copies the weight."""
        return cls(weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype), shape)

    def tiles(self, n_rows: int) -> Iterator[tuple[slice, list[slice]]]:
        """Rows, and with each of these the parts of the vocabulary. Parts of rows are about equally long."""
        cuda = self.weight.is_cuda
        (vocabulary, width), n = self.weight.shape, math.ceil(n_rows / (_GPU_TILE_ROWS if cuda else _TILE_ROWS))
        for rows in (slice(n_rows * i // n, n_rows * (i + 1) // n) for i in range(n)):
            size = max(1, (_GPU_TILE_ELEMENTS if cuda else _TILE_ELEMENTS) // max(rows.stop - rows.start, width))
            yield rows, [slice(at, min(at + size, vocabulary)) for at in range(0, vocabulary, size)]

    def logits(self, hidden: Float[Tensor, "R D"], part: slice) -> Float[Tensor, "R C"]:
        """Logits of some rows for a part of the vocabulary, in float32 or better."""
        if _WIDE_PRODUCTS and hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16):
            logits = torch.mm(hidden, self.weight[part].T, out_dtype=torch.float32)
        else:
            logits = product_t(hidden, self.weight[part])
        if self.bias is not None:
            logits += self.bias[part]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.shape.scale != 1.0:
            logits *= self.shape.scale
        if self.shape.softcap is not None:
            logits.div_(self.shape.softcap).tanh_().mul_(self.shape.softcap)
        return logits

    def tile(self, logits: Float[Tensor, "R C"], dtype: torch.dtype) -> _Tile:
        """What forward and backward pass need of these logits, in their place where the dtype is theirs.

        The normaliser is read off the likeliest token, log Z = z_max − log p_max, which loses no digit.
        """
        slope = None if self.shape.softcap is None else self._slope(logits)
        highest = logits.amax(1)
        torch.softmax(logits, 1, out=logits)
        log_z = highest.double() - logits.amax(1).double().log()
        if slope is not None:
            logits *= slope
        return _Tile(logits.to(dtype), log_z)

    def _slope(self, logits: Tensor) -> Tensor:
        """d logits / d (scale · (hidden · Wᵀ + b)), from the logits themselves."""
        assert self.shape.softcap is not None
        return 1 - (logits / self.shape.softcap) ** 2

    def target_slope(self, chosen: Float[Tensor, "R"]) -> Float[Tensor, "R"]:
        """d logit / d (hidden · Wᵀ + b) at the target, from its logit."""
        slope = torch.ones_like(chosen) if self.shape.softcap is None else self._slope(chosen)
        return slope * self.shape.scale


class _Forward(NamedTuple):
    logp: Float[Tensor, "S"]
    unit: Float[Tensor, "S D"] | None  # d logp / d hidden
    target_slope: Float[Tensor, "S"]
    log_z: Float[Tensor, "S"]  # float64
    kept: dict[tuple[int, int], _Tile]  # by first row and first token


def _forward(head: _Head, hidden: Tensor, target: Tensor, *, unit: bool, keep: int) -> _Forward:
    precise = torch.promote_types(hidden.dtype, torch.float32)
    chosen, log_z = hidden.new_zeros(len(target), dtype=precise), hidden.new_zeros(len(target), dtype=torch.float64)
    gradient = torch.empty_like(hidden) if unit else None
    kept: dict[tuple[int, int], _Tile] = {}
    for rows, parts in head.tiles(len(target)):
        h, t = hidden[rows], target[rows]
        total = torch.full_like(log_z[rows], -math.inf)
        mean = hidden.new_zeros(h.shape, dtype=precise) if unit else None  # Σ p W over what was read so far
        for part in parts:
            logits = head.logits(h, part)
            inside = (t >= part.start) & (t < part.stop)
            there = (t - part.start).clamp(0, part.stop - part.start - 1)
            chosen[rows] = torch.where(inside, logits.gather(1, there[:, None])[:, 0], chosen[rows])
            tile = head.tile(logits, hidden.dtype)
            before, total = total, torch.logaddexp(total, tile.log_z)
            if mean is not None:
                mean *= (before - total).exp().to(precise)[:, None]
                mean += product_t(tile.p, head.weight[part].T) * (tile.log_z - total).exp().to(precise)[:, None]
            if (keep := keep - tile.p.nbytes) >= 0:
                kept[rows.start, part.start] = tile
            del logits, tile
        log_z[rows] = total
        if mean is not None and gradient is not None:
            slope = head.target_slope(chosen[rows])[:, None]
            gradient[rows] = (head.weight[t] * slope - mean * head.shape.scale).to(gradient.dtype)
    return _Forward((chosen.double() - log_z).to(precise), gradient, head.target_slope(chosen), log_z, kept)


class _Logps(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shape: HeadShape, keep: int
    ) -> Tensor:
        head = _Head.of(hidden, weight, bias, shape)
        learns = any(ctx.needs_input_grad[1:3])
        made = _forward(head, hidden, target, unit=ctx.needs_input_grad[0], keep=keep if learns else 0)
        read_again = (hidden, weight, bias, target, made.log_z, made.target_slope) if learns else ()
        ctx.save_for_backward(made.unit, *read_again)
        ctx.shape, ctx.kept = shape, made.kept
        return made.logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, *read_again = ctx.saved_tensors
        grad_hidden = None if unit is None else unit * grad[:, None].to(unit.dtype)
        grad_weight, grad_bias = _learned(ctx, grad, *read_again) if read_again else (None, None)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _learned(
    ctx: Any, grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, log_z: Tensor, slope: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias."""
    head = _Head.of(hidden, weight, bias, ctx.shape)
    into = Sum(weight) if ctx.needs_input_grad[1] else None
    into_bias = Sum(bias) if bias is not None and ctx.needs_input_grad[2] else None
    for rows, parts in head.tiles(len(target)):
        h, g = hidden[rows], grad[rows]
        for part in parts:
            # each kept tile is let go as soon as it was read; a second backward pass makes it again
            kept = ctx.kept.pop((rows.start, part.start), None)
            tile = kept or head.tile(head.logits(h, part), h.dtype)
            factor = (tile.log_z - log_z[rows]).exp() * -g * head.shape.scale
            if into is not None:
                into.value[part] += product_t(tile.p.T, (h * factor[:, None].to(h.dtype)).T)
            if into_bias is not None:
                into_bias.value[part] += tile.p.T @ factor.to(tile.p.dtype)
    at_target = grad * slope
    if into is not None:
        into.value.index_add_(0, target, (hidden * at_target[:, None].to(hidden.dtype)).to(weight.dtype))
    if into_bias is not None:
        into_bias.value.index_add_(0, target, at_target.to(into_bias.value.dtype))
    return into.result if into else None, into_bias.result if into_bias else None
