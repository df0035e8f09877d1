"""An AlpacaEval run: a model's outputs and a baseline's to the same instructions, judged, in AlpacaEval's own files.

    model_outputs.json    instruction, output, generator (and dataset)
    annotations.json      instruction, output_1 (baseline), generator_1, output_2 (model), generator_2, annotator, preference

Which of the two the judge sees first is AlpacaEval's seeded coin; two equal outputs are a tie that nobody is asked about; a
preference is null where the judge gave none.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from preftune.data.judgments import settled, share_of_i
from preftune.data.readers import rows_of_file
from preftune.data.types import Example, Judgment, Message, content_id
from preftune.errors import ConfigError, DataError, listing
from preftune.files import write_atomic


class Output(NamedTuple):
    """What somebody answered to an instruction."""

    place: str
    instruction: str
    output: str
    generator: str = ""
    dataset: str = ""


def read_instructions(file: Path) -> list[Output]:
    """The instructions of AlpacaEval's prompt file, each without an output. Raises DataError that lists what is none."""
    return [one._replace(output="", generator="") for one in _read(file, outputs=False)]


def read_outputs(file: Path) -> list[Output]:
    """Outputs of one model, as model_outputs.json holds them. Raises DataError that lists every row that is none."""
    found = _read(file, outputs=True)
    names = sorted({one.generator for one in found if one.generator})
    if len(names) > 1:
        raise ConfigError(f"{file}: generator names {len(names)} models ({', '.join(names[:5])}); give the outputs of one")
    return found


def in_order_of(wanted: Sequence[Output], given: Sequence[Output], file: Path) -> list[Output]:
    """`given`, one for each wanted instruction; equal instructions in their turn. Raises DataError for those without one."""
    by_text: dict[str, list[Output]] = defaultdict(list)
    for one in given:
        by_text[one.instruction].append(one)
    taken: Counter[str] = Counter()
    found, problems = [], []
    for one in wanted:
        known = by_text.get(one.instruction, [])
        if not known:
            problems.append(f"{one.place}: {one.instruction[:60]!r}")
            continue
        found.append(known[min(taken[one.instruction], len(known) - 1)])
        taken[one.instruction] += 1
    if problems:
        raise DataError(f"{file}: has no output for {len(problems)} of {len(wanted)} instructions:\n{listing(problems)}")
    return found


def comparisons(theirs: Sequence[Output], ours: Sequence[Output]) -> list[Example]:
    """An example per instruction: first the baseline's output, then the model's. The same again for the same texts."""
    seen: Counter[str] = Counter()
    examples = []
    for base, mine in zip(theirs, ours, strict=True):
        content = content_id(mine.instruction, base.output, mine.output)
        name = f"{content}-{seen[content]}" if seen[content] else content
        seen[content] += 1
        prompt = (Message("user", mine.instruction),)
        examples.append(Example(name, prompt, (base.output, mine.output), source=mine.place))
    return examples


def annotation_rows(
    theirs: Sequence[Output], ours: Sequence[Output], examples: Sequence[Example], judgments: Sequence[Judgment], annotator: str
) -> list[dict[str, Any]]:
    """Rows of annotations.json; `judgments` are this annotator's."""
    verdicts = {one.example: one for one in settled(judgments)}
    rows = []
    for base, mine, example in zip(theirs, ours, examples, strict=True):
        found = verdicts.get(example.id)
        share = None if found is None else share_of_i(found)  # of the baseline's output, which is response 0
        row: dict[str, Any] = {"dataset": mine.dataset} if mine.dataset else {}
        row |= {
            "instruction": mine.instruction,
            "output_1": base.output,
            "generator_1": base.generator,
            "output_2": mine.output,
            "generator_2": mine.generator,
            "annotator": annotator,
            "preference": None if share is None else 2.0 - share,
            "time_per_example": None if found is None else found.seconds,
        }
        rows.append(row)
    return rows


def output_rows(outputs: Sequence[Output]) -> list[dict[str, str]]:
    """Rows of model_outputs.json."""
    return [
        ({"dataset": one.dataset} if one.dataset else {})
        | {"instruction": one.instruction, "output": one.output, "generator": one.generator}
        for one in outputs
    ]


def write_array(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSON array as AlpacaEval writes it, whole or not at all. Raises StorageError."""
    write_atomic(file, json.dumps(rows, indent=2, allow_nan=False) + "\n")


def _read(file: Path, *, outputs: bool) -> list[Output]:
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected rows with `instruction`{' and `output`' if outputs else ''}")
    rows = list(rows_of_file(file))
    found, problems = [], []
    for raw in rows:
        row = raw.value
        wanted = ("instruction", "output") if outputs else ("instruction",)
        if raw.problem or not isinstance(row, Mapping):
            problems.append(f"{raw.place}: {raw.problem or 'not an object with named columns'}")
        elif wrong := [name for name in wanted if not isinstance(row.get(name), str)]:
            problems.append(f"{raw.place}: {wrong[0]} is {str(row.get(wrong[0]))[:40]!r}, expected a text")
        elif not row["instruction"].strip():
            problems.append(f"{raw.place}: the instruction is empty")
        else:
            text = row["output"] if outputs else ""
            names = [row[name] if isinstance(row.get(name), str) else "" for name in ("generator", "dataset")]
            found.append(Output(raw.place, row["instruction"], text, *names))
    if problems or not found:
        what = f"{len(problems)} of {len(rows)} rows cannot be used:\n{listing(problems)}" if problems else "no rows in it"
        raise DataError(f"{file}: {what}")
    return found
