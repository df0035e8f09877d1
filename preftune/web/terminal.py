"""Judging in a terminal, by keys alone: the same pairs, order and file as the page.

1 2 choose   0 tie   b both bad   s skip   u undo   w only slightly   r reason   q leave
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from preftune.data.types import Example
from preftune.errors import printable
from preftune.web.show import text_of
from preftune.web.store import Choice, Given, Store, Task

_CHOICES: dict[str, Choice] = {"1": "left", "2": "right", "0": "tie", "b": "both_bad", "s": "skip"}
_SAID = {"left": "answer 1", "right": "answer 2", "tie": "a tie", "both_bad": "both bad", "skip": "skipped"}
_HELP = "1 2 choose · 0 tie · b both bad · s skip · u undo · w only slightly · r reason · q leave"
_TAB = "terminal"


def judge_in_terminal(store: Store, name: str) -> None:
    """Asks until there is nothing left, or until q or the end of input. What was answered is on the disk."""
    console = Console(highlight=False)
    task = store.next(name, tab=_TAB)
    with _keys() as read:
        while task is not None:
            _show(console, store, task, name)
            given = _ask(console, read, task)
            if given is None:
                break
            if given == "undo":
                before = store.undo(name, tab=_TAB)
                console.print("taken back" if before else "there is nothing to take back", style="dim")
                task = before or task
                continue
            store.judge(name, given)
            console.print(f"saved: {_SAID[given.choice]}", style="dim")
            task = store.next(name, tab=_TAB)
    if task is None:
        console.print("all done, thank you")


def _show(console: Console, store: Store, task: Task, name: str) -> None:
    progress = store.progress(name)
    console.rule(f"{progress.done} judged, {progress.left} left")
    console.print(Panel(printable(_prompt(task.example)), title="prompt", title_align="left", border_style="dim"))
    answers = [Text(printable(text_of(task.example.responses[k]))) for k in (task.left, task.right)]
    wide = console.width >= 100
    width = (console.width - 1) // 2 if wide else console.width
    panels = [Panel(text, title=f"answer {n}", title_align="left", width=width) for n, text in enumerate(answers, 1)]
    console.print(Columns(panels, padding=(0, 1)) if wide else panels[0])
    if not wide:
        console.print(panels[1])


def _ask(console: Console, read: Callable[[], str], task: Task) -> Given | Literal["undo"] | None:
    """A judgment, or what else was asked for; None to leave."""
    console.print(_HELP, style="dim")
    start, slight, why = time.monotonic(), False, ""
    while True:
        key = read().lower()
        if key in ("", "q", "\x03", "\x04"):
            return None
        if key == "u":
            return "undo"
        if key == "w":
            slight = not slight
            console.print("only slightly better" if slight else "clearly better", style="dim")
        elif key == "r":
            console.print("reason: ", end="")
            why = _line(read, console)
        elif key in _CHOICES:
            seconds = round(time.monotonic() - start, 1)
            return Given(secrets.token_hex(8), task.item, _CHOICES[key], "slight" if slight else "clear", why, seconds)
        elif not key.isspace():
            console.print(f"{printable(key)!r}: {_HELP}", style="dim")


def _line(read: Callable[[], str], console: Console) -> str:
    """Keys up to Enter, shown as they come."""
    text = ""
    while (key := read()) not in ("\r", "\n", ""):
        if key in ("\x7f", "\b"):
            text = text[:-1]
            console.file.write("\b \b")
        elif key.isprintable():
            text += key
            console.file.write(key)
        console.file.flush()
    console.print()
    return text.strip()


@contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """Reads one key at a time; from a pipe, one character. "" is the end."""
    if not sys.stdin.isatty():
        yield lambda: sys.stdin.read(1)
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield lambda: sys.stdin.read(1)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _prompt(example: Example) -> str:
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n\n".join(f"{m.role}:\n{m.content}" for m in example.prompt)
