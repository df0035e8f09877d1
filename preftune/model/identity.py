"""What a frozen model is, as a name of 32 hex digits: its weights, configuration, adapter and precision.

    >>> identity(Path("base"), "float32", cache=default_cache())
    '5f0c…'

Weights are hashed in blocks by several threads, about as fast as a disk gives them. With a cache they are hashed once: their
digest is kept under the file's place, size, inode and times, so that a second start reads none of them. What that trusts is the
file system: that no file changes without a new time of change (`ctime`), which no program sets at will. A file that changed in
the last two seconds is not kept, since its time could stay the same if it changed again.
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from preftune.data.store import Store
from preftune.model.load import base_of

_BLOCK = 1 << 24  # bytes that one thread reads and hashes at a time
_SETTLED = 2.0  # seconds


def identity(folder: Path, precision: str, *, cache: Path | None = None) -> str:
    """The name of the model in `folder`. Neither its place nor its dates matter.

    cache: folder in which digests of weights are kept, as CACHE/weights; None: every byte is read.
    """
    digest = hashlib.blake2b(precision.encode(), digest_size=16)
    kept = None if cache is None else Store(cache / "weights")
    names = ("config.json", "adapter_config.json")
    files = sorted({*folder.glob("*.safetensors"), *(folder / n for n in names if (folder / n).exists())}, key=lambda p: p.name)
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        digest.update(_kept_digest(file, kept) if kept is not None and file.suffix == ".safetensors" else file_digest(file))
    if (folder / "adapter_config.json").exists():
        digest.update(identity(base_of(folder), precision, cache=cache).encode())
    return digest.hexdigest()


def file_digest(file: Path) -> bytes:
    """32 bytes that name a file's content: the BLAKE2b of the BLAKE2b of each block, so that threads can share the work."""
    with file.open("rb") as stream:
        descriptor = stream.fileno()
        starts = range(0, os.fstat(descriptor).st_size, _BLOCK)

        def block(start: int) -> bytes:
            return hashlib.blake2b(os.pread(descriptor, _BLOCK, start), digest_size=32).digest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            return hashlib.blake2b(b"".join(threads.map(block, starts)), digest_size=32).digest()


def _kept_digest(file: Path, kept: Store) -> bytes:
    state = file.stat()
    place = f"{file.resolve()}:{state.st_size}:{state.st_ino}:{state.st_mtime_ns}:{state.st_ctime_ns}"
    key = hashlib.blake2b(place.encode(errors="surrogateescape"), digest_size=16).digest()
    (known,) = kept.get([key])
    if known is not None:
        return known.tobytes()
    found = file_digest(file)
    if time.time() - max(state.st_mtime, state.st_ctime) > _SETTLED:
        kept.add([key], [np.frombuffer(found, np.uint8)])
    return found
