"""Workers, one for each run at a time: on CPUs processes, on GPUs a process for each device.

with Pool(seats, logs=folder, lock=lock) as pool:
    for name, news in pool.run(next_job):
        ...                                  # News as a run goes on, Ended when it has
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol, runtime_checkable

from preftune.errors import ConfigError
from preftune.files import Lock, make_folder
from preftune.sweeping.worker import Baseline, Ended, Job, News

Seat = dict[str, str]
"""Environment variables that give a worker its device, or its share of the CPUs."""

_SECONDS_TO_SAVE = 600.0  # after which a worker that was asked to stop is stopped for good


@runtime_checkable
class Process(Protocol):
    """What a pool asks of a worker's process."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended; negative: the signal."""
        ...


def seats_for(jobs: int | None, device: str) -> list[Seat]:
    """A seat for each run at a time; `jobs` None: one a GPU, or one run. Raises ConfigError."""
    if device == "cpu" or not (gpus := _gpus(device)):
        n = jobs or 1
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // n))
        return [{"OMP_NUM_THREADS": threads} if n > 1 else {} for _ in range(n)]
    if jobs is not None and jobs > len(gpus):
        raise ConfigError(
            f"--jobs {jobs}: there {'are' if len(gpus) > 1 else 'is'} {len(gpus)} GPU{'s' * (len(gpus) > 1)}; a run has one"
        )
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[: jobs or len(gpus)]]


def _gpus(device: str) -> list[str]:
    """Names of the GPUs that runs may have, as CUDA_VISIBLE_DEVICES has them. Raises ConfigError for one that is fixed."""
    import torch

    n = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",")][:n] if visible else [str(k) for k in range(n)]
    if device in ("auto", "cuda"):
        return names
    number = device.removeprefix("cuda:")
    if device.startswith("cuda:") and number.isdigit() and int(number) < n:
        raise ConfigError(
            f"device={device}: a sweep gives each run its GPU; set device=auto, and CUDA_VISIBLE_DEVICES={names[int(number)]}"
        )
    return []


def launch(connection: Connection, *, seat: Seat, log: Path, lock: Lock) -> Process:
    """A worker process at the other end of the connection. It holds the sweep's lock too, for as long as it lives."""
    fd = connection.fileno()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | seat
    command = [sys.executable, "-c", f"from preftune.sweeping.worker import main; main({fd})"]
    with log.open("ab") as said:
        return subprocess.Popen(  # a session of its own: Ctrl-C reaches the sweep alone, which asks workers to stop
            command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            pass_fds=(fd, lock.fileno()), start_new_session=True,
        )  # fmt: skip


class _Worker:
    """A process, this end of its connection, and the run that it is at."""

    def __init__(self, seat: Seat, log: Path, lock: Lock) -> None:
        self.log = log
        self.connection, theirs = Pipe()
        self.process = launch(theirs, seat=seat, log=log, lock=lock)
        theirs.close()
        self.job: Job | Baseline | None = None
        self.left = False

    def start(self, job: Job | Baseline) -> None:
        self.job = job
        with suppress(OSError):  # it is gone already, which `hear` finds out
            self.connection.send(job)

    def hear(self) -> News | Ended:
        """What it says next; where it is gone, how it ended."""
        try:
            said: News | Ended = self.connection.recv()
            self.left = isinstance(said, Ended) and said.leaves
            return said
        except (EOFError, OSError):
            self.left = True
            code = self.process.wait()
            if code >= 0:
                how = f"the process of this run left with code {code}"
            else:
                name = signal.Signals(-code).name
                how = f"the process of this run was ended by {name}"
                how += ": most often the machine ran out of memory" if name == "SIGKILL" else ""
            return Ended("failed", f"{how}; what it said last is in {self.log}")

    def close(self) -> None:
        self.connection.close()
        self.process.wait()


class Pool:
    """Workers that are started when there is something for them, and replaced when they are gone."""

    def __init__(self, seats: list[Seat], *, logs: Path, lock: Lock) -> None:
        """`logs`: folder of what workers print."""
        self._seats = seats
        self._logs = make_folder(logs)
        self._lock = lock
        self._workers: dict[int, _Worker] = {}  # seat -> who sits there

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Lets workers leave, those that are at work after saving; a second Ctrl-C ends them at once."""
        busy = [w for w in self._workers.values() if w.job is not None]
        try:
            for worker in busy:
                os.kill(worker.process.pid, signal.SIGTERM)
            deadline = time.monotonic() + _SECONDS_TO_SAVE
            while busy and busy[0].connection.poll(max(0.0, deadline - time.monotonic())):
                if isinstance(busy[0].hear(), Ended):
                    del busy[0]
        finally:
            for worker in busy:  # they did not end in time, or the user would not wait
                with suppress(ProcessLookupError):
                    os.kill(worker.process.pid, signal.SIGKILL)
            for worker in self._workers.values():
                worker.close()

    def run(self, next_job: Callable[[], Job | Baseline | None]) -> Iterator[tuple[str, News | Ended]]:
        """Gives each free seat what `next_job` says, until it says None and all have ended; yields what they say."""
        asking = True
        while True:
            for at in range(len(self._seats)):
                if asking and self._is_free(at):
                    job = next_job()
                    asking = job is not None
                    if job is not None:
                        self._at(at).start(job)
            busy = {w.connection: (at, w) for at, w in self._workers.items() if w.job is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                at, worker = busy[connection]  # type: ignore[index]
                assert worker.job is not None
                name, said = worker.job.name, worker.hear()
                if isinstance(said, Ended):
                    worker.job, asking = None, True  # of a search, an end may be what the next run was waiting for
                yield name, said

    def _is_free(self, at: int) -> bool:
        return at not in self._workers or self._workers[at].job is None

    def _at(self, at: int) -> _Worker:
        """The worker of a seat, a new one where there is none or the last one has left."""
        worker = self._workers.get(at)
        if worker is None or worker.left:
            if worker is not None:
                worker.close()
            self._workers[at] = worker = _Worker(self._seats[at], self._logs / f"worker-{at}.log", self._lock)
        return worker
