from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from preftune.data.types import Branch, Tree
from preftune.engine import cpu_attention
from preftune.engine.attention import Forest, Unmodelled, dense_attention, forest_attention, sees
from preftune.engine.batch import Batch, pack

MODULE: Any = nn.Identity()


def brute_force(
    batch: Batch, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """The definition in loops: each token attends to the tokens of its own prompt + response that are not later."""
    n_heads, n, width = query.shape[1:]
    groups = n_heads // key.shape[1]
    tree, branch, position = batch.tree[0].tolist(), batch.branch[0].tolist(), batch.position[0].tolist()
    rows = []
    for i in range(n):
        seen = [
            j for j in range(n)
            if tree[j] == tree[i] and (branch[j] == 0 or branch[j] == branch[i]) and position[j] <= position[i]
            and (window is None or position[j] > position[i] - window)
        ]  # fmt: skip
        heads = []
        for h in range(n_heads):
            scores = key[0, h // groups, seen] @ query[0, h, i] * (width**-0.5 if scaling is None else scaling)
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            heads.append(scores.softmax(0) @ value[0, h // groups, seen])
        rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


def inputs(batch: Batch, *, heads: int = 4, groups: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = batch.tokens.shape[1]
    query, key, value = (torch.randn(1, h, n, d, generator=generator, dtype=torch.float64) for h, d in
                         ((heads, 8), (heads // groups, 8), (heads // groups, 6)))  # fmt: skip
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


@settings(max_examples=60)
@given(
    plain=tiny.forests(empty=True),
    groups=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 2, 4, 100]),
    softcap=st.sampled_from([None, 0.7]),
    scaling=st.sampled_from([None, 0.9]),
    read_last=st.booleans(),
)
def test_forest_equals_dense_equals_the_definition(
    plain: tiny.Plain, groups: int, window: int | None, softcap: float | None, scaling: float | None, read_last: bool
) -> None:
    trees = tiny.grow(plain)
    batch = pack(trees, read_last=read_last)
    qkv = inputs(batch, groups=groups)
    given_ = {"scaling": scaling, "sliding_window": window, "softcap": softcap, "forest": Forest(batch)}
    expected = brute_force(batch, *qkv, scaling=scaling, window=window, softcap=softcap)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), qkv)
    for attention in (forest_attention, dense_attention):
        got, _ = attention(MODULE, *qkv, None, **given_)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad((got * weight).sum(), qkv), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_a_token_depends_on_its_own_prompt_and_branch_alone(window: int | None, softcap: float | None) -> None:
    batch = pack(tiny.forest(3, n=3, k=3))
    query, key, value = (x.detach() for x in inputs(batch))
    forest = Forest(batch)
    settings_ = {"sliding_window": window, "softcap": softcap, "forest": forest}
    before, _ = forest_attention(MODULE, query, key, value, None, **settings_)  # type: ignore[arg-type]
    seen = sees(batch, window)
    for j in range(batch.tokens.shape[1]):
        changed = [x.clone() for x in (key, value)]
        for x in changed:
            x[:, :, j] += 1.0
        after, _ = forest_attention(MODULE, query, *changed, None, **settings_)  # type: ignore[arg-type]
        moved = (after != before).any(-1).any(-1)[0]
        assert torch.equal(moved, seen[:, j]), f"token {j}"


def test_one_long_branch_without_a_mask_is_plain_causal_attention() -> None:
    tree = Tree("", np.arange(3, dtype=np.int32), (Branch(np.arange(6, dtype=np.int32), np.ones(6, np.bool_)),))
    batch = pack([tree])
    query, key, value = inputs(batch, groups=1)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    got, _ = forest_attention(MODULE, query, key, value, None, forest=Forest(batch))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def test_masks_are_made_once_for_all_layers() -> None:
    forest = Forest(pack(tiny.forest(1)))
    assert forest.dense_mask(2) is forest.dense_mask(2)
    assert forest.branch_mask(3, 2, None, torch.device("cpu")) is forest.branch_mask(3, 2, None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"forest": None}, "without a forest"),
        ({"attention_mask": torch.ones(1)}, "mask of its own"),
        ({"dropout": 0.1}, "dropout"),
        ({"s_aux": torch.ones(1)}, "s_aux"),
        ({"position_bias": torch.ones(1), "head_mask": torch.ones(1)}, "head_mask, position_bias"),
    ],
)
def test_what_is_not_modelled_is_refused(changes: dict[str, Any], what: str) -> None:
    batch = pack(tiny.forest(1))
    call = {"attention_mask": None, "forest": Forest(batch), **changes}
    for attention in (forest_attention, dense_attention):
        with pytest.raises(Unmodelled, match=what):
            attention(MODULE, *inputs(batch), **call)  # type: ignore[arg-type]


def test_transformers_knows_both() -> None:
    from transformers import AttentionInterface

    from preftune.engine.attention import DENSE, FOREST
    from preftune.engine.backends import register

    register()
    known = SimpleNamespace(**dict(AttentionInterface().items()))
    batch = pack(tiny.forest(1))
    call = {"attention_mask": None, "forest": Forest(batch)}
    for name, function in ((FOREST, forest_attention), (DENSE, dense_attention)):
        assert torch.equal(getattr(known, name)(MODULE, *inputs(batch), **call)[0], function(MODULE, *inputs(batch), **call)[0])


@pytest.mark.parametrize("block", [1, 2, 256])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_blocks_of_queries_give_the_dense_mask(block: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients in float64, with branches of no token and trees of one branch."""
    monkeypatch.setattr(cpu_attention, "_BLOCK", block)
    rng = np.random.default_rng(block)
    shapes: list[tuple[int, list[int]]] = [(3, [5, 4, 1]), (1, [1]), (2, [3, 1, 6]), (4, [1, 1])]
    batch = pack([tiny.random_tree(rng, prompt=p, lengths=n) for p, n in shapes])
    n = batch.tokens.shape[1]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, h, n, d, generator=generator, dtype=torch.float64).requires_grad_() for h, d in
              ((4, 6), (groups, 6), (groups, 5))]  # fmt: skip
    weight = torch.randn(1, n, 4, 5, generator=generator, dtype=torch.float64)
    found = []
    for attention in (forest_attention, dense_attention):
        out, _ = attention(MODULE, *leaves, None, scaling=0.3, forest=Forest(batch))  # type: ignore[arg-type]
        found.append([out, *torch.autograd.grad(out, leaves, weight)])
    assert "BlockAttention" in type(found[0][0].grad_fn.next_functions[0][0]).__name__
    for ours, dense in zip(*found, strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
