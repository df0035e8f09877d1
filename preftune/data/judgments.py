"""The file of judgments: JSONL that only grows, one verdict a line, each with who judged, when, and in which order shown.

    {"example": "5f1c…", "i": 0, "j": 1, "verdict": "i", "annotator": "anna", "shown_order": [1, 0], "seconds": 8.2, …}

A line is one act of judging and is never changed. Somebody who sees the same two responses again, in the other order or on
second thought, adds a line; `settled` says what all lines of an annotator come to.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from preftune.data.types import Judgment, Strength, Verdict
from preftune.errors import DataError, listing
from preftune.files import append_lines, storage

_NAMES = tuple(f.name for f in fields(Judgment))
_REQUIRED = ("example", "i", "j", "verdict", "annotator", "shown_order")
_VERDICTS: tuple[str, ...] = get_args(Verdict)
_SHARES: Mapping[Verdict, float | None] = {"i": 1.0, "j": 0.0, "tie": 0.5, "both_bad": 0.5, "unscored": None}
_STRENGTHS: tuple[str, ...] = get_args(Strength)
_MIRRORED: Mapping[Verdict, Verdict] = {"i": "j", "j": "i", "tie": "tie", "both_bad": "both_bad", "unscored": "unscored"}


def append_judgments(path: Path, judgments: Iterable[Judgment]) -> None:
    """Adds verdicts to the file, which is made if need be; they are on the disk when this returns. Raises StorageError."""
    append_lines(path, [{name: getattr(judgment, name) for name in _NAMES} for judgment in judgments])


def read_judgments(path: str | Path) -> list[Judgment]:
    """All verdicts of a file in its order; a last line without its end, as a crash leaves it, is no verdict.

    Raises DataError that lists every line that is no judgment, and where there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected judgments, one JSON object a line")
    with storage(path, "read this file"):
        lines = path.read_bytes().split(b"\n")[:-1]
    found, problems = [], []
    for at, line in enumerate(lines, 1):
        try:
            found.append(_judgment(line))
        except (ValueError, TypeError) as reason:
            problems.append(f"{path}:{at}: {reason}")
    if problems:
        raise DataError(f"{len(problems)} of {len(lines)} lines are not judgments:\n{listing(problems)}")
    return found


def share_of_i(judgment: Judgment) -> float | None:
    """How far response `i` won: the judge's own probability, else 1, 0, or one half for no preference; None for unscored."""
    return _SHARES[judgment.verdict] if judgment.p is None or judgment.verdict == "unscored" else judgment.p


def mirrored(judgment: Judgment) -> Judgment:
    """The same verdict with `i` and `j` exchanged."""
    p = None if judgment.p is None else 1.0 - judgment.p
    return replace(judgment, i=judgment.j, j=judgment.i, verdict=_MIRRORED[judgment.verdict], p=p)


def settled(judgments: Iterable[Judgment]) -> list[Judgment]:
    """One verdict of each annotator on each two responses, i < j, in the order in which the first of each was given.

    Of several with the same order shown the last counts. Over both orders: the verdict that they share; a tie where they
    differ; unscored where one of them is. `p` is the mean over the orders, None where one has none.
    """
    groups: dict[tuple[str, int, int, str], dict[tuple[int, int], Judgment]] = defaultdict(dict)
    for judgment in judgments:
        one = judgment if judgment.i < judgment.j else mirrored(judgment)
        groups[one.example, one.i, one.j, one.annotator][one.shown_order] = one
    return [_settled(list(orders.values())) for orders in groups.values()]


def _settled(orders: list[Judgment]) -> Judgment:
    first = orders[0]
    if len(orders) == 1:
        return first
    verdicts = {one.verdict for one in orders}
    known = [one.p for one in orders if one.p is not None]
    verdict: Verdict = "unscored" if "unscored" in verdicts else first.verdict if len(verdicts) == 1 else "tie"
    p = sum(known) / len(known) if len(known) == len(orders) and verdict != "unscored" else None
    why = " | ".join(dict.fromkeys(one.why for one in orders if one.why))
    return replace(first, verdict=verdict, p=p, seconds=sum(one.seconds for one in orders), why=why)


def _judgment(line: bytes) -> Judgment:
    """One line. Raises ValueError or TypeError with the reason."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if missing := [name for name in _REQUIRED if name not in row]:
        raise ValueError(f"{', '.join(missing)} is missing; a judgment has {', '.join(_REQUIRED)}")
    if unknown := [name for name in row if name not in _NAMES]:
        raise ValueError(f"{', '.join(unknown)}: a judgment has no such field; it has {', '.join(_NAMES)}")
    _check(row)
    return Judgment(**row | {"shown_order": tuple(row["shown_order"]), "seconds": float(row.get("seconds", 0.0))})


def _check(row: dict[str, Any]) -> None:
    texts = [row[name] for name in ("example", "annotator")] + [row.get("at", ""), row.get("why", "")]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("example, annotator, at and why are texts")
    i, j, order = row["i"], row["j"], row["shown_order"]
    if type(i) is not int or type(j) is not int or i < 0 or j < 0 or i == j:
        raise ValueError(f"i={i!r}, j={j!r}: expected the numbers of two different responses, counted from 0")
    if order not in ([i, j], [j, i]):
        raise ValueError(f"shown_order is {order!r}, expected [{i}, {j}] or [{j}, {i}]")
    if row["verdict"] not in _VERDICTS:
        raise ValueError(f"verdict is {row['verdict']!r}, expected one of {', '.join(_VERDICTS)}")
    if row.get("strength", "") not in _STRENGTHS:
        raise ValueError(f"strength is {row['strength']!r}, expected slight, clear, or nothing")
    p, seconds = row.get("p"), row.get("seconds", 0.0)
    if p is not None and not (_number(p) and 0 <= p <= 1):
        raise ValueError(f"p is {p!r}, expected a probability from 0 to 1, or null")
    if not (_number(seconds) and seconds >= 0):
        raise ValueError(f"seconds is {seconds!r}, expected a number from 0 on")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
