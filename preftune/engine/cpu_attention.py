"""Attention of a packed forest on a CPU, by matrix products of blocks of queries over the keys that they see.

torch's own kernel for a CPU reaches a sixth of a matrix product's speed in float32, and keeps a copy of the prompt's keys and
values for each branch. Here a block of queries meets the keys of its prompt and those of its branch up to its end, so that most
of what causality hides is never computed, and queries, keys and values are all that is kept for the backward pass: the
probabilities are made again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function

from preftune.engine.batch import TreeSpan
from preftune.engine.linear import product_t

_BLOCK = 256  # queries that meet their keys at once


class Piece(NamedTuple):
    """Consecutive tokens, each of which sees those of a prefix and those of the piece that are not later."""

    prefix: slice
    rows: slice
    asked: slice  # the rows among these whose queries are answered

    def gathered(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "m D"]:
        """Rows of the prefix and of the piece."""
        return torch.cat([x[self.prefix], x[self.rows]])

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Rows of a block, and how many of the gathered keys its last row sees."""
        n = self.asked.stop - self.asked.start
        parts = math.ceil(n / _BLOCK)
        before = self.prefix.stop - self.prefix.start - self.rows.start
        for i in range(parts):
            first, end = self.asked.start + n * i // parts, self.asked.start + n * (i + 1) // parts
            yield slice(first, end), before + end


def pieces(spans: Sequence[TreeSpan], rows: NDArray[np.int64] | None = None) -> list[Piece]:
    """The forest cut into pieces. Where only `rows` (ascending) are read, each answers from its first of them to its last."""

    def piece(prefix: slice, own: slice) -> Piece:
        if rows is None:
            return Piece(prefix, own, own)
        inside = rows[np.searchsorted(rows, own.start) : np.searchsorted(rows, own.stop)].tolist()
        return Piece(prefix, own, slice(inside[0], inside[-1] + 1) if inside else slice(own.start, own.start))

    found = []
    at = 0
    for span in spans:
        prompt = slice(at, at + span.prompt)
        at = prompt.stop + (span.branches[0] if span.branches else 0)
        found.append(piece(slice(at, at), slice(prompt.start, at)))  # the first branch stands right after its prompt
        for n in span.branches[1:]:
            if n:
                found.append(piece(prompt, slice(at, at + n)))
            at += n
    return found


def _later(like: Tensor) -> Tensor:
    """-inf where a key of a block is later than its query."""
    return like.new_full((_BLOCK, _BLOCK), -math.inf).triu_(1)


def _probabilities(query: Tensor, keys: Tensor, later: Tensor) -> Tensor:
    """[n, m] softmax over the keys; the last n keys are the queries' own tokens."""
    scores = product_t(query, keys, least=0)
    n = len(query)
    scores[:, -n:] += later[:n, :n]
    return torch.softmax(scores, 1, out=scores)


class BlockAttention(Function):
    """(query [H T D], key [G T D], value [G T E], pieces, scale) -> [T H E] in float32 or float64, 0 where not asked."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, forest: Sequence[Piece], scale: float) -> Tensor:
        """Blocks of one head after another."""
        ctx.save_for_backward(query, key, value)
        ctx.forest, ctx.scale = forest, scale
        heads, group, later = len(query), len(query) // len(key), _later(query)
        out = query.new_zeros(query.shape[1], heads, value.shape[-1])
        for piece in forest:
            for g in range(len(key)):
                keys, values = piece.gathered(key[g]), piece.gathered(value[g])
                for h in range(g * group, (g + 1) * group):
                    for rows, seen in piece.blocks():
                        p = _probabilities(query[h, rows] * scale, keys[:seen], later)
                        out[rows, h] = product_t(p, values[:seen].T, least=0)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Probabilities are made again; keys of a prompt collect from all branches."""
        query, key, value = ctx.saved_tensors
        group, later = len(query) // len(key), _later(query)
        # laid out as the projections are that they go to
        grads = [torch.zeros(x.shape[1], len(x), x.shape[2], dtype=x.dtype).transpose(0, 1) for x in (query, key, value)]
        for piece in ctx.forest:
            for g in range(len(key)):
                keys, values = piece.gathered(key[g]), piece.gathered(value[g])
                grad_keys, grad_values = (torch.zeros_like(x.T, memory_format=torch.contiguous_format) for x in (keys, values))
                for h in range(g * group, (g + 1) * group):
                    for rows, seen in piece.blocks():
                        q, out = query[h, rows] * ctx.scale, grad[rows, h].contiguous()
                        p = _probabilities(q, keys[:seen], later)
                        grad_values[:, :seen] += product_t(out.T.contiguous(), p.T, least=0)
                        scores = torch._softmax_backward_data(product_t(out, values[:seen], least=0), p, 1, p.dtype)
                        grad_keys[:, :seen] += product_t(q.T.contiguous(), scores.T, least=0)
                        grads[0][h, rows] = product_t(scores, keys[:seen].T, least=0).mul_(ctx.scale)
                n = piece.prefix.stop - piece.prefix.start
                for into, found in ((grads[1], grad_keys), (grads[2], grad_values)):
                    into[g, piece.prefix] += found[:, :n].T
                    into[g, piece.rows] += found[:, n:].T
        return *grads, None, None
