"""Per-token log-probs of the frozen reference, computed once and kept on disk.

A response is looked up by the exact token ids of its prompt and itself; the folder that it is looked up in is named by the
reference's identity (weights, adapter, precision). Nothing else is part of the key, so another β, loss, seed, learning rate or
LoRA rank never scores the reference again, and a changed template, length limit or tokenizer never finds a stale value.

    CACHE/reference/<identity>/<digest>.safetensors     keys [n, 16] uint8, offsets [n + 1] int64, logp [total]

Shards are written once, whole, and never changed. A pass that Ctrl-C stops goes on where it was, a killed one where its last
shard ended.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from preftune.data.types import Branch, Tree
from preftune.engine.batch import Batch
from preftune.engine.policy import Policy, tolerance
from preftune.engine.score import score, score_all
from preftune.errors import TrainingError
from preftune.files import storage, write_atomic
from preftune.model.device import to_device

_SHARD_RESPONSES = 4096


def default_cache() -> Path:
    """~/.cache/preftune, or where XDG_CACHE_HOME points."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preftune"


def response_key(prompt: NDArray[np.int32], branch: Branch) -> bytes:
    """16 bytes that name the log-probs of `branch` after `prompt`: all token ids and which of them are scored."""
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=16)
    for part in (prompt.astype("<i4"), branch.ids.astype("<i4"), branch.scored.astype(np.uint8)):
        digest.update(part.tobytes())
    return digest.digest()


class ReferenceStore:
    """Reference log-probs of one frozen model. Values are float32 (float64 from a float64 model), never less."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Opens CACHE/reference/<identity>; shards that are damaged are set aside and scored again."""
        self.folder = folder / "reference" / identity
        self.damaged: list[Path] = []
        self._where: dict[bytes, tuple[NDArray[np.floating], int, int]] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._open(file)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def __getitem__(self, key: bytes) -> NDArray[np.floating]:
        """[n_scored] log-probs in nats."""
        values, start, end = self._where[key]
        return values[start:end]

    def add(self, keys: list[bytes], logps: list[NDArray[np.floating]]) -> None:
        """Writes one shard, atomically. Raises StorageError."""
        from safetensors.numpy import save

        offsets = np.cumsum([0, *(len(v) for v in logps)], dtype=np.int64)
        values = np.concatenate(logps) if logps else np.zeros(0, np.float32)
        table = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 16)
        file = self.folder / f"{hashlib.blake2b(table.tobytes(), digest_size=12).hexdigest()}.safetensors"
        with storage(file, "write reference log-probs"):
            write_atomic(
                file, save({"keys": table, "offsets": offsets, "logp": values}, {"digest": _digest(table, offsets, values)})
            )
        self._open(file)

    def _open(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="np") as shard:
                table, offsets, values = (shard.get_tensor(n) for n in ("keys", "offsets", "logp"))
                whole = (shard.metadata() or {}).get("digest") == _digest(table, offsets, values)
        except (SafetensorError, OSError, ValueError):
            whole = False
        if not whole:
            self.damaged.append(file)
            with storage(file, "set aside this damaged file"), suppress(FileNotFoundError):  # another rank did
                file.replace(file.with_suffix(".damaged"))
            return
        for row, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            self._where[table[row].tobytes()] = (values, start, end)


def _digest(*arrays: NDArray[np.generic]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def missing(store: ReferenceStore, trees: Sequence[Tree]) -> list[int]:
    """Indices of trees with a response that the store does not know."""
    return [i for i, t in enumerate(trees) if any(response_key(t.prompt, b) not in store for b in t.branches)]


def fill(store: ReferenceStore, reference: Policy, trees: Sequence[Tree], *, budget: int) -> Iterator[int]:
    """Scores the trees that the store lacks, longest first under `budget` tokens, and yields how many are done so far.

    `reference` must be the frozen model (a LoRA policy: with its adapter off). One sampled tree that the store had already is
    scored again; raises TrainingError when the stored value is another.
    """
    todo = missing(store, trees)
    todo_set = set(todo)
    verify(store, reference, [t for i, t in enumerate(trees) if i not in todo_set])
    keys: list[bytes] = []
    values: list[NDArray[np.floating]] = []
    done = 0
    try:
        for group, scored in score_all(reference, [trees[i] for i in todo], budget=budget):
            for i, logps in zip(group, scored, strict=True):
                tree = trees[todo[i]]
                keys += [response_key(tree.prompt, branch) for branch in tree.branches]
                values += logps
            done += len(group)
            if len(keys) >= _SHARD_RESPONSES:
                full, keys, values = (keys, values), [], []
                store.add(*full)
            yield done
    finally:  # Ctrl-C too keeps what was scored
        if keys:
            store.add(keys, values)


def verify(store: ReferenceStore, reference: Policy, known: Sequence[Tree], *, n: int = 2) -> None:
    """Scores `n` trees that the store knows again. Raises TrainingError when a stored log-prob is not what it gives now."""
    if not known:
        return
    some = [known[i] for i in sorted({len(known) // 3, len(known) - 1})][:n]
    for tree, logps in zip(some, score(reference, some), strict=True):
        for k, (branch, logp) in enumerate(zip(tree.branches, logps, strict=True)):
            stored = store[response_key(tree.prompt, branch)]
            if not len(stored):
                continue
            off = float(np.abs(stored - logp).max())
            allowed = tolerance(torch.from_numpy(logp), reference.autocast or next(reference.parameters()).dtype)
            if not off <= allowed:
                raise TrainingError(
                    f"{store.folder}: the stored log-probs of example {tree.id}, response {k}, differ by {off:.3g} nats "
                    f"from what the reference gives now (at most {allowed:.1g} expected). Delete that folder and run again"
                )


def logps_of(store: ReferenceStore, trees: Sequence[Tree], batch: Batch) -> torch.Tensor:
    """[S] reference log-probs in the order of the batch's scored tokens, on the batch's device."""
    parts = [store[response_key(t.prompt, b)] for t in trees for b in t.branches]
    return to_device(torch.from_numpy(np.concatenate(parts)), batch.tokens.device)
