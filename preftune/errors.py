"""Every error that a user can cause, and the exit code that each one leaves the terminal with.

    PreftuneError                    exit 2   a mistake that the user can mend; never shown as a traceback
    ├── ConfigError                           a setting: unknown, of the wrong type, out of range, contradictory
    ├── DataError                             rows: missing, malformed, empty; names file:line, lists all at once
    ├── ModelError                            a model folder: missing, incomplete, unsupported, unsafe
    ├── TrainingError                         the run itself: NaN loss, step 0 is not what it must be
    ├── StorageError                          a disk that is full, a folder that cannot be written, a torn file
    └── ServerError                           a server: cannot be reached, refuses the key, leaves too much unanswered
    Interrupted                      exit 75  SIGTERM or Ctrl-C: everything is saved, and resuming goes on

An error says four things: what is wrong, where (a setting or `file:line`), what was expected, what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class PreftuneError(Exception):
    """A mistake that the user can mend. The message is all that the terminal shows."""

    exit_code = 2


class ConfigError(PreftuneError):
    """A setting is unknown, has the wrong type, is out of range or contradicts another."""


class DataError(PreftuneError):
    """Rows are missing, malformed or empty. The message names `file:line` for each (the first 20, and the count)."""


class ModelError(PreftuneError):
    """A model or tokenizer folder is missing, incomplete, unsupported or unsafe."""


class TrainingError(PreftuneError):
    """Training cannot go on: a loss that is not finite, or a step 0 that is not what it must be."""


class StorageError(PreftuneError):
    """A file cannot be written, or what was read back is not what was written."""


class ServerError(PreftuneError):
    """A server that was named cannot be reached, refuses the key or the model, or left too much unanswered."""


class Interrupted(PreftuneError):
    """The run was stopped by a signal. Its state is saved; the message says how to resume."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that proposes the known name closest to `name`, or lists them all when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:  # "betta" against "loss.beta": compare the last parts too
        last = {k.rsplit(".", 1)[-1]: k for k in names}
        close = [last[c] for c in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.6)]
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(names)}" if names else "none is known"


def listing(problems: list[str], *, shown: int = 20) -> str:
    """Problems, `place: reason`, one a line, the first `shown` of them, then how many more there are.

    A long reason that stood before is not written out again.
    """
    lines, said = [], set()
    for problem in problems[:shown]:
        place, _, reason = problem.partition(": ")
        lines.append(f"  {place}: the same" if len(reason) > 40 and reason in said else f"  {problem}")
        said.add(reason)
    more = len(problems) - shown
    return "\n".join(lines) + (f"\n  … and {more} more" if more > 0 else "")


_DRIVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters, and those that turn the direction of writing, spelled out: data drive no terminal."""
    return _DRIVES.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
