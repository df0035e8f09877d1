"""Workers of a sweep that start at once, from the server that has imported everything, that count and crash."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from crashes_for_tests import act_at
from worlds import spawn


class Forked:
    """A process of multiprocessing as a pool asks for it."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code: int = self._process.exitcode
        return code


def launch(connection: Connection, *, seat: dict[str, str], log: Path, lock: Any) -> Forked:
    """In the place of `preftune.sweeping.pool.launch`."""
    return Forked(spawn(serve_and_count, connection, seat, str(log), str(log.parent.parent / "scored")))


def serve_and_count(connection: Connection, seat: dict[str, str], log: str, scored: str) -> None:
    """A worker that adds a line to the file `scored` for each pass over a reference, with the number of its examples."""
    import torch

    import preftune.engine.reference as stored
    from preftune.sweeping.worker import serve

    os.environ.update(seat)
    os.setsid()  # as a worker of its own: no Ctrl-C from the terminal
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    fill = stored.fill

    def counted(store: Any, reference: Any, trees: Any, todo: Sequence[int], *, budget: int) -> Iterator[int]:
        if len(todo):
            with open(scored, "a") as file:
                file.write(f"{len(todo)}\n")
        yield from fill(store, reference, trees, todo, budget=budget)

    stored.fill = counted  # type: ignore[attr-defined]
    _crash_as_told(Path(log).parent.parent / "crash")
    serve(connection)


def _crash_as_told(told: Path) -> None:
    """The file says "MOMENT:NTH"; the first worker that finds it is killed there, and no other."""
    try:
        moment, _, nth = told.read_text().partition(":")
        told.unlink()
    except FileNotFoundError:
        return
    act_at(moment, int(nth), lambda: os.kill(os.getpid(), signal.SIGKILL))
