"""A process that trains and evaluates one run after another, as it is told over a connection, and says how it goes.

Runs have processes of their own so that what ends one ends no other: no memory, a crash in a kernel, a kill. A worker that ran
out of memory leaves, and the next run gets a new one.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

_SECONDS_BETWEEN_NEWS = 0.5


class Job(NamedTuple):
    """One run: its name, its settings, and how it is evaluated (the fields of `sweeping.evaluation.How`)."""

    name: str
    config: dict[str, Any]
    evaluation: dict[str, Any]


class Baseline(NamedTuple):
    """Best of n of the reference, on the prompts of a run that is done, written to a file."""

    name: str
    run: str
    evaluation: dict[str, Any]
    file: str


class News(NamedTuple):
    """How far a run is: the stage, what is done of it, and its last figures."""

    stage: str
    done: int
    total: int
    text: str = ""


class Ended(NamedTuple):
    """How a run ended, and why it failed. A run that was stopped goes on when the sweep is resumed."""

    status: Literal["done", "failed", "stopped"]
    reason: str = ""
    leaves: bool = False  # the process ends with it: the next run needs another


def main(fd: int) -> None:
    """All that a worker's process does. fd: its end of the connection, inherited from the sweep."""
    serve(Connection(fd))


def serve(connection: Connection) -> None:
    """Runs what comes until the sweep closes its end; where it vanishes in the middle, the run is saved and stopped."""
    jobs: queue.SimpleQueue[Job | Baseline | None] = queue.SimpleQueue()
    at_work = threading.Event()
    threading.Thread(target=_listen, args=(connection, jobs, at_work), daemon=True).start()
    while (job := jobs.get()) is not None:
        at_work.set()
        ended = perform(job, _Reporter(connection))
        at_work.clear()
        try:
            connection.send(ended)
        except OSError:  # nobody is there to hear it
            return
        if ended.leaves:
            return


def _listen(connection: Connection, jobs: queue.SimpleQueue[Job | Baseline | None], at_work: threading.Event) -> None:
    try:
        while True:
            jobs.put(connection.recv())
    except (EOFError, OSError):
        jobs.put(None)
        if at_work.is_set():
            os.kill(os.getpid(), signal.SIGTERM)


class _Reporter:
    """Sends how far a run is, a few times a second at most."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last = 0.0

    def __call__(self, news: News) -> None:
        now = time.monotonic()
        if now - self._last > _SECONDS_BETWEEN_NEWS:
            self._last = now
            with suppress(OSError):  # the sweep is gone: _listen stops the run
                self._connection.send(news)


def perform(job: Job | Baseline, tell: Callable[[News], None]) -> Ended:
    """Trains and evaluates one run, or goes on with it; or measures the baseline. How that ended."""
    from preftune.errors import Interrupted, PreftuneError
    from preftune.training.interrupt import term_interrupts

    try:
        with term_interrupts():
            _train_and_evaluate(job, tell) if isinstance(job, Job) else _measure_baseline(job, tell)
        return Ended("done")
    except (Interrupted, KeyboardInterrupt):
        return Ended("stopped")
    except PreftuneError as error:
        return Ended("failed", str(error))
    except Exception as error:
        traceback.print_exc()
        if _is_out_of_memory(error):
            advice = "try a smaller batch.tokens_per_microbatch, or fewer runs at once (--jobs)"
            return Ended(
                "failed", f"out of memory: {(str(error) or type(error).__name__).splitlines()[0]}; {advice}", leaves=True
            )
        return Ended("failed", f"{type(error).__name__}: {error}", leaves=True)


def _train_and_evaluate(job: Job, tell: Callable[[News], None]) -> None:
    from preftune.api import train
    from preftune.report.page import write_report
    from preftune.show import line
    from preftune.sweeping.evaluation import evaluate_run, how_of
    from preftune.training.job import Started
    from preftune.training.loop import Step
    from preftune.training.prepare import Progress

    n_steps = 0

    def heard(event: Any) -> None:
        nonlocal n_steps
        match event:
            case Started():
                n_steps = event.n_steps
            case Step():
                tell(News("training", event.index + 1, n_steps, line(event.metrics)))
            case Progress():
                tell(News(event.stage, event.done, event.total))
            case _:
                pass

    run = train(job.config, resume=True, quiet=True, on_event=heard)
    config = run.config()
    evaluate_run(
        run,
        how_of(job.evaluation),
        device=config.device,
        precision=config.precision,
        on_progress=lambda name, done, total: tell(News(name, done, total)),
    )
    write_report([run])


def _measure_baseline(job: Baseline, tell: Callable[[News], None]) -> None:
    from preftune.files import write_atomic
    from preftune.run import Run
    from preftune.sweeping.baseline import measure_best_of
    from preftune.sweeping.evaluation import how_of
    from preftune.sweeping.record import best_of_json

    run = Run.open(job.run)
    config = run.config()
    found = measure_best_of(
        run,
        how_of(job.evaluation),
        device=config.device,
        precision=config.precision,
        on_progress=lambda name, done, total: tell(News(name, done, total)),
    )
    write_atomic(Path(job.file), best_of_json(found))


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
