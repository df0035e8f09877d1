"""A batch is a forest: tokens to read once, and (source, target, owner) triples to score.

A prompt with its K responses is a tree: the prompt is read once, each response is a branch that sees the prompt and itself.
Many trees stand in one row, without padding:

    tokens    p p p p a a a b b | p p p a a b b b        two trees, two responses each
    position  0 1 2 3 4 5 6 4 5 | 0 1 2 3 4 3 4 5        each branch starts at its prompt's length
    source    index of the hidden state that predicts    target    the token id that it should predict
    owner     the response that the log-prob belongs to

There is no shift by one, no -100 and no completion mask; the K first tokens of a tree share one source. A branch's last token
predicts nothing that is scored, so it is not read at all.

The same triples serve the padded layout (`pack(..., layout="rows")`): one row per response, for models that the forest cannot
serve exactly. Only `tokens`, `position` and `source` differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.data.types import Tree
from preftune.model.device import to_device

Layout = Literal["forest", "rows"]


class TreeSpan(NamedTuple):
    """Where one tree stands in the packed row: the prompt's length, then each branch's length, in order."""

    prompt: int
    branches: tuple[int, ...]


class Units(NamedTuple):
    """What an objective may be computed over: P pairs, N labelled responses, L ranked lists of Q responses, D tokens.

    Indices are of responses, but for `shown`.
    """

    pairs: Int[Tensor, "P 2"]  # winner, loser
    confidence: Float[Tensor, "P"]
    margin: Float[Tensor, "P"]
    labelled: Int[Tensor, "N"]
    desirable: Bool[Tensor, "N"]
    ranked: Int[Tensor, "Q"]  # list after list, best first
    list_size: Int[Tensor, "L"]
    shown: Int[Tensor, "D"]  # scored tokens of demonstrations: responses that lost no pair and have no label False


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tokens to read and what to score. N rows of T tokens (N = 1 in a forest), S scored tokens, R responses.

    spans:      the trees, in order.
    units:      which responses are compared; None in a part of a batch.
    mask:       True where a token is real; None in a forest, where every token is.
    last:       flat index of each response's last token that was read (the prompt's last for an empty branch).
    """

    tokens: Int[Tensor, "N T"]
    position: Int[Tensor, "N T"]
    tree: Int[Tensor, "N T"]
    branch: Int[Tensor, "N T"]  # 0 in the prompt, k + 1 in response k of the tree
    source: Int[Tensor, "S"]  # flat index into N·T
    target: Int[Tensor, "S"]
    owner: Int[Tensor, "S"]
    last: Int[Tensor, "R"]
    n_scored: Int[Tensor, "R"]
    mask: Bool[Tensor, "N T"] | None
    spans: tuple[TreeSpan, ...]
    n_responses: int
    units: Units | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; nobody waits for its way to a GPU."""
        place = torch.device(device)
        moved: dict[str, Any] = {
            f.name: to_device(v, place) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        if self.units is not None:
            moved["units"] = Units(*(to_device(t, place) for t in self.units))
        return replace(self, **moved)


def pack(trees: Sequence[Tree], *, layout: Layout = "forest", read_last: bool = False) -> Batch:
    """Trees as one batch. With `read_last` each branch's last token is read too (for a value or reward at the end)."""
    reads = [[len(b.ids) if read_last else max(len(b.ids) - 1, 0) for b in t.branches] for t in trees]
    rows = _forest(trees, reads) if layout == "forest" else _rows(trees, reads)
    source, target, owner, last = [], [], [], []
    response = 0
    for tree, starts, tree_reads in zip(trees, rows.starts, reads, strict=True):
        for branch, (prompt_end, start), read in zip(tree.branches, starts, tree_reads, strict=True):
            at = np.flatnonzero(branch.scored)
            # token 0 of a branch is predicted by the prompt's last token, token j by the branch's token j - 1
            source.append(np.where(at == 0, prompt_end, start + at - 1))
            target.append(branch.ids[at])
            owner.append(np.full(len(at), response))
            last.append(start + read - 1 if read else prompt_end)
            response += 1
    return Batch(
        tokens=torch.from_numpy(rows.tokens),
        position=torch.from_numpy(rows.position),
        tree=torch.from_numpy(rows.tree),
        branch=torch.from_numpy(rows.branch),
        source=_flat(source),
        target=_flat(target),
        owner=_flat(owner),
        last=torch.tensor(last, dtype=torch.int64),
        n_scored=torch.tensor([int(b.scored.sum()) for t in trees for b in t.branches], dtype=torch.int64),
        mask=None if rows.mask is None else torch.from_numpy(rows.mask),
        spans=tuple(TreeSpan(len(t.prompt), tuple(r)) for t, r in zip(trees, reads, strict=True)),
        n_responses=response,
        units=_units(trees),
    )


def _units(trees: Sequence[Tree]) -> Units:
    pairs, labels, ranked, sizes, shown = [], [], [], [], []
    first = n_scored = 0
    for tree in trees:
        given = tree.labels or (None,) * len(tree.branches)
        losers = {p.loser for p in tree.pairs}
        pairs += [(first + p.winner, first + p.loser, p.confidence, p.margin) for p in tree.pairs]
        labels += [(first + k, label) for k, label in enumerate(given) if label is not None]
        order = sorted((-score, k) for k, score in enumerate(tree.scores) if not math.isnan(score))
        ranked += [first + k for _, k in order]
        sizes += [len(order)] * bool(order)
        for k, branch in enumerate(tree.branches):
            n = int(branch.scored.sum())
            if k not in losers and given[k] is not False:
                shown.append(np.arange(n_scored, n_scored + n))
            n_scored += n
        first += len(tree.branches)
    table = np.array(pairs, np.float64).reshape(-1, 4)
    return Units(
        pairs=torch.from_numpy(table[:, :2].astype(np.int64)),
        confidence=torch.from_numpy(table[:, 2].copy()),
        margin=torch.from_numpy(table[:, 3].copy()),
        labelled=torch.tensor([at for at, _ in labels], dtype=torch.int64),
        desirable=torch.tensor([label for _, label in labels], dtype=torch.bool),
        ranked=torch.tensor(ranked, dtype=torch.int64),
        list_size=torch.tensor(sizes, dtype=torch.int64),
        shown=_flat(shown),
    )


def alone(batch: Batch, response: int) -> Batch:
    """One response after its prompt, by itself and unpadded, in the layout of `batch`."""
    if batch.mask is None:
        tree, k, first = 0, response, 0
        while k >= len(batch.spans[tree].branches):
            k -= len(batch.spans[tree].branches)
            first += batch.spans[tree].prompt + sum(batch.spans[tree].branches)
            tree += 1
        span = batch.spans[tree]
        n_prompt, n = span.prompt, span.branches[k]
        start = first + n_prompt + sum(span.branches[:k])
        at = torch.cat([torch.arange(first, first + n_prompt), torch.arange(start, start + n)]).to(batch.tokens.device)
    else:
        width = batch.tokens.shape[1]
        n_prompt = int((batch.branch[response] == 0)[batch.mask[response]].sum())
        n = int(batch.mask[response].sum()) - n_prompt
        at = torch.arange(response * width, response * width + n_prompt + n, device=batch.tokens.device)
    mine = batch.owner == response
    tokens = batch.tokens.flatten()[at][None]
    return Batch(
        tokens=tokens,
        position=torch.arange(len(at), device=at.device)[None],
        tree=torch.zeros_like(tokens),
        branch=(torch.arange(len(at), device=at.device) >= n_prompt).long()[None],
        source=batch.position.flatten()[batch.source[mine]],  # a position is the index into prompt + response
        target=batch.target[mine],
        owner=torch.zeros_like(batch.owner[mine]),
        last=batch.position.flatten()[batch.last[response]][None],
        n_scored=batch.n_scored[response][None],
        mask=None if batch.mask is None else torch.ones_like(tokens, dtype=torch.bool),
        spans=(TreeSpan(n_prompt, (n,)),),
        n_responses=1,
    )


def even_rows(batch: Batch, *, least: float = 0.8) -> list[list[int]]:
    """The rows of a padded batch in groups of about equal width, so that little is padding: widest first.

    The narrowest row of a group is at least `least` of its widest.
    """
    widths = [span.prompt + n for span in batch.spans for n in span.branches]
    groups: list[list[int]] = []
    for row in sorted(range(len(widths)), key=lambda r: -widths[r]):
        if not groups or widths[row] < least * widths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


def rows_of(batch: Batch, rows: Sequence[int]) -> tuple[Batch, Int[Tensor, "s"]]:
    """Some rows of a padded batch as a batch of their width, and which scored tokens they have."""
    assert batch.mask is not None, "a forest has one row"
    widths = [span.prompt + n for span in batch.spans for n in span.branches]
    spans = [TreeSpan(span.prompt, (n,)) for span in batch.spans for n in span.branches]
    width, whole = max(widths[r] for r in rows), batch.tokens.shape[1]
    index = torch.tensor(rows, device=batch.tokens.device)
    place = torch.full((batch.n_responses,), -1, device=index.device).index_put((index,), torch.arange(len(rows)).to(index))
    scored = torch.nonzero(place[batch.owner] >= 0).flatten()

    def moved(flat: Tensor, owner: Tensor) -> Tensor:
        return place[owner] * width + flat - owner * whole

    part = Batch(
        tokens=batch.tokens[index, :width],
        position=batch.position[index, :width],
        tree=batch.tree[index, :width],
        branch=batch.branch[index, :width],
        source=moved(batch.source[scored], batch.owner[scored]),
        target=batch.target[scored],
        owner=place[batch.owner[scored]],
        last=moved(batch.last[index], index),
        n_scored=batch.n_scored[index],
        mask=batch.mask[index, :width],
        spans=tuple(spans[r] for r in rows),
        n_responses=len(rows),
    )
    return part, scored


class _Rows(NamedTuple):
    tokens: np.ndarray
    position: np.ndarray
    tree: np.ndarray
    branch: np.ndarray
    mask: np.ndarray | None
    starts: list[list[tuple[int, int]]]  # per tree and branch: flat index of the prompt's last token, of the branch's first


def _forest(trees: Sequence[Tree], reads: list[list[int]]) -> _Rows:
    tokens, position, tree_of, branch_of = [], [], [], []
    starts: list[list[tuple[int, int]]] = []
    at = 0
    for e, (tree, tree_reads) in enumerate(zip(trees, reads, strict=True)):
        n_prompt = len(tree.prompt)
        parts = [tree.prompt, *(b.ids[:read] for b, read in zip(tree.branches, tree_reads, strict=True))]
        firsts = [0] + [n_prompt] * len(tree_reads)
        tokens += parts
        position += [np.arange(first, first + len(part)) for part, first in zip(parts, firsts, strict=True)]
        tree_of.append(np.full(sum(len(p) for p in parts), e))
        branch_of += [np.full(len(part), k) for k, part in enumerate(parts)]
        prompt_end, at = at + n_prompt - 1, at + n_prompt
        starts.append([])
        for read in tree_reads:
            starts[-1].append((prompt_end, at))
            at += read
    row = [np.concatenate(part).astype(np.int64)[None] for part in (tokens, position, tree_of, branch_of)]
    return _Rows(row[0], row[1], row[2], row[3], None, starts)


def _rows(trees: Sequence[Tree], reads: list[list[int]]) -> _Rows:
    width = max(len(t.prompt) + r for t, tree_reads in zip(trees, reads, strict=True) for r in tree_reads)
    n_rows = sum(len(r) for r in reads)
    tokens = np.zeros((n_rows, width), np.int64)
    mask = np.zeros((n_rows, width), np.bool_)
    tree_of, branch_of = np.zeros_like(tokens), np.zeros_like(tokens)
    starts: list[list[tuple[int, int]]] = []
    row = 0
    for e, (tree, tree_reads) in enumerate(zip(trees, reads, strict=True)):
        n_prompt = len(tree.prompt)
        starts.append([])
        for k, (branch, read) in enumerate(zip(tree.branches, tree_reads, strict=True)):
            tokens[row, :n_prompt] = tree.prompt
            tokens[row, n_prompt : n_prompt + read] = branch.ids[:read]
            mask[row, : n_prompt + read] = True
            tree_of[row], branch_of[row, n_prompt:] = e, k + 1
            starts[-1].append((row * width + n_prompt - 1, row * width + n_prompt))
            row += 1
    position = np.broadcast_to(np.arange(width), tokens.shape).copy()
    return _Rows(tokens, position, tree_of, branch_of, mask, starts)


def _flat(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)
