"""Files that are either whole or not there.

`write_atomic` writes beside the target, syncs, renames: a reader sees the old file or the new one. `append_lines` adds whole
lines to a JSONL file, and clears away one that a crash tore. `Lock` lets one process at a time do what others wait for. Every
failure of the disk becomes a StorageError that says what to do.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from preftune.errors import StorageError


@contextmanager
def storage(path: Path, doing: str) -> Iterator[None]:
    """Turns an OSError of the block (or safetensors' own form of one) into a StorageError that names `path` and what to do."""
    try:
        yield
    except Exception as error:
        number = _os_error(error)
        if number is None:
            raise
        advice = {
            errno.ENOSPC: "the disk is full: free some space, or choose another folder (out= for a run)",
            errno.EDQUOT: "the disk quota is used up: free some space, or choose another folder (out= for a run)",
            errno.EACCES: "no permission: choose a folder that you may write to (out= for a run)",
            errno.EPERM: "no permission: choose a folder that you may write to (out= for a run)",
            errno.EROFS: "the file system is read-only: choose another folder (out= for a run)",
            errno.ENOTDIR: "a part of this path is a file, not a folder",
            errno.EEXIST: "a file of this name is in the way",
        }.get(number, str(error))
        raise StorageError(f"{path}: cannot {doing}: {advice}") from error


def _os_error(error: Exception) -> int | None:
    """The system's number for what went wrong; None where it was not the system."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def default_cache() -> Path:
    """~/.cache/preftune, or where XDG_CACHE_HOME points."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preftune"


def make_folder(path: Path) -> Path:
    """`path` as a folder that can be written to. Raises StorageError."""
    with storage(path, "create this folder"):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"preftune")
    return path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes the whole file or leaves the old one: temporary file, fsync, rename, fsync of the folder."""
    data = content.encode() if isinstance(content, str) else content
    with storage(path, "write this file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes renames in this folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """A lock on a file of its own, held by one process at a time. It goes with the process, however that ends.

    with Lock(folder / ".lock") as lock:
        if not lock.take():
            print("somebody else is at it: waiting")
            lock.take(wait=True)
    """

    def __init__(self, path: Path) -> None:
        """The file and its folder are made when the lock is first taken; the file stays."""
        self.path = path
        self._file: int | None = None

    def take(self, *, wait: bool = False) -> bool:
        """Whether this process holds the lock now; with `wait` it does when this returns. Raises StorageError."""
        with storage(self.path, "lock this file"):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            return True

    def fileno(self) -> int:
        """The open file: a child that inherits it holds the lock as well."""
        assert self._file is not None, "take the lock first"
        return self._file

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        """Lets go of the lock; children that inherited it hold it on."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def json_line(row: Any) -> str:
    """One JSON object on one line; NaN and infinities are refused (they are not JSON), lone surrogates escaped."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        text = json.dumps(row, allow_nan=False)
    return text + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of our own JSONL file; a last line that was torn by a crash is left out. [] where there is no file.

    Raises StorageError with `file:line` where any other line is not a JSON object.
    """
    with storage(path, "read this file"):
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for at, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise StorageError(f"{path}:{at}: not a JSON object; this file is written by preftune alone: was it damaged?")
        rows.append(row)
    return rows


def append_lines(path: Path, rows: list[Any]) -> None:
    """Adds rows to a JSONL file, each a whole line, and hands them to the disk. A torn last line is cut off first."""
    data = "".join(json_line(row) for row in rows).encode()
    with storage(path, "append to this file"), path.open("ab+") as file:
        if file.tell() and not _ends_a_line(file):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _ends_a_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
