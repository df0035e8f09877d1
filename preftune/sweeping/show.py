"""What a person sees while a sweep runs: a line for each run under way, how many are done, and how long the rest will take."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from preftune.errors import printable
from preftune.sweeping.record import COLUMNS, Row
from preftune.sweeping.verdict import described, shown
from preftune.sweeping.worker import News


class Board:
    """Draws a sweep on a terminal; in a pipe, a log or with `quiet` a line for each run that begins or ends."""

    def __init__(self, *, quiet: bool = False) -> None:
        """`quiet`: no live lines."""
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            whole = Column(no_wrap=True)
            columns = (TextColumn("{task.description}", table_column=whole), BarColumn(bar_width=20))
            self._bar = Progress(*columns, console=self.console, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._n_runs = self._n_before = self._n_ended = 0
        self._n_seats, self._started = 1, time.monotonic()

    def __enter__(self) -> Board:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(escape(printable(text)))

    def begin(self, n_runs: int, n_done: int, n_seats: int) -> None:
        """How much there is to do."""
        self._n_runs, self._n_before, self._n_seats = n_runs, n_done, n_seats
        self._started = time.monotonic()
        done = f", {n_done} of them done already" if n_done else ""
        at_once = f", {n_seats} at a time" if n_seats > 1 else ""
        self.say(f"{n_runs} run{'s' * (n_runs > 1)}{done}{at_once}")

    def start(self, row: Row) -> None:
        """A run begins, or goes on."""
        if self._bar is None:
            self.say(f"{described(row.settings) or row.name}: begins")
        else:
            self._tasks[row.name] = self._bar.add_task(self._line(row, "starting"), total=None)

    def news(self, row: Row, news: News) -> None:
        """How far a run is."""
        if self._bar is not None:
            text = f"{news.stage} {news.done}/{news.total} {news.text}" if news.total else news.stage
            self._bar.update(
                self._tasks[row.name], description=self._line(row, text), completed=news.done, total=news.total or None
            )

    def end(self, row: Row, metric: str) -> None:
        """A run is over: what came of it, and how long the others will take at this pace."""
        if self._bar is not None:
            self._bar.remove_task(self._tasks.pop(row.name))
        name = described(row.settings) or row.name
        if row.status != "done":
            self.say(f"{name}: {row.status}{f': {row.reason}' if row.reason else ''}")
            return
        self._n_ended += 1
        left = self._n_runs - self._n_before - self._n_ended
        names = dict.fromkeys([metric, *COLUMNS])
        found = ", ".join(f"{COLUMNS.get(n, n)} {shown(row.figures[n])}" for n in names if n in row.figures)
        pace = (time.monotonic() - self._started) / self._n_ended
        rest = f" ({left} to go, about {_duration(left * pace)})" if left > 0 else ""
        self.say(f"{name}: {found or 'done'}{rest}")

    @staticmethod
    def _line(row: Row, text: str) -> str:
        return escape(printable(f"{described(row.settings) or row.name}: {text}"))


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
