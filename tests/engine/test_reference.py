from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as Folder
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.store import Store
from preftune.data.types import Branch, Pair, Tree
from preftune.engine import reference as module
from preftune.engine.policy import Path, Policy
from preftune.engine.reference import (
    Share,
    fill,
    keys_of,
    logps_of,
    missing,
    reference_store,
    response_key,
    verify,
)
from preftune.engine.score import groups, score
from preftune.errors import StorageError, TrainingError
from preftune.files import default_cache

TREES = tiny.forest(3, n=7, scored=0.7)


class Counting:
    """A policy that counts its forward passes."""

    def __init__(self, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policy, self.n = policy, 0
        forward = policy.forward

        def counted(batch: Any) -> Any:
            self.n += 1
            return forward(batch)

        monkeypatch.setattr(policy, "forward", counted)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(Policy(tiny.model("llama", dtype=torch.float32), Path("forest", "own")), monkeypatch)


def filled(folder: Folder, policy: Policy, trees: Sequence[Tree] = TREES, *, identity: str = "a", budget: int = 40) -> Store:
    store = reference_store(folder, identity)
    assert fill_all(store, policy, trees, budget=budget)[-1:] in ([], [len(trees)])
    return store


def fill_all(store: Store, policy: Policy, trees: Sequence[Tree] = TREES, *, budget: int) -> list[int]:
    """Scores what the store lacks; how many were done after each batch."""
    return list(fill(store, policy, trees, missing(store, trees), budget=budget))


def test_what_is_stored_is_what_the_reference_gives(tmp_path: Folder, counting: Counting) -> None:
    store = filled(tmp_path, counting.policy)
    for source in (store, reference_store(tmp_path, "a")):
        assert len(source) == 14 and not missing(source, TREES)
        got = logps_of(source, TREES, counting.policy.pack(TREES))
        expected = tiny.textbook(tiny.oracle(counting.policy.model), TREES).detach()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        assert got.dtype == torch.float32


def test_a_second_fill_scores_nothing_but_its_samples(tmp_path: Folder, counting: Counting) -> None:
    filled(tmp_path, counting.policy)
    assert counting.n > 2
    counting.n = 0
    again = reference_store(tmp_path, "a")
    assert fill_all(again, counting.policy, budget=40) == []
    assert counting.n == 1, "one pass that verifies two examples"
    assert len(list(again.folder.iterdir())) == 1, "and nothing is written"


def test_more_data_scores_the_new_alone(tmp_path: Folder, counting: Counting) -> None:
    filled(tmp_path, counting.policy, TREES[:5])
    counting.n = 0
    store = reference_store(tmp_path, "a")
    assert fill_all(store, counting.policy, budget=10_000) == [2]
    assert counting.n == 2, "one to verify, one to score"


def test_of_two_that_want_the_same_the_first_scores_and_the_other_reads(tmp_path: Folder, counting: Counting) -> None:
    with Share(tmp_path, "a", TREES, rank=0, world=1) as second:
        with Share(tmp_path, "a", TREES, rank=0, world=1) as first, Share(tmp_path, "a", TREES, rank=1, world=2) as other:
            assert first.take() and not second.take() and other.take(), "another rank's share is its own"
            assert len(other.todo) == len(TREES) // 2
            assert list(first.fill(counting.policy, budget=40))[-1] == len(second.todo) == len(TREES)
        assert second.take(wait=True) and second.todo == []
        assert len(second.store) == 14 and len(other.reopened()) == 14


@given(st.data())
def test_the_key_is_the_tokens_and_the_mask(data: st.DataObject) -> None:
    """Neither id, pairs, labels nor scores; every token, every mask bit, and where the prompt ends."""
    ids = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=8))
    cut = data.draw(st.integers(1, len(ids) - 1))
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids) - cut, max_size=len(ids) - cut))

    def key(ids: list[int], cut: int, mask: list[bool]) -> bytes:
        return response_key(np.array(ids[:cut], np.int32), Branch(np.array(ids[cut:], np.int32), np.array(mask, np.bool_)))

    own = key(ids, cut, mask)
    assert len(own) == 16 and own == key(list(ids), cut, list(mask))
    i = data.draw(st.integers(0, len(ids) - 1))
    assert key([*ids[:i], ids[i] + 1, *ids[i + 1 :]], cut, mask) != own
    j = data.draw(st.integers(0, len(mask) - 1))
    assert key(ids, cut, [*mask[:j], not mask[j], *mask[j + 1 :]]) != own
    if cut + 1 < len(ids):
        assert key(ids, cut + 1, mask[1:]) != own


def test_other_pairs_labels_or_ids_find_the_same(tmp_path: Folder, counting: Counting) -> None:
    filled(tmp_path, counting.policy)
    renamed = [Tree("other", t.prompt, t.branches[::-1], (Pair(1, 0, 0.7),), (True, False), (1.0, 2.0)) for t in TREES]
    assert missing(reference_store(tmp_path, "a"), renamed) == []


def test_another_reference_is_another_folder(tmp_path: Folder, counting: Counting) -> None:
    filled(tmp_path, counting.policy)
    assert missing(reference_store(tmp_path, "b"), TREES) == list(range(len(TREES)))


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.bfloat16, "float32"), (torch.float32, "float32"), (torch.float64, "float64")]
)
def test_never_below_float32(tmp_path: Folder, dtype: torch.dtype, stored: str) -> None:
    store = filled(tmp_path, Policy(tiny.model("llama", dtype=dtype), Path("forest", "own")))
    assert {str(value.dtype) for value in store.get(keys_of(TREES)) if value is not None} == {stored}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_rounding_is_no_stale_value(tmp_path: Folder, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """Stored and verified in batches of other shapes, in any precision."""
    policy = Policy(tiny.model("llama", dtype=dtype), Path("forest", "own"), autocast=autocast)
    filled(tmp_path, policy, budget=10_000)
    verify(reference_store(tmp_path, "a"), policy, TREES)


def test_a_stale_value_is_noticed(tmp_path: Folder, counting: Counting) -> None:
    filled(tmp_path, counting.policy)
    with torch.no_grad():
        counting.policy.model.lm_head.weight[3] += 0.5
    with pytest.raises(TrainingError, match=r"example t\d, response 0, differ by .* Delete that folder"):
        fill_all(reference_store(tmp_path, "a"), counting.policy, budget=40)


def test_a_stored_nan_is_noticed(tmp_path: Folder, counting: Counting) -> None:
    store = reference_store(tmp_path, "a")
    store.add(keys_of(TREES), [np.full(int(b.scored.sum()), np.nan, np.float32) for t in TREES for b in t.branches])
    with pytest.raises(TrainingError, match="differ by nan"):
        verify(store, counting.policy, TREES)


def test_damaged_values_are_scored_again(tmp_path: Folder, counting: Counting) -> None:
    """A bit of one value: noticed by whoever needs that value, before it is used."""
    store = filled(tmp_path, counting.policy)
    before = logps_of(store, TREES, counting.policy.pack(TREES))
    (shard,) = store.folder.glob("*.safetensors")
    whole = shard.read_bytes()
    at = whole.index(before[:1].numpy().tobytes())
    shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(StorageError, match="gone or damaged now .*--resume scores them again"):
        logps_of(reference_store(tmp_path, "a"), TREES, counting.policy.pack(TREES))
    shard.with_suffix(".damaged").rename(shard)
    again = reference_store(tmp_path, "a")
    assert missing(again, TREES) == list(range(len(TREES))) and again.damaged == [shard]
    fill_all(again, counting.policy, budget=40)
    torch.testing.assert_close(logps_of(again, TREES, counting.policy.pack(TREES)), before, rtol=0, atol=0)
    assert missing(reference_store(tmp_path, "a"), TREES) == []


@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_an_interrupted_fill_goes_on(tmp_path: Folder, counting: Counting, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(module, "_SHARD_RESPONSES", 4)
    store = reference_store(tmp_path, "a")
    filling = fill(store, counting.policy, TREES, range(len(TREES)), budget=1)  # a tree at a time
    while next(filling) < 5:
        pass
    if how == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt):
            filling.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    again = reference_store(tmp_path, "a")
    n_kept = 4 if how == "killed" else 5  # two shards of two trees each, and the fifth where there was time to write it
    assert len(again) == 2 * n_kept
    counting.n = 0
    assert fill_all(again, counting.policy, budget=1) == list(range(1, 8 - n_kept))
    assert counting.n == 7 - n_kept + 1
    assert missing(reference_store(tmp_path, "a"), TREES) == []


def test_budget_and_order(counting: Counting, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    pack = counting.policy.pack
    monkeypatch.setattr(counting.policy, "pack", lambda trees: (sizes.append([t.n_tokens for t in trees]), pack(trees))[1])
    filled(tmp_path, counting.policy, budget=30)
    assert sum(len(s) for s in sizes) == len(TREES)
    assert all(sum(s) <= 30 or len(s) == 1 for s in sizes)
    assert [n for s in sizes for n in s] == sorted((t.n_tokens for t in TREES), reverse=True), "the largest first"


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 60))
def test_groups(lengths: list[int], budget: int) -> None:
    found = list(groups(range(len(lengths)), lengths, budget))
    assert [i for group in found for i in group] == list(range(len(lengths)))
    assert all(len(g) == 1 or sum(lengths[i] for i in g) <= budget for g in found)


def test_scoring_leaves_the_training_flag_and_no_gradient(counting: Counting) -> None:
    counting.policy.train()
    values = score(counting.policy, TREES)
    assert counting.policy.training
    assert [[len(v) for v in tree] for tree in values] == [[int(b.scored.sum()) for b in t.branches] for t in TREES]


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Folder) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "preftune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Folder.home() / ".cache" / "preftune"
