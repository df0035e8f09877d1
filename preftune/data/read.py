"""From whatever holds the data to Examples: formats detected, bad rows listed or set aside, every row accounted for.

    >>> data = read_examples("pairs.jsonl")
    >>> data.notes
    ['pairs.jsonl: 400 rows read as prompt_chosen_rejected (columns prompt, chosen, rejected)']

The format of a source is the one that most of its first rows fit by their columns. A bad row stops everything, after all have
been read, with the first 20 listed; with `quarantine` they are moved to that file instead. used + dropped + quarantined = read.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from preftune.data.formats import Format
from preftune.data.readers import Raw
from preftune.data.rows import BadRow, check_prompt, check_response, kind, text_of
from preftune.data.sources import Source, open_sources
from preftune.data.types import Example
from preftune.errors import ConfigError, DataError, listing, nearest
from preftune.files import write_atomic
from preftune.registry import FORMATS

_SNIFFED = 100  # rows looked at to detect a format
_JSON_CELLS = (
    "messages",
    "conversations",
    "responses",
    "scores",
    "ranks",
    "pairs",
    "labels",
    "completions",
)  # lists, even in CSV
_TEXT_CELLS = ("prompt", "chosen", "rejected", "completion")  # text, or messages as JSON
_PYTHON_LIST = re.compile(r"\[?\s*\{\s*'(role|content|from|value)'\s*:")


@dataclass(frozen=True)
class Dataset:
    """What was read, and what became of every row: len(examples) + n_dropped + n_quarantined == n_read.

    examples:       in the order of the sources, their ids unique.
    formats:        format -> number of examples; "example" for Examples that were handed in.
    n_read:         rows found, bad ones included; blank lines are no rows.
    n_dropped:      rows left out by a rule rather than for being bad. Reading drops none; later stages may.
    n_quarantined:  bad rows that were set aside.
    bad:            (place, reason) of each of those.
    notes:          what a user should see: formats and columns, splits, repeated rows, the quarantine file.
    """

    examples: list[Example]
    formats: dict[str, int]
    n_read: int
    n_dropped: int
    n_quarantined: int
    notes: list[str]
    bad: list[tuple[str, str]] = field(default_factory=list)


def read_examples(
    source: str | Path | Iterable[Any],
    *,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    quarantine: str | Path | None = None,
    max_rows: int | None = None,
    constants: Mapping[str, Any] | None = None,
    stop: bool = True,
) -> Dataset:
    """All Examples of a source or a list of sources.

    Args:
        source: what `preftune.data.sources` lists: a file, a folder, a saved dataset, a hub id, rows, Examples, a dataset.
        format: a name in FORMATS, or "auto": detected for each source by its columns.
        fields: our column name -> the name that the file has for it; "-" leaves the column out.
        quarantine: JSONL file for bad rows, written whole ({source, reason, row} each). None: a bad row is an error.
        max_rows: stop after this many rows.
        constants: columns that every row gets, under our names; what a format is to do with all rows alike (`aspects`).
        stop: False: bad rows are left out and listed in `Dataset.bad`, with or without a quarantine file.

    Raises:
        DataError: nothing to read, a damaged file, columns of no known format, bad rows, no usable row.
        ConfigError: an unknown format or an unknown name in `fields`.
    """
    if format != "auto":
        _format(format)
    forced = None if format == "auto" else format
    reading = _Reading(_checked_fields(fields or {}), constants or {}, forced, quarantine is not None, max_rows)
    sources = open_sources(source)
    aside = None if quarantine is None else Path(quarantine).expanduser()
    if aside is not None:
        _check_quarantine(aside, sources)
    for one in sources:
        reading.take(one)
    return reading.finish(aside, stop=stop and aside is None)


@dataclass
class _Reading:
    """The state of one read over its sources."""

    fields: Mapping[str, str]  # "" where our column is to be left out
    constants: Mapping[str, Any]
    forced: str | None
    keep_bad: bool
    max_rows: int | None
    examples: list[Example] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, tuple[Example, str]] = field(default_factory=dict)  # id -> the example and its place
    repeats: dict[str, int] = field(default_factory=dict)  # id -> the number that its next repetition may get
    n_read: int = 0
    n_repeated: int = 0

    def take(self, source: Source) -> None:
        """Reads one source to its end."""
        self.notes += source.notes
        rows = source.rows()
        head = list(itertools.islice(rows, _SNIFFED))
        before = self.n_read
        name, read = "", None
        seen: dict[str, None] = {}
        for raw in itertools.chain(head, rows):
            if self.max_rows is not None and self.n_read >= self.max_rows:
                self.notes.append(f"{source.name}: stopped after {self.max_rows} rows, as asked")
                break
            self.n_read += 1
            if isinstance(raw.value, Mapping) and not raw.problem:
                seen.update(dict.fromkeys(map(str, raw.value)))
                if read is None:
                    name = self._detect(source, head if raw in head else [raw])
                    read = _format(name)
            self._row(raw, name, read, source.cells)
        if self.n_read == before and self.max_rows != self.n_read:
            self.notes.append(f"{source.name}: no rows")
        if name:
            self._note(source, name, list(seen), self.n_read - before)

    def _note(self, source: Source, name: str, seen: list[str], n: int) -> None:
        used = {*_format(name).required, *_format(name).optional}
        ours = {theirs: f"{mine} from {theirs}" for mine, theirs in self.fields.items() if theirs}
        hidden = set(self.fields) - set(ours)
        read = [ours.get(c, c) for c in seen if c in ours or (c in used and c not in hidden)]
        left = [c for c in seen if c not in ours and (c not in used or c in hidden)]
        unused = f"; not used: {', '.join(left)}" if left else ""
        self.notes.append(f"{source.name}: {n} row{'s'[: n != 1]} read as {name} (columns {', '.join(read)}{unused})")

    def _detect(self, source: Source, head: list[Raw]) -> str:
        """The format that most of the first rows fit, by name."""
        rows = [r.value for r in head if isinstance(r.value, Mapping) and not r.problem]
        found = list(dict.fromkeys(str(c) for row in rows for c in row))
        self._check_renaming(source, found)
        renamed = [_renamed(row, self.fields) for row in rows]
        if self.forced:
            if not any(all(c in row for c in _format(self.forced).required) for row in renamed):
                raise DataError(_no_format(source.name, found, _columns(renamed), [self.forced]))
            return self.forced
        votes = Counter(n for row in renamed if (n := next((n for n in FORMATS if _format(n).fits(row)), None)))
        if not votes:
            raise DataError(_no_format(source.name, found, _columns(renamed), list(FORMATS)))
        return votes.most_common(1)[0][0]

    def _check_renaming(self, source: Source, found: list[str]) -> None:
        for ours, theirs in self.fields.items():
            if theirs and theirs not in found and ours not in found:
                raise DataError(f"{source.name}: fields.{ours}={theirs}: there is no such column; {nearest(theirs, found)}")

    def _row(self, raw: Raw, name: str, read: Format | None, cells: bool) -> None:
        try:
            if raw.problem:
                raise BadRow(raw.problem)
            if isinstance(raw.value, Example):
                example, name = _checked(raw.value), "example"
            elif read is None or not isinstance(raw.value, Mapping):
                raise BadRow(f"a row must be an object with named columns, found {kind(raw.value)}")
            else:
                row = _renamed(raw.value, self.fields) | dict(self.constants)
                example = replace(read(_from_cells(row) if cells else row), source=raw.place)
            self.examples.append(self._unique(example, raw.place))
            self.formats[name] += 1
        except BadRow as reason:
            self.problems.append(f"{raw.place}: {reason}")
            if self.keep_bad:
                self.bad.append({"source": raw.place, "reason": str(reason), "row": raw.value})

    def _unique(self, example: Example, place: str) -> Example:
        """The example, its id made unique: the same text again gets #2, #3, …; other text under a known id is a bad row."""
        if example.id not in self.names:
            self.names[example.id] = (example, place)
            return example
        known, earlier = self.names[example.id]
        if (known.prompt, known.responses) != (example.prompt, example.responses):
            raise BadRow(
                f"the id {example.id!r} stands for another prompt or other responses at {earlier}; give each row its own id, "
                "or set fields.id=- to have rows named by their content"
            )
        self.n_repeated += 1
        number = self.repeats.get(example.id, 2)
        while (name := f"{example.id}#{number}") in self.names:
            number += 1
        self.repeats[example.id] = number + 1
        named = replace(example, id=name)
        self.names[name] = (named, place)
        return named

    def finish(self, quarantine: Path | None, *, stop: bool) -> Dataset:
        """The Dataset, after the quarantine file is written; or the error that lists what is bad."""
        n_bad = len(self.problems)
        if quarantine is not None:
            write_atomic(quarantine, "".join(_bad_line(b) for b in self.bad))
            if n_bad:
                self.notes.append(f"{n_bad} of {self.n_read} rows cannot be used; moved to {quarantine}, each with the reason")
        if not self.n_read:
            raise DataError("; ".join(n for n in self.notes if n.endswith("no rows")) or "data: no rows")
        if not self.examples:
            raise DataError(f"no usable row: all {n_bad} rows that were read are bad\n{listing(self.problems)}")
        if n_bad and stop:
            raise DataError(
                f"{n_bad} of {self.n_read} rows cannot be used\n{listing(self.problems)}\n"
                "Mend them, or have them moved to a file, each with the reason, and go on with the others: --quarantine FILE "
                "(preftune train: quarantine=FILE)."
            )
        if self.n_repeated:
            self.notes.append(
                f"{self.n_repeated} {'row repeats' if self.n_repeated == 1 else 'rows repeat'} the prompt and responses of an "
                "earlier one; kept, "
                "with #2, #3, … behind the id"
            )
        bad = [(place, reason) for place, _, reason in (problem.partition(": ") for problem in self.problems)]
        return Dataset(self.examples, dict(self.formats), self.n_read, 0, n_bad, self.notes, bad)


def _format(name: str) -> Format:
    found = FORMATS[name]
    if not isinstance(found, Format):
        raise TypeError(f"{name}: a data format is a function under @columns(...)")
    return found


def _checked_fields(fields: Mapping[str, str]) -> Mapping[str, str]:
    known = dict.fromkeys(c for n in FORMATS for c in (*_format(n).required, *_format(n).optional))
    for ours in fields:
        if ours not in known:
            raise ConfigError(f"fields.{ours}: no data format has a column {ours!r}; {nearest(ours, known)}")
    return {ours: "" if theirs == "-" else theirs for ours, theirs in fields.items()}


def _check_quarantine(quarantine: Path, sources: list[Source]) -> None:
    """The quarantine file must not replace data or any file but a former quarantine, nor be read as data next time."""
    whole = quarantine.resolve()
    for source in sources:
        if source.path is not None and whole == source.path.resolve():
            raise ConfigError(f"quarantine={quarantine}: this is the data itself; name another file")
        if source.folder is not None and whole.parent == source.folder.resolve():
            raise ConfigError(f"quarantine={quarantine}: inside the folder of the data it would be read as data next time")
    if whole.exists() and not _is_quarantine(whole):
        raise ConfigError(f"quarantine={quarantine}: something else is in the way, which would be lost; name another file")


def _is_quarantine(path: Path) -> bool:
    """Whether the file is empty, or begins with a row that was set aside."""
    try:
        with path.open("rb") as file:
            first = file.readline()
        return not first or {"source", "reason", "row"} == set(json.loads(first))
    except (OSError, ValueError, TypeError):
        return False


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(c for row in rows for c in row))


def _renamed(row: Mapping[Any, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The row under our column names."""
    if not fields:
        return {str(k): v for k, v in row.items()}
    gone = {theirs for theirs in fields.values() if theirs} | {ours for ours, theirs in fields.items() if not theirs}
    kept = {str(k): v for k, v in row.items() if k not in gone}
    return kept | {ours: row[theirs] for ours, theirs in fields.items() if theirs and theirs in row}


def _from_cells(row: dict[str, Any]) -> dict[str, Any]:
    """A CSV row with the lists that stand in its cells as JSON."""
    for name, text in row.items():
        if name in _JSON_CELLS and text:
            try:
                row[name] = json.loads(text)
            except ValueError:
                raise BadRow(f"{name} is not JSON, as a list in a CSV cell must be{_pandas(text)}") from None
        elif name in _TEXT_CELLS and text.lstrip()[:1] in ("[", "{"):
            if _PYTHON_LIST.match(text.lstrip()):
                raise BadRow(f"{name} is a list in Python's spelling, not in JSON{_pandas(text)}")
            row[name] = _messages_or_text(text)
    return row


def _pandas(text: str) -> str:
    return "; pandas writes lists this way: save as JSONL or Parquet instead" if "'" in text else ""


def _messages_or_text(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    listed = value if isinstance(value, list) else [value]
    shapes = ({"role", "content"}, {"from", "value"})
    return value if listed and all(isinstance(m, dict) and any(s <= m.keys() for s in shapes) for m in listed) else text


def _checked(example: Example) -> Example:
    """An Example that was handed in, under the rules that rows have."""
    check_prompt(example.prompt, "prompt")
    for part in (example.prompt, *example.responses):
        for text in [part] if isinstance(part, str) else [m.content for m in part]:
            text_of(text, "prompt or response")
    for i, response in enumerate(example.responses):
        check_response(response, f"responses[{i}]")
    n = len(example.responses)
    if not n or any(p.winner not in range(n) or p.loser not in range(n) for p in example.pairs):
        raise BadRow(f"pairs must name two of the {n} responses" if n else "there is no response")
    for p in example.pairs:
        if example.responses[p.winner] == example.responses[p.loser]:
            raise BadRow(f"responses[{p.winner}] and responses[{p.loser}] are identical: there is nothing to prefer")
    for name, values in (("labels", example.labels), ("scores", example.scores)):
        if len(values) not in (0, n):
            raise BadRow(f"{name} has {len(values)} entries, but there are {n} responses")
    return example


def _no_format(name: str, found: list[str], columns: list[str], formats: list[str]) -> str:
    """What the columns are, which format comes nearest, how to name columns, and what each format needs."""
    asked = f"format {formats[0]!r} does not fit" if len(formats) == 1 else "no data format fits"

    def closeness(n: str) -> tuple[int, int]:
        return sum(c in columns for c in _format(n).required), -abs(len(_format(n).required) - len(columns))

    best = max(formats, key=closeness)
    lacking = [c for c in _format(best).required if c not in columns]
    free = [c for c in found if c not in _format(best).required]
    guess = [f"{c}={(difflib.get_close_matches(c, free, n=1) or ['NAME'])[0]}" for c in lacking]
    needs = "\n".join(f"  {n:<24} {', '.join(_format(n).required)}" for n in FORMATS)
    missing = f"lacks {', '.join(lacking)}" if lacking else "has these columns, but no row has all of them"
    rename = f"If a column has another name, say so: {_naming(guess)}\n" if guess else ""
    return (
        f"{name}: {asked} its columns: {', '.join(found) or '(none)'}\n"
        f"Nearest is {best}, of which it {missing}.\n{rename}Each format and its columns:\n{needs}"
    )


def _naming(columns: Sequence[str]) -> str:
    """The settings, then the options, that name columns."""
    settings, options = (" ".join(f"{before}{c}" for c in columns) for before in ("fields.", "--field "))
    return f"{options} (preftune train: {settings})"


def _bad_line(bad: dict[str, Any]) -> str:
    """A row of the quarantine file; what JSON cannot hold (NaN, dates, half characters) is written as text or escaped."""
    return json.dumps(_plain(bad), ensure_ascii=True, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
