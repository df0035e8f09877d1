"""Per-token log-probs of the frozen reference, computed once and kept on disk.

A response is looked up by the exact token ids of its prompt and itself; the folder that it is looked up in is named by the
reference's identity (weights, adapter, precision). Nothing else is part of the key, so another β, loss, seed, learning rate or
LoRA rank never scores the reference again, and a changed template, length limit or tokenizer never finds a stale value.

    CACHE/reference/<identity>/     a `preftune.data.store.Store`: response -> [n_scored] log-probs in nats

A pass that Ctrl-C stops goes on where it was, a killed one where its last file of 4096 responses ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from preftune.data.store import Store
from preftune.data.types import Branch, Tree
from preftune.engine.batch import Batch
from preftune.engine.policy import Policy, tolerance
from preftune.engine.score import score, score_all
from preftune.errors import StorageError, TrainingError
from preftune.files import Lock
from preftune.model.device import to_device

_SHARD_RESPONSES = 4096

WAITING = "another process is scoring the same reference: this one waits, and reads what it has scored"


def response_key(prompt: NDArray[np.int32], branch: Branch) -> bytes:
    """16 bytes that name the log-probs of `branch` after `prompt`: all token ids and which of them are scored."""
    return next(_keys(prompt, [branch]))


def _keys(prompt: NDArray[np.int32], branches: Sequence[Branch]) -> Iterator[bytes]:
    """`response_key` of each branch; the prompt is hashed once."""
    opened = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=16)
    opened.update(prompt.astype("<i4", copy=False).tobytes())
    for branch in branches:
        digest = opened.copy()
        digest.update(branch.ids.astype("<i4", copy=False).tobytes())
        digest.update(branch.scored.tobytes())
        yield digest.digest()


def reference_store(cache: Path, identity: str) -> Store:
    """The log-probs of one frozen model: float32 (float64 from a float64 model), never less."""
    return Store(cache / "reference" / identity)


def keys_of(trees: Sequence[Tree]) -> list[bytes]:
    """The key of every response, tree by tree."""
    return [key for tree in trees for key in _keys(tree.prompt, tree.branches)]


def missing(store: Store, trees: Sequence[Tree]) -> list[int]:
    """Indices of trees with a response that the store does not know, or knows no longer because its file is damaged.

    Reads what it finds, a few thousand trees at a time, and keeps none of it.
    """
    found: list[int] = []
    for start in range(0, len(trees), _SHARD_RESPONSES):
        chunk = trees[start : start + _SHARD_RESPONSES]
        known = (value is not None for value in store.get(keys_of(chunk)))
        found += [start + i for i, tree in enumerate(chunk) if not all([next(known) for _ in tree.branches])]
    return found


def fill(store: Store, reference: Policy, trees: Sequence[Tree], todo: Sequence[int], *, budget: int) -> Iterator[int]:
    """Scores the trees `todo` (those `missing`), longest first under `budget` tokens, and yields how many are done so far.

    `reference` must be the frozen model (a LoRA policy: with its adapter off). One sampled tree that the store had already is
    scored again; raises TrainingError when the stored value is another.
    """
    todo_set = set(todo)
    verify(store, reference, [t for i, t in enumerate(trees) if i not in todo_set])
    keys: list[bytes] = []
    values: list[NDArray[np.floating]] = []
    done = 0
    try:
        for group, scored in score_all(reference, [trees[i] for i in todo], budget=budget):
            for i, logps in zip(group, scored, strict=True):
                keys += keys_of([trees[todo[i]]])
                values += logps
            done += len(group)
            if len(keys) >= _SHARD_RESPONSES:
                full, keys, values = (keys, values), [], []
                store.add(*full)
            yield done
    finally:  # Ctrl-C too keeps what was scored
        store.add(keys, values)


class Share:
    """A rank's share of the trees whose log-probs a store is to hold; of several processes that want it the first scores it.

    with Share(cache, identity, trees, rank=0, world=1) as share:
        if share.todo and not share.take():
            print(WAITING)
            share.take(wait=True)
        for done in share.fill(reference, budget=8192):
            print(done, "of", len(share.todo))
    """

    def __init__(self, cache: Path, identity: str, trees: Sequence[Tree], *, rank: int, world: int) -> None:
        """Finds out what the store lacks."""
        self._cache, self._identity = cache, identity
        self.trees = trees[rank::world]
        self._look()
        self.notes = [f"{f}: damaged reference log-probs, set aside and scored again" for f in self.store.damaged]
        self._lock = Lock(self.store.folder / f".{rank}-of-{world}.lock")  # ranks have a share each, and a lock each

    def _look(self) -> None:
        self.store = self.reopened()
        self.todo = missing(self.store, self.trees)

    def reopened(self) -> Store:
        """The store as it is now, with what others have added."""
        return reference_store(self._cache, self._identity)

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *error: object) -> None:
        """Lets others score."""
        self._lock.__exit__(*error)

    def take(self, *, wait: bool = False) -> bool:
        """Whether it is for this process to score `todo`, which is looked up anew; with `wait` it is when this returns."""
        if not self._lock.take(wait=wait):
            return False
        self._look()
        return True

    def fill(self, reference: Policy, *, budget: int) -> Iterator[int]:
        """Scores `todo`, as the function `fill` does."""
        return fill(self.store, reference, self.trees, self.todo, budget=budget)


def verify(store: Store, reference: Policy, known: Sequence[Tree], *, n: int = 2) -> None:
    """Scores `n` trees that the store knows again. Raises TrainingError when a stored log-prob is not what it gives now."""
    if not known:
        return
    some = [known[i] for i in sorted({len(known) // 3, len(known) - 1})][:n]
    for tree, logps in zip(some, score(reference, some), strict=True):
        for k, (logp, stored) in enumerate(zip(logps, _stored(store, [tree]), strict=True)):
            if not len(stored):
                continue
            off = float(np.abs(stored - logp).max())
            allowed = tolerance(torch.from_numpy(logp), reference.autocast or next(reference.parameters()).dtype)
            if not off <= allowed:
                raise TrainingError(
                    f"{store.folder}: the stored log-probs of example {tree.id}, response {k}, differ by {off:.3g} nats "
                    f"from what the reference gives now (at most {allowed:.1g} expected). Delete that folder and run again"
                )


def logps_of(store: Store, trees: Sequence[Tree], batch: Batch) -> torch.Tensor:
    """[S] reference log-probs in the order of the batch's scored tokens, on the batch's device. Raises StorageError."""
    return to_device(torch.from_numpy(np.concatenate(_stored(store, trees))), batch.tokens.device)


def _stored(store: Store, trees: Sequence[Tree]) -> list[NDArray[np.floating]]:
    found = store.get(keys_of(trees))
    values = [value for value in found if value is not None]
    if len(values) < len(found):
        raise StorageError(
            f"{store.folder}: reference log-probs that were there when the run began are gone or damaged now "
            f"({', '.join(file.name for file in store.damaged) or 'a file was removed'}); --resume scores them again"
        )
    return values
