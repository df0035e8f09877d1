"""AlpacaEval 2's tables for length control: how hard each instruction is, and the baseline against gamed versions of itself.

    >>> tables = read_tables(Path("alpaca_eval"))
    >>> found = length_controlled(…, difficulty=tables.of(annotations)[0], gamed=tables.gamed)

Two CSV files in one folder, by their original names or with something added to them:

    df_gamed*.csv                index, preference (0…1), std_delta_len, instruction_difficulty, not_gamed_baseline
    instruction_difficulty*.csv  index, instruction_difficulty       (without it, the difficulties of the first file)
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preftune.data.readers import rows_of_file
from preftune.errors import ConfigError, DataError, listing
from preftune.evaluate.annotations import Annotations
from preftune.evaluate.length_control import Gamed

GAMED = ("df_gamed", ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"))
DIFFICULTY = ("instruction_difficulty", ("index", "instruction_difficulty"))
_MOST_MISSING = 0.05  # share of the instructions that a file may lack and still be taken for the benchmark's own


class Row(NamedTuple):
    """A row of a table: where it stands, and its cells by column."""

    place: str
    cells: Mapping[str, str]


@dataclass(frozen=True)
class Tables:
    """Both tables.

    difficulty:    [instruction] in the benchmark's order.
    gamed:         the baseline against gamed versions of itself.
    instructions:  the benchmark's instructions in its order, where somebody named them.
    """

    difficulty: list[float]
    gamed: Gamed
    instructions: list[str] | None = None

    def of(self, found: Annotations) -> tuple[list[float], str]:
        """[row] difficulty, and a note. By what was asked where the instructions are known, else by the row's number.

        By number is AlpacaEval's own way: where a row is missing, all later rows get the difficulty of their neighbour.
        Raises ConfigError for a file that is no run of this benchmark, DataError for instructions that it does not have.
        """
        if self.instructions is not None:
            return self._by_instruction(found, self.instructions), "difficulties by instruction"
        n, known = len(found.preferences), len(self.difficulty)
        if n > known or n < (1 - _MOST_MISSING) * known:
            raise ConfigError(
                f"{found.source}: {n} rows, and the difficulties are those of {known} instructions in their order; for a "
                "part of them name the file of all with --instructions FILE; for prompts of your own give --own-prompts in the "
                "place of --length-control"
            )
        note = "difficulties by row number, as AlpacaEval takes them"
        if n < known:
            note += f"; {known - n} are missing, so rows behind a gap get a neighbour's (--instructions FILE goes by the texts)"
        return self.difficulty[:n], note

    def _by_instruction(self, found: Annotations, instructions: list[str]) -> list[float]:
        """Equal instructions in the order in which they stand; rows beyond them take the last one's."""
        numbers: dict[str, list[int]] = defaultdict(list)
        for k, known in enumerate(instructions):
            numbers[known].append(k)
        taken: dict[str, int] = defaultdict(int)
        values, problems = [], []
        for place, text in zip(found.places, found.instructions, strict=True):
            if text is None or text not in numbers:
                problems.append(f"{place}: {'no instruction' if text is None else repr(text[:60])}")
                continue
            values.append(self.difficulty[numbers[text][min(taken[text], len(numbers[text]) - 1)]])
            taken[text] += 1
        if problems:
            raise DataError(f"{len(problems)} rows have an instruction that --instructions does not hold:\n{listing(problems)}")
        return values


def read_tables(folder: Path, *, instructions: Path | None = None) -> Tables:
    """The tables of a folder. Raises ConfigError where a file is missing, DataError that lists what is wrong in one.

    instructions:  a file with every instruction of the benchmark in its order, such as alpaca_eval.json or whole annotations.
    """
    if not folder.is_dir():
        raise ConfigError(f"--length-control {folder}: no such folder; expected one with {GAMED[0]}*.csv")
    gamed_file = _file(folder, GAMED[0])
    if gamed_file is None:
        raise ConfigError(f"--length-control {folder}: no {GAMED[0]}*.csv in it; expected the columns {', '.join(GAMED[1])}")
    gamed_rows = _rows(gamed_file, GAMED[1])
    difficulty_file = _file(folder, DIFFICULTY[0])
    rows = gamed_rows if difficulty_file is None else _rows(difficulty_file, DIFFICULTY[1])
    difficulty = _difficulties(rows, difficulty_file or gamed_file)
    known = None if instructions is None else _instructions(instructions, len(difficulty))
    return Tables(difficulty, _gamed(gamed_rows, gamed_file), known)


def _file(folder: Path, name: str) -> Path | None:
    """The file by its original name, else the only one whose name begins so."""
    found = sorted(folder.glob(f"{name}*.csv"))
    if (plain := folder / f"{name}.csv") in found:
        return plain
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise ConfigError(f"--length-control {folder}: {names}: which of them? Keep one, or call it {name}.csv")
    return found[0] if found else None


def _rows(file: Path, columns: tuple[str, ...]) -> list[Row]:
    """The rows of a CSV file that has these columns; the first column is the index where it has no name."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            table = csv.reader(opened)
            header = [name.strip() for name in next(table, [])]
            header = ["index", *header[1:]] if header[:1] == [""] and "index" not in header else header
            if missing := [name for name in columns if name not in header]:
                have = ", ".join(header) or "nothing"
                raise DataError(f"{file}:1: no column {', '.join(missing)}; expected {', '.join(columns)}, found {have}")
            rows = []
            for cells in table:
                if cells and len(cells) != len(header):
                    raise DataError(f"{file}:{table.line_num}: {len(cells)} cells, but the header has {len(header)} columns")
                if cells:
                    rows.append(Row(f"{file}:{table.line_num}", dict(zip(header, cells, strict=True))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV: {error}") from None
    if not rows:
        raise DataError(f"{file}: no rows below the header")
    return rows


def _numbers(rows: list[Row], columns: tuple[str, ...], file: Path) -> list[list[float]]:
    """[row][column] as finite numbers. Raises DataError that lists the others."""
    found, problems = [], []
    for row in rows:
        values = []
        for name in columns:
            cell = row.cells[name]
            try:
                values.append(float(cell))
            except ValueError:
                values.append(math.nan)
            if not math.isfinite(values[-1]):
                problems.append(f"{row.place}: {name} is {cell!r}, expected a number")
        found.append(values)
    if problems:
        raise DataError(f"{len(problems)} cells of {file} cannot be used:\n{listing(problems)}")
    return found


def _difficulties(rows: list[Row], file: Path) -> list[float]:
    """[instruction], by the index column; of several rows with one index the first."""
    by_index: dict[int, float] = {}
    for index, value in _numbers(rows, DIFFICULTY[1], file):
        by_index.setdefault(int(index), value)
    if sorted(by_index) != list(range(len(by_index))):
        raise DataError(f"{file}: the column index counts the instructions from 0, each of them; here it has gaps")
    return [by_index[k] for k in range(len(by_index))]


def _gamed(rows: list[Row], file: Path) -> Gamed:
    problems = [f"{r.place}: not_gamed_baseline is {r.cells['not_gamed_baseline']!r}, expected False" for r in rows
                if r.cells["not_gamed_baseline"].strip().lower() not in ("false", "0", "0.0")]  # fmt: skip
    if problems:
        raise DataError(f"{len(problems)} rows of {file} are no gamed baseline's:\n{listing(problems)}")
    judged = [row for row in rows if row.cells["preference"].strip()]  # an empty cell is a judgment that failed
    if not judged:
        raise DataError(f"{file}: no row has a preference")
    table = np.array(_numbers(judged, GAMED[1][1:4], file), np.float64)
    if ((table[:, 0] < 0) | (table[:, 0] > 1)).any():
        at = int(((table[:, 0] < 0) | (table[:, 0] > 1)).argmax())
        raise DataError(f"{judged[at].place}: preference is {table[at, 0]:g}, expected a probability from 0 to 1")
    return Gamed(table[:, 0], table[:, 1], table[:, 2])


def _instructions(file: Path, n: int) -> list[str]:
    if not file.is_file():
        raise ConfigError(f"--instructions {file}: no such file")
    rows = list(rows_of_file(file))
    bad = [r.place for r in rows if not isinstance(r.value, Mapping) or not isinstance(r.value.get("instruction"), str)]
    if bad:
        raise DataError(f"{bad[0]}: no instruction in it, and {len(bad) - 1} more rows; expected a column `instruction`")
    if len(rows) != n:
        raise ConfigError(
            f"--instructions {file}: {len(rows)} rows, expected the {n} of the table of difficulties in their order"
        )
    return [row.value["instruction"] for row in rows]
