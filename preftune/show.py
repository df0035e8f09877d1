"""What a person sees while a job runs: notes as they come, one live line, and a line for each evaluation.

On a terminal the line is drawn in place; in a pipe, a log or with `quiet` there are plain lines instead, no control characters.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from preftune.training.job import Finished, Started
from preftune.training.loop import Evaluated, Saved, Step
from preftune.training.prepare import Progress as Stage
from preftune.training.prepare import Said

_LOG_SECONDS = 10.0


class Show:
    """Draws the events of a job. Only rank 0 of several talks."""

    def __init__(self, *, quiet: bool = False) -> None:
        """`quiet`: plain lines, and no line for single steps."""
        self.main = int(os.environ.get("RANK", "0")) == 0
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = self.main and not quiet and self.console.is_terminal
        self.quiet = quiet
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._n_steps = 0
        self._logged = 0.0

    def __enter__(self) -> Show:
        if self.live:
            whole = Column(no_wrap=True)  # on a narrow terminal the bar gives way, never the figures
            columns = [
                TextColumn("{task.description}", table_column=whole),
                TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=whole),
                *([BarColumn(bar_width=20)] if self.console.width >= 110 else []),
                TimeRemainingColumn(compact=True, table_column=whole),
                TextColumn("left", table_column=whole),
            ]
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Any) -> None:
        """Shows one event."""
        if not self.main:
            return
        match event:
            case Said():
                self._say(event)
            case Stage():
                self._advance(event.stage, event.done, event.total)
            case Started():
                self._n_steps = event.n_steps
                self._print(
                    f"[bold]training[/] {event.n_steps} steps, from step {event.step}; run folder {escape(str(event.run.path))}"
                )
            case Step():
                self._step(event)
            case Evaluated():
                self._print(
                    f"  held-out after {event.step:>5} steps  {line(event.metrics)}{'  [green]best[/]' if event.best else ''}"
                )
            case Saved():
                pass
            case Finished():
                self._print(f"[bold green]done[/]: the model is in {escape(str(event.run.model))}")

    def _say(self, said: Said) -> None:
        style = "yellow" if said.kind in ("warning", "diagnosis") else "dim"
        self._print(f"[{style}]{said.kind:>9}[/] {escape(said.message)}")

    def _step(self, step: Step) -> None:
        text = f"{line(step.metrics)} {step.n_tokens / step.seconds:,.0f} tok/s"
        if self._bar is not None:
            self._advance("training", step.index + 1, self._n_steps, text)
        elif not self.quiet and (time.monotonic() - self._logged > _LOG_SECONDS or step.index + 1 == self._n_steps):
            self._logged = time.monotonic()
            self._print(f"step {step.index + 1} {text} ({self._n_steps - step.index - 1} to go)")

    def _advance(self, stage: str, done: int, total: int, text: str = "") -> None:
        if self._bar is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._tasks[stage], completed=done, total=total, description=text or stage)

    def _print(self, text: str) -> None:
        self.console.print(text)
        if not self.console.is_terminal:
            sys.stderr.flush()


def line(metrics: dict[str, float]) -> str:
    """The metrics that a person follows, short."""
    names = {"loss": "loss", "objective/scores": "score", "rewards/accuracies": "acc", "rewards/margins": "margin", "kl": "kl"}
    names |= {} if "kl" in metrics else {"objective/kl": "kl"}
    places = {"loss": 4, "kl": 2, "objective/kl": 2}
    return " ".join(f"{short} {metrics[name]:z.{places.get(name, 3)}f}" for name, short in names.items() if name in metrics)
