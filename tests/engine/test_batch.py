from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.types import Branch, Pair, Tree
from preftune.engine.batch import Batch, TreeSpan, alone, pack

LAYOUTS = st.sampled_from(["forest", "rows"])


def sequences(trees: Sequence[Tree]) -> list[tuple[list[int], int, list[bool]]]:
    """Per response: prompt + response, the prompt's length, which tokens of the response are scored."""
    return [(t.prompt.tolist() + b.ids.tolist(), len(t.prompt), b.scored.tolist()) for t in trees for b in t.branches]


def read(batch: Batch, flat: int) -> list[int]:
    """The tokens that the token at a flat index sees, itself the last: what its hidden state is made of."""
    n, at = divmod(flat, batch.tokens.shape[1])
    row = range(at + 1)
    seen = [
        i for i in row
        if batch.tree[n, i] == batch.tree[n, at] and batch.branch[n, i] in (0, batch.branch[n, at]) and i <= at
    ]  # fmt: skip
    assert batch.position[n, seen].tolist() == list(range(len(seen))), "positions are those of prompt + response"
    return batch.tokens[n, seen].tolist()


@given(plain=tiny.forests(empty=True), layout=LAYOUTS, read_last=st.booleans())
def test_a_source_has_read_what_comes_before_its_target(plain: tiny.Plain, layout: str, read_last: bool) -> None:
    trees = tiny.grow(plain)
    batch = pack(trees, layout=layout, read_last=read_last)  # type: ignore[arg-type]
    expected = [
        (r, ids[: p + j], ids[p + j]) for r, (ids, p, mask) in enumerate(sequences(trees)) for j, s in enumerate(mask) if s
    ]
    triples = zip(batch.owner.tolist(), batch.source.tolist(), batch.target.tolist(), strict=True)
    assert [(owner, read(batch, source), target) for owner, source, target in triples] == expected
    assert batch.n_scored.tolist() == [sum(mask) for _, _, mask in sequences(trees)]
    assert batch.n_responses == len(batch.last) == sum(len(t.branches) for t in trees)


@given(plain=tiny.forests(empty=True), layout=LAYOUTS, read_last=st.booleans())
def test_last_is_the_last_token_that_was_read(plain: tiny.Plain, layout: str, read_last: bool) -> None:
    trees = tiny.grow(plain)
    batch = pack(trees, layout=layout, read_last=read_last)  # type: ignore[arg-type]
    for (ids, n_prompt, _), last in zip(sequences(trees), batch.last.tolist(), strict=True):
        assert read(batch, last) == (ids if read_last else ids[: max(n_prompt, len(ids) - 1)])


@given(plain=tiny.forests(empty=True), read_last=st.booleans())
def test_a_forest_reads_each_prompt_once_and_pads_nothing(plain: tiny.Plain, read_last: bool) -> None:
    trees = tiny.grow(plain)
    batch = pack(trees, read_last=read_last)
    n_read = [[len(b.ids) if read_last else max(0, len(b.ids) - 1) for b in t.branches] for t in trees]
    assert batch.tokens.shape == (1, sum(len(t.prompt) + sum(n) for t, n in zip(trees, n_read, strict=True)))
    assert batch.spans == tuple(TreeSpan(len(t.prompt), tuple(n)) for t, n in zip(trees, n_read, strict=True))
    assert batch.mask is None


@given(plain=tiny.forests(empty=True))
def test_both_layouts_score_the_same(plain: tiny.Plain) -> None:
    trees = tiny.grow(plain)
    forest, rows = pack(trees), pack(trees, layout="rows")
    for name in ("target", "owner", "n_scored"):
        assert torch.equal(getattr(forest, name), getattr(rows, name)), name
    assert forest.units is not None and rows.units is not None
    assert all(torch.equal(a, b) for a, b in zip(forest.units, rows.units, strict=True))
    assert forest.n_responses == rows.n_responses == rows.tokens.shape[0]
    assert rows.mask is not None
    assert rows.mask.sum(1).tolist() == [max(p, len(ids) - 1) for ids, p, _ in sequences(trees)]
    assert not rows.tokens[~rows.mask].any()


@given(plain=tiny.forests(empty=True), layout=LAYOUTS, data=st.data())
def test_a_response_alone_is_the_batch_of_that_response(plain: tiny.Plain, layout: str, data: st.DataObject) -> None:
    trees = tiny.grow(plain)
    batch = pack(trees, layout=layout)  # type: ignore[arg-type]
    flat = [Tree("", t.prompt, (b,)) for t in trees for b in t.branches]
    response = data.draw(st.integers(0, len(flat) - 1))
    got, expected = alone(batch, response), pack([flat[response]], layout=layout)  # type: ignore[arg-type]
    for name in ("tokens", "position", "tree", "branch", "source", "target", "owner", "last", "n_scored", "mask"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is b is None) or torch.equal(a, b), name
    assert got.spans == expected.spans


def test_the_drawing_in_the_docstring() -> None:
    def tree(n_prompt: int, *lengths: int) -> Tree:
        branches = tuple(Branch(np.arange(n, dtype=np.int32), np.ones(n, np.bool_)) for n in lengths)
        return Tree("", np.arange(n_prompt, dtype=np.int32), branches, (Pair(1, 0),))

    batch = pack([tree(4, 4, 3), tree(3, 3, 4)])
    assert batch.position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch.source.tolist() == [3, 4, 5, 6, 3, 7, 8, 11, 12, 13, 11, 14, 15, 16], "the first tokens share a source"
    assert batch.units.pairs.tolist() == [[1, 0], [3, 2]]


def test_a_token_that_nothing_scores_is_no_target() -> None:
    ids, scored = np.array([5, 6, 7], np.int32), np.array([False, True, False])
    batch = pack([Tree("", np.array([1, 2], np.int32), (Branch(ids, scored),))])
    assert (batch.source.tolist(), batch.target.tolist(), batch.n_scored.tolist()) == ([2], [6], [1])


@pytest.mark.parametrize("layout", ["forest", "rows"])
def test_moving_keeps_everything(layout: str) -> None:
    batch = pack(tiny.forest(), layout=layout)  # type: ignore[arg-type]
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.units.pairs.device.type == "meta"
    assert moved.spans == batch.spans and moved.n_responses == batch.n_responses
