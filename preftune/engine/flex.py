"""A packed forest by torch's FlexAttention: the predicate as a mask function, compiled into the kernel on CUDA.

Blocks of the [T, T] square in which nothing is visible are not computed. The map of blocks is made once a batch, for all
layers of one window; logits are capped inside the kernel. It takes every precision, and any head that its kernel compiles for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preftune.engine.attention import Forest, check_modelled, compute_dtype
from preftune.engine.batch import Batch


def flex_forest(
    module: nn.Module,
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 G T D"],
    value: Float[Tensor, "1 G T E"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: Forest | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 T H E"], None]:
    """Attention of a packed forest in one call."""
    forest = check_modelled(forest, attention_mask, dropout, others)
    blocks = forest.once(("blocks", sliding_window), lambda: _blocks(forest.batch, sliding_window))
    dtype = compute_dtype(query, value)
    out: Tensor = _function(query.device.type)(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=blocks,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None


def _blocks(batch: Batch, window: int | None) -> Any:
    """Which blocks of the square are visible, by `attention.sees` written for one query and one key."""
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    tree, branch, position = batch.tree[0], batch.branch[0], batch.position[0]
    # lambdas: torch compiles them and counts their arguments, so nothing may be wrapped around them
    masks: list[Callable[..., Tensor]] = [
        lambda row, head, query, key: (
            (tree[query] == tree[key])
            & ((branch[key] == 0) | (branch[key] == branch[query]))
            & (position[key] <= position[query])
        )
    ]
    if window is not None:
        masks.append(lambda row, head, query, key: position[query] - position[key] < window)
    n = batch.tokens.shape[1]
    return create_block_mask(and_masks(*masks), None, None, n, n, device=batch.tokens.device)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    return lambda score, row, head, query, key: softcap * torch.tanh(score / softcap)


@cache
def _function(device: str) -> Callable[..., Any]:
    """Compiled where there is a kernel for it; lengths differ from batch to batch, so they are no constants of the code."""
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    return torch.compile(function, dynamic=True) if device == "cuda" else function
