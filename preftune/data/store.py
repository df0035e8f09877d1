"""Arrays kept on disk under keys of 16 bytes, for what costs too much to compute twice. Written once, never changed.

    >>> store = Store(folder)
    >>> store.add(keys, values)        # one file, whole or not there
    >>> store.get(keys)                # the values; None where the store has none

    FOLDER/<digest>.safetensors     keys [n, 16] uint8 in order, offsets [n + 1] int64, check [n, 8] uint8, values [total]

Opening a store reads its keys and not one value. A value is read when it is asked for, and held against a digest of its own (of
which its key is a part) each time; where it is not what was written, the whole file is set aside and what it held is unknown
again. So what a run does not use costs it 60 bytes a key and no reading, and what it does use is never damaged.

Several processes may read and write at once: a file appears by renaming, whole, and one that is set aside stays mapped by those
who have opened it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from preftune.files import storage, write_atomic

Value = NDArray[Any]


class _Shard(NamedTuple):
    """One file, its keys in memory."""

    file: Path
    keys: NDArray[np.bytes_]  # [n] of 16 bytes, in order
    offsets: NDArray[np.int64]  # [n + 1]
    check: NDArray[np.uint8]  # [n, 8]
    values: Any  # safetensors' slice of [total] values: a memory map that holds no file open

    def value(self, row: int) -> Value | None:
        """The value of one row; None where it is damaged."""
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        try:
            value: Value = self.values[start:end] if start < end else np.zeros(0, np.float32)
        except (SafetensorError, OverflowError):  # beyond the end, or negative
            return None
        return value if self.check[row].tobytes() == _check(self.keys[row].ljust(16, b"\0"), value) else None


class _Index(NamedTuple):
    """Every key of the store in order, and where its value is."""

    keys: NDArray[np.bytes_]  # [N]
    shard: NDArray[np.int32]  # [N]
    row: NDArray[np.int32]  # [N]


class Store:
    """A folder of values by key. `damaged` lists the files that were set aside, as `*.damaged`."""

    def __init__(self, folder: Path) -> None:
        """Opens what is there; a folder that is not there yet is an empty store."""
        self.folder = folder
        self.damaged: list[Path] = []
        self._shards: list[_Shard] = []
        self._index: _Index | None = None
        for file in sorted(folder.glob("*.safetensors")):
            self._open(file)

    def __len__(self) -> int:
        keys = self._indexed().keys
        return int(np.count_nonzero(keys[1:] != keys[:-1])) + bool(len(keys))

    def get(self, keys: Sequence[bytes]) -> list[Value | None]:
        """The value of each key; None where there is none or where it was damaged."""
        while True:
            found, bad = self._read(keys)
            if not bad:
                return found
            for shard in bad:
                self._set_aside(shard.file)
            self._shards = [s for s in self._shards if all(s is not b for b in bad)]
            self._index = None

    def add(self, keys: Sequence[bytes], values: Sequence[Value]) -> None:
        """Writes the values as one file, atomically. Raises StorageError."""
        if not keys:
            return
        table = np.array(keys, "S16")
        order = np.argsort(table, kind="stable")
        arrays: dict[str, Value] = {
            "keys": table[order].view(np.uint8).reshape(-1, 16),
            "offsets": np.cumsum([0, *(len(values[i]) for i in order)], dtype=np.int64),
            "check": np.frombuffer(b"".join(_check(keys[i], values[i]) for i in order), np.uint8).reshape(-1, 8),
            "values": np.concatenate([values[i] for i in order]),
        }
        file = self.folder / f"{hashlib.blake2b(arrays['keys'].tobytes(), digest_size=12).hexdigest()}.safetensors"
        with storage(file, "write what was computed"):
            write_atomic(file, save(arrays))
        self._shards = [s for s in self._shards if s.file != file]  # another process may have written the same
        self._open(file)

    def _read(self, keys: Sequence[bytes]) -> tuple[list[Value | None], list[_Shard]]:
        """The values, and the files in which one of them is damaged."""
        index, wanted = self._indexed(), np.array(keys, "S16")
        at = np.searchsorted(index.keys, wanted)
        known = at < len(index.keys)
        known[known] = index.keys[at[known]] == wanted[known]
        found: list[Value | None] = [None] * len(keys)
        bad: dict[int, _Shard] = {}
        where = np.flatnonzero(known)
        for i, shard, row in zip(where.tolist(), index.shard[at[where]].tolist(), index.row[at[where]].tolist(), strict=True):
            found[i] = self._shards[shard].value(row)
            if found[i] is None:
                bad[shard] = self._shards[shard]
        return found, list(bad.values())

    def _indexed(self) -> _Index:
        """The index, made when it is first asked for after a change: the keys of a file are in order, so they are merged."""
        if self._index is None:
            keys = np.concatenate([np.zeros(0, "S16"), *(s.keys for s in self._shards)])
            order = np.argsort(keys, kind="stable")
            sizes = [len(s.keys) for s in self._shards]
            shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
            row = np.concatenate([np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in sizes)])[order]
            self._index = _Index(keys[order], shard, row)
        return self._index

    def _open(self, file: Path) -> None:
        """Maps a file that is there; one whose parts do not fit together is set aside."""
        try:
            with safe_open(file, framework="np") as parts:
                keys, offsets, check = (parts.get_tensor(name) for name in ("keys", "offsets", "check"))
                shard = _Shard(file, np.frombuffer(keys, "S16"), offsets, check, parts.get_slice("values"))
            if len(offsets) != len(keys) + 1 or check.shape != (len(keys), 8) or len(shard.values.get_shape()) != 1:
                raise ValueError("the parts do not fit together")
        except FileNotFoundError:  # another process has set it aside since
            return
        except (SafetensorError, OSError, ValueError):
            self._set_aside(file)
            return
        self._shards.append(shard)
        self._index = None

    def _set_aside(self, file: Path) -> None:
        self.damaged.append(file)
        with storage(file, "set aside this damaged file"), suppress(FileNotFoundError):  # another process did
            file.replace(file.with_suffix(".damaged"))


def _check(key: bytes, value: Value) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(value).data, digest_size=8, salt=key).digest()
