"""Preferences of one model's answers over a baseline's, from a file: AlpacaEval's annotations, or our own judgments.

    >>> found = read_annotations(Path("annotations.json.gz"))
    >>> win_rate(found.preferences).win_rate, found.model
    (9.227125, 'claude-2.1_concise')

AlpacaEval's rows: `preference` from 1 (`output_1`, the baseline's, is better) to 2 (`output_2`, the model's); 1.5, in old files
0, is a tie; null is a judgment that failed. In our judgments the first response of an example is the baseline's, the second the
model's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.data.judgments import read_judgments
from preftune.data.read import read_examples
from preftune.data.readers import rows_of_file
from preftune.data.types import Example, Judgment
from preftune.data.write import judged_file
from preftune.errors import ConfigError, DataError, listing, nearest
from preftune.evaluate.winrate import preference, preferences_for
from preftune.label.template import instruction, transcript


@dataclass(frozen=True)
class Annotations:
    """What a file of preferences says, row by row.

    source:        the file.
    preferences:   [row] probability that the model's answer is better; None: no verdict.
    lengths:       [row] of the model's answer, in characters; None where the row has none.
    lengths_base:  [row] of the baseline's.
    instructions:  [row] what was asked; None where the row has none.
    places:        [row] `file:line`.
    model, baseline: their names; "" where the file gives none.
    notes:         what a user should know.
    """

    source: Path
    preferences: list[float | None]
    lengths: list[int | None]
    lengths_base: list[int | None]
    instructions: list[str | None]
    places: list[str]
    model: str = ""
    baseline: str = ""
    notes: tuple[str, ...] = ()

    @property
    def average_length(self) -> int | None:
        """Mean length of the model's answers in whole characters, rounded down; None where the file has no answers."""
        known = [n for n in self.lengths if n is not None]
        return sum(known) // len(known) if known else None


def read_annotations(file: Path, *, data: str | None = None, annotator: str | None = None) -> Annotations:
    """The preferences of AlpacaEval's annotations or of judgments.jsonl; which of them is seen at the first row.

    data:       what was judged, for judgments; default: what `judge` left beside them.
    annotator:  of judgments, whose count; needed where the file holds those of several.

    Raises DataError that lists every row that cannot be used, ConfigError where the file holds several annotators or models.
    """
    if not file.is_file():
        wrong = "a folder" if file.is_dir() else "no such file"
        raise DataError(f"{file}: {wrong}; expected AlpacaEval's annotations.json or our judgments.jsonl")
    rows = list(rows_of_file(file))
    if not rows:
        raise DataError(f"{file}: no rows in it; expected AlpacaEval's annotations or our judgments")
    first = rows[0].value
    if isinstance(first, Mapping) and "shown_order" in first:
        return _of_judgments(file, data, annotator)
    if annotator is not None or data is not None:
        raise ConfigError("--annotator and --data: are for our judgments.jsonl; this file holds AlpacaEval's annotations")
    read = [_row(raw.value, raw.problem) for raw in rows]
    if problems := [f"{raw.place}: {one}" for raw, one in zip(rows, read, strict=True) if isinstance(one, str)]:
        raise DataError(f"{len(problems)} of {len(rows)} rows are no annotations:\n{listing(problems)}")
    values: list[Mapping[str, Any]] = [raw.value for raw in rows]
    coded = [one for one in read if not isinstance(one, str)]
    preferences = [preference(one) for one in coded]
    n_outside = sum(p is None and one is not None for p, one in zip(preferences, coded, strict=True))
    return Annotations(
        source=file,
        preferences=preferences,
        lengths=[_length(row.get("output_2")) for row in values],
        lengths_base=[_length(row.get("output_1")) for row in values],
        instructions=[row["instruction"] if isinstance(row.get("instruction"), str) else None for row in values],
        places=[raw.place for raw in rows],
        model=_one_name(values, "generator_2", file),
        baseline=_one_name(values, "generator_1", file),
        notes=(f"{n_outside} rows have a preference outside 1 to 2, which counts as none",) if n_outside else (),
    )


def _row(row: Any, problem: str) -> float | None | str:
    """The coded preference of a row; text says why it has none."""
    if problem or not isinstance(row, Mapping):
        return problem or "not an object with named columns"
    if "preference" not in row:
        return f"no preference in it (it has {', '.join(map(str, row)) or 'nothing'}); expected a number from 1 to 2, or null"
    coded = row["preference"]
    if coded is None or coded == "":
        return None
    try:
        if isinstance(coded, bool):
            raise ValueError
        return float(coded)
    except (TypeError, ValueError):
        return f"preference is {json.dumps(coded)[:40]}, expected a number from 1 to 2, or null"


def _length(text: Any) -> int | None:
    return len(text) if isinstance(text, str) else None


def _one_name(rows: Sequence[Mapping[str, Any]], column: str, file: Path) -> str:
    names = {str(row[column]) for row in rows if row.get(column) is not None}
    if len(names) > 1:
        shown = ", ".join(sorted(names)[:5])
        raise ConfigError(f"{file}: {column} names {len(names)} models ({shown}); give a file with the rows of one of each")
    return next(iter(names), "")


def _of_judgments(file: Path, data: str | None, annotator: str | None) -> Annotations:
    """Judgments of one annotator over the second response of each example against the first, both orders settled."""
    judgments = read_judgments(file)
    names = sorted({one.annotator for one in judgments})
    if annotator is None and len(names) > 1:
        raise ConfigError(f"{file}: holds judgments of {', '.join(names)}; --annotator says whose are counted")
    if annotator is not None and annotator not in names:
        raise ConfigError(f"--annotator {annotator}: gave no judgment in {file}; {nearest(annotator, names)}")
    mine = [one for one in judgments if annotator is None or one.annotator == annotator]
    groups: dict[str, list[Judgment]] = {}
    for one in mine:
        if {one.i, one.j} == {0, 1}:
            groups.setdefault(one.example, []).append(one)
    n_others = sum({one.i, one.j} != {0, 1} for one in mine)
    notes = [f"{n_others} judgments compare other responses than the first two, and are left out"] if n_others else []
    examples = _judged(file, data)
    if missing := [name for name in groups if examples and name not in examples]:
        raise DataError(f"{file}: example {missing[0]!r} and {len(missing) - 1} more are not in the file that was judged")
    if not examples:
        notes.append(
            f"no {judged_file(file).name} beside the judgments, so lengths are not known; --data names what was judged"
        )
    known = [examples.get(name) for name in groups]
    return Annotations(
        source=file,
        preferences=[p for group in groups.values() for p in preferences_for(group)],
        lengths=[None if e is None else len(transcript(e.responses[1])) for e in known],
        lengths_base=[None if e is None else len(transcript(e.responses[0])) for e in known],
        instructions=[None if e is None else instruction(e.prompt) for e in known],
        places=[f"{file}: example {name}" for name in groups],
        notes=tuple(notes),
    )


def _judged(file: Path, data: str | None) -> dict[str, Example]:
    if data is None and not judged_file(file).is_file():
        return {}
    return {one.id: one for one in read_examples(data or judged_file(file)).examples}
