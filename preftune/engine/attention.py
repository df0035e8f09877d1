"""Who sees whom, evaluated fast, through transformers' attention interface.

One predicate defines a forest (`sees`): same tree, not later, and the prompt or the same branch. Two ways to evaluate it,
to which `varlen` and `flex` add those that need a GPU, and among which `backends` chooses:

    forest_attention   one scaled-dot-product call for prompt + first branch, one for each further branch over the keys of
                       prompt + branch: no token attends to another tree, so nothing of it is computed
    dense_attention    one call with the [T, T] mask of the predicate: the oracle, and slow

A sliding window is measured in positions of the branch. An attention feature that neither models (sinks, position biases, …)
raises `Unmodelled`, and the caller falls back to padded rows and the model's own attention.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import scaled_dot_product_attention

from preftune.engine.batch import Batch
from preftune.engine.cpu_attention import BlockAttention, pieces

FOREST, DENSE = "preftune_forest", "preftune_dense"

# what transformers passes down to attention and what does not change the scores of a forest without a cache
_HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "is_causal",
        "position_embeddings",
    }
)


_Made = TypeVar("_Made")


class Unmodelled(Exception):
    """This model's attention has a feature that the forest does not model. Internal: it selects the padded path."""


class Forest:
    """The layout of one batch, and its masks, made once for all layers."""

    def __init__(self, batch: Batch, read: Int[Tensor, "n"] | None = None) -> None:
        """`batch` is packed as a forest. Of the last layer's output only the rows `read` are read, in any order; None: all."""
        self.batch = batch
        self.spans = batch.spans
        self.asked: Int[Tensor, "m"] | None = None  # rows whose attention is asked for, ascending; None: all
        self._read = read
        self._made: dict[Hashable, Any] = {}

    def last(self) -> Forest:
        """The same for the last layer: attention is asked for only where its output is read."""
        read = self._read
        if read is None or isinstance(read, FakeTensor):  # the latter has no numbers
            return self

        def make() -> Forest:
            forest = Forest(self.batch)
            forest.asked = read.unique()
            return forest

        return self.once("last", make)

    def once(self, name: Hashable, make: Callable[[], _Made]) -> _Made:
        """What `make` gives, made at the first call for `name`."""
        if name not in self._made:
            self._made[name] = make()
        made: _Made = self._made[name]
        return made

    def branch_mask(
        self, n_before: int, n: int, window: int | None, device: torch.device
    ) -> Bool[Tensor, "{n} {n_before}+{n}"]:
        """True where query i (at position n_before + i) sees key j (at position j)."""

        def make() -> Tensor:
            query = torch.arange(n_before, n_before + n, device=device)[:, None]
            return _causal(query, torch.arange(n_before + n, device=device)[None], window)

        return self.once((n_before, n, window), make)

    def dense_mask(self, window: int | None) -> Bool[Tensor, "T T"]:
        """The predicate for every pair of tokens of the row."""
        return self.once(("dense", window), lambda: sees(self.batch, window))


def sees(batch: Batch, window: int | None = None) -> Bool[Tensor, "T T"]:
    """The definition: query i sees key j iff same tree, not later, and j in the prompt or in i's own branch."""
    tree, branch, position = batch.tree[0], batch.branch[0], batch.position[0]
    same_tree = tree[:, None] == tree[None]
    visible = (branch[None] == 0) | (branch[:, None] == branch[None])
    return same_tree & visible & _causal(position[:, None], position[None], window)


def _causal(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    allowed = key <= query
    return allowed if window is None else allowed & (query - key < window)


def forest_attention(
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
    """Attention of a packed forest, one call per branch; the first branch stands right after its prompt and shares its call."""
    forest = check_modelled(forest, attention_mask, dropout, others)
    if sliding_window is None and softcap is None and _precise_on_cpu(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        cut = forest.once("pieces", lambda: pieces(forest.spans, None if forest.asked is None else forest.asked.numpy()))
        out: Tensor = BlockAttention.apply(query[0], key[0], value[0], cut, scale)  # type: ignore[no-untyped-call]
        return out[None], None
    sizes = [n for span in forest.spans for n in _calls(span.prompt, span.branches)]
    # split, not slices: the gradient of a split is one concatenation, that of n slices is n zero-padded rows
    queries, keys, values = query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2)
    outputs = []
    at = 0
    for span in forest.spans:
        trunk_keys, trunk_values = keys[at], values[at]
        n_trunk = trunk_keys.shape[2]
        mask = None if sliding_window is None or n_trunk <= sliding_window else (0, n_trunk)
        outputs.append(_attend(queries[at], trunk_keys, trunk_values, forest, mask, sliding_window, scaling, softcap))
        prompt_keys, prompt_values = trunk_keys[:, :, : span.prompt], trunk_values[:, :, : span.prompt]
        at += 1
        for n in span.branches[1:]:
            if n:
                branch_keys = torch.cat([prompt_keys, keys[at]], dim=2)
                branch_values = torch.cat([prompt_values, values[at]], dim=2)
                shape = (span.prompt, n)
                outputs.append(
                    _attend(queries[at], branch_keys, branch_values, forest, shape, sliding_window, scaling, softcap)
                )
            at += 1
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _precise_on_cpu(*given: Tensor) -> bool:
    types = {x.dtype for x in given}
    served = types == {torch.float32} or types == {torch.float64}
    return served and given[0].device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def dense_attention(
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
    """The oracle: the same, by one [T, T] mask."""
    forest = check_modelled(forest, attention_mask, dropout, others)
    return _masked(query, key, value, forest.dense_mask(sliding_window), scaling, softcap).transpose(1, 2), None


def _calls(n_prompt: int, branches: tuple[int, ...]) -> list[int]:
    return [n_prompt + (branches[0] if branches else 0), *branches[1:]]


def check_modelled(forest: Forest | None, attention_mask: Tensor | None, dropout: float, others: dict[str, Any]) -> Forest:
    """The forest, where the call asks for nothing that a forest does not model. Raises Unmodelled otherwise."""
    if forest is None:
        raise Unmodelled("attention was called without a forest")
    if attention_mask is not None:
        raise Unmodelled("the model built an attention mask of its own")
    if dropout:
        raise Unmodelled("attention dropout")
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _HARMLESS)
    if unknown:
        raise Unmodelled(f"attention feature: {', '.join(unknown)}")
    return forest


def compute_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """The dtype of attention's products: that of autocast, which reaches no kernel by itself, else the values' own.

    Under autocast rotations leave queries and keys in float32 while values are in half precision.
    """
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    shape: tuple[int, int] | None,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """One call; `shape` (n_before, n) asks for the mask of a branch, None for plain causal attention."""
    n = query.shape[2]
    if shape is None and softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=n > 1, scale=scaling, enable_gqa=grouped)
    mask = forest.branch_mask(*(shape or (0, n)), window, query.device)
    return _masked(query, key, value, mask, scaling, softcap)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype) @ value
