"""A packed forest by variable-length flash attention: one call for all trees and branches, and no mask.

A branch is a causal sequence of its own whose first keys are the prompt's:

    row      p p p p a a a b b            queries   p p p p a a a | b b
                                          keys      p p p p a a a | p p p p b b

The first branch stands right after its prompt and is one sequence with it. Queries are the row as it is; keys and values are
the row gathered by one index. The kernel aligns its causal mask with the last query and the last key ("bottom-right"), which
is what a branch needs.

Two kernels have these semantics: torch's `varlen_attn` (docs.pytorch.org, torch.nn.attention.varlen; window_size and scale
since 2.11) and `flash_attn_varlen_func` of the package flash-attn, which also caps attention logits. Both take half
precision, heads of at most 256 and CUDA alone; what they cannot take raises `Unmodelled`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import Function

from preftune.engine.attention import Forest, Unmodelled, check_modelled, compute_dtype
from preftune.engine.batch import TreeSpan
from preftune.model.device import to_device

_LARGEST_HEAD, _HEAD_MULTIPLE = 256, 8

Kernel = Callable[..., Float[Tensor, "T H D"]]
"""(query, key, value, calls, scale, window, softcap): attention of all sequences, window in tokens and None for none."""


class Calls(NamedTuple):
    """The sequences of one variable-length call over a row of T tokens. m - 1 sequences, K keys in all.

    key:      index into the row of every key, sequence by sequence.
    own:      for each token of the row, where among the keys it stands in its own sequence.
    shared:   per further branch of a tree (first, second, …): the prompt tokens that are read again, and where those keys
              stand. No token occurs twice in one of them, so that gradients add up in one order, always.
    """

    start_q: Int[Tensor, "m"]  # int32, cumulative
    start_k: Int[Tensor, "m"]
    longest_q: int
    longest_k: int
    key: Int[Tensor, "K"]
    own: Int[Tensor, "T"]
    shared: tuple[tuple[Int[Tensor, "_"], Int[Tensor, "_"]], ...]

    def to(self, device: torch.device) -> Calls:
        """The same on another device, without waiting for it."""
        moved = (to_device(x, device) for x in (self.start_q, self.start_k, self.key, self.own))
        start_q, start_k, key, own = moved
        shared = tuple((to_device(token, device), to_device(at, device)) for token, at in self.shared)
        return Calls(start_q, start_k, self.longest_q, self.longest_k, key, own, shared)


def calls_of(spans: Sequence[TreeSpan]) -> Calls:
    """The sequences of a forest, made on the host. Branches without a token ask for nothing."""
    n_q: list[int] = []
    n_k: list[int] = []
    keys: list[NDArray[np.int64]] = []
    own: list[NDArray[np.int64]] = []
    shared: list[list[tuple[int, int, int]]] = []  # per rank of the branch: first prompt token, its key, how many
    at = n_keys = 0
    for prompt, branches in spans:
        first = at  # of the prompt
        for k, n in enumerate(branches or (0,)):
            n_before, n_new = (0, prompt + n) if k == 0 else (prompt, n)
            if not n_new:
                continue
            if n_before:
                shared += [[] for _ in range(k - len(shared))]
                shared[k - 1].append((first, n_keys, n_before))
                keys.append(np.arange(first, first + n_before))
            keys.append(np.arange(at, at + n_new))
            own.append(np.arange(n_keys + n_before, n_keys + n_before + n_new))
            n_q.append(n_new)
            n_k.append(n_before + n_new)
            at, n_keys = at + n_new, n_keys + n_before + n_new
    return Calls(
        start_q=_starts(n_q),
        start_k=_starts(n_k),
        longest_q=max(n_q),
        longest_k=max(n_k),
        key=torch.from_numpy(np.concatenate(keys)),
        own=torch.from_numpy(np.concatenate(own)),
        shared=tuple((_ranges([(token, n) for token, _, n in part]), _ranges([(key, n) for _, key, n in part]))
                     for part in shared if part),
    )  # fmt: skip


def _starts(lengths: list[int]) -> Int[Tensor, "m"]:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def _ranges(parts: list[tuple[int, int]]) -> Int[Tensor, "s"]:
    return torch.from_numpy(np.concatenate([np.arange(first, first + n) for first, n in parts]))


class Gather(Function):
    """x[calls.key] along the row. Its gradient adds the branches' shares one after another, never in a race."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "T ..."], calls: Calls) -> Float[Tensor, "K ..."]:
        """Rows of keys or values, sequence by sequence."""
        ctx.calls = calls
        return x.index_select(0, calls.key)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "K ..."]) -> tuple[Tensor, None]:
        """The shares of a token's own sequence, plus those of the further branches."""
        total = grad.index_select(0, ctx.calls.own)
        for token, at in ctx.calls.shared:
            total.index_add_(0, token, grad.index_select(0, at))
        return total, None


def attention(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """The forest's attention by one variable-length kernel, as transformers' AttentionInterface calls it."""

    def varlen_attention(
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
        forest = check_modelled(forest, attention_mask, dropout, others)
        calls = forest.once("calls", lambda: calls_of(forest.spans).to(query.device))
        dtype = compute_dtype(query, value)
        rows = [x[0].transpose(0, 1).to(dtype) for x in (query, key, value)]  # [T, H or G, D]
        if calls.shared:
            rows[1:] = (Gather.apply(x, calls) for x in rows[1:])  # type: ignore[no-untyped-call]
        window = None if sliding_window is None or sliding_window >= calls.longest_k else sliding_window
        return kernel(*rows, calls, query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap)[None], None

    return varlen_attention


def torch_kernel(
    query: Tensor, key: Tensor, value: Tensor, calls: Calls, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """torch's own kernel. It does not cap attention logits."""
    _check_kernel(query, value)
    if softcap is not None:
        raise Unmodelled("torch's variable-length attention does not cap attention logits")
    function, grouped = _torch_function()
    out: Tensor = function(
        query, key, value, calls.start_q, calls.start_k, calls.longest_q, calls.longest_k,
        scale=scale, window_size=(-1 if window is None else window - 1, 0),
        **({"enable_gqa": key.shape[1] != query.shape[1]} if grouped else {}),
    )  # fmt: skip
    return out


def flash_kernel(
    query: Tensor, key: Tensor, value: Tensor, calls: Calls, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The kernel of the package flash-attn."""
    _check_kernel(query, value)
    out: Tensor = import_module("flash_attn").flash_attn_varlen_func(
        query, key, value, calls.start_q, calls.start_k, calls.longest_q, calls.longest_k,
        softmax_scale=scale, causal=True, window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
        softcap=softcap or 0.0, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out


def torch_has_it() -> bool:
    """Whether this torch's `varlen_attn` takes a scale and a window: since 2.11."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)


def flash_has_it() -> bool:
    """Whether the package flash-attn is installed."""
    return find_spec("flash_attn") is not None


@cache
def _torch_function() -> tuple[Callable[..., Any], bool]:
    """torch's function, and whether it wants to be told of grouped heads: earlier ones take them without being told."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _check_kernel(query: Tensor, value: Tensor) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise Unmodelled(f"flash attention takes half precision, not {str(query.dtype).removeprefix('torch.')}")
    width = query.shape[-1]
    if width > _LARGEST_HEAD or width % _HEAD_MULTIPLE or value.shape[-1] != width:
        raise Unmodelled(
            f"flash attention takes heads of up to {_LARGEST_HEAD} in multiples of {_HEAD_MULTIPLE}, values as wide as keys; "
            f"here {width} and {value.shape[-1]}"
        )
