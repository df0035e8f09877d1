"""One function per kind of file: its rows in order, each with its place, as they stand there.

    >>> for raw in rows_of_file(Path("pairs.jsonl")):
    ...     print(raw.place, raw.value)

A line that cannot be read is a Raw with a `problem`, so that it can be set aside. A file that cannot be read (not what its name
says, cut off in the middle) is a DataError, since nobody knows what is missing.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from preftune.errors import DataError

_BLANK = re.compile(r"[ \t\n\r]*")
_BOM = b"\xef\xbb\xbf"


class Raw(NamedTuple):
    """A row as it stands in its source."""

    place: str  # file:line, or dataset[row]
    value: Any  # the row; the line as text where it cannot be read
    problem: str = ""  # why it cannot be read; empty where it can


def ending_of(path: Path) -> str:
    """What the file's name says that it is: ".jsonl" for "a.jsonl" and "a.jsonl.gz"; "" where it is no data file."""
    suffixes = [s.lower() for s in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    ending = suffixes[-1 - packed] if len(suffixes) > packed else ""
    return ending if ending in READERS and not (packed and ending == ".parquet") else ""


def rows_of_file(path: Path) -> Iterator[Raw]:
    """The rows of one data file, read as its ending says. Raises DataError."""
    ending = ending_of(path)
    if not ending:
        raise DataError(f"{path}: not a data file by its name; expected one that ends in {', '.join(READERS)} (or .json.gz, …)")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes); expected rows")
    return READERS[ending](path)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked where its name ends in .gz; failures become a DataError."""
    packed = path.suffix.lower() == ".gz"
    try:
        with path.open("rb") as plain:
            start = plain.read(4)
            plain.seek(0)
            if packed and start[:2] != b"\x1f\x8b":
                raise DataError(f"{path}: the name ends in .gz, but this is not a gzip file; rename it, or pack it with gzip")
            if not packed and start[:2] == b"\x1f\x8b":
                raise DataError(f"{path}: this is a gzip file; rename it to {path.name}.gz")
            if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path}: this text is UTF-16; expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8")
            if not packed:
                yield plain
            else:
                with gzip.GzipFile(fileobj=plain) as unpacked:
                    yield unpacked  # type: ignore[misc]  # reads like any binary file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut off ({error}); copy or download it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset in bytes, and bytes of each line; a byte order mark at the start is left out."""
    with _opened(path) as file:
        offset = 0
        for number, line in enumerate(file, 1):
            start = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            yield number, offset + start, line[start:]
            offset += len(line)


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    return (
        f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {offset + error.start} of the file; "
        "save the text as UTF-8 (iconv -f LATIN1 -t UTF-8)"
    )


def _json(path: Path) -> Iterator[Raw]:
    """An array, one object per line, or one object; which of them is seen at the first character, not by the name."""
    first = next((line.lstrip()[:1] for _, _, line in _lines(path) if line.strip()), b"")
    if not first:
        return iter(())
    if first == b"[":
        return _array(path, _whole_text(path))
    if ending_of(path) == ".json":
        document = _document(path)
        if document is not None:
            return document
    return _json_lines(path)


def _json_lines(path: Path) -> Iterator[Raw]:
    for number, offset, line in _lines(path):
        line = line.rstrip(b"\r\n")
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield Raw(place, json.loads(line.decode()))
        except UnicodeDecodeError as error:
            yield Raw(place, line.decode(errors="backslashreplace"), _not_utf8(error, offset))
        except json.JSONDecodeError as error:
            text = line.decode()
            cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
            why = f"not valid JSON: {error.msg}{' (the line is cut off)' if cut else ''}"
            yield Raw(f"{place}:{error.colno}", text, why)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
            yield Raw(place, line.decode(), f"not JSON that can be read: {error}")


def _whole_text(path: Path) -> str:
    with _opened(path) as file:
        data = file.read().removeprefix(_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {_not_utf8(error, 0)}") from None


def _decode(path: Path, text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a character, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _broken(path, text, error.pos, error.msg) from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, text, at, str(error)) from None


def _broken(path: Path, text: str, at: int, why: str) -> DataError:
    line, column = text.count("\n", 0, at) + 1, at - (text.rfind("\n", 0, at) + 1) + 1
    return DataError(f"{path}:{line}:{column}: not valid JSON: {why}; mend the file (nothing of it was used)")


def _skip_blank(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return found.end() if found else at


def _array(path: Path, text: str) -> Iterator[Raw]:
    """The elements of an array, each with the line on which it begins."""
    at = _skip_blank(text, text.index("[") + 1)
    line, counted, n = 1, 0, 0
    while n or text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text):
            raise _broken(path, text, len(text), f"the array is cut off after {n} elements")
        value, end = _decode(path, text, at)
        yield Raw(f"{path}:{line}", value)
        n += 1
        at = _skip_blank(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            cut = f"the array is cut off after {n} elements"
            raise _broken(path, text, at, cut if at >= len(text) else "expected , or ] after an element")
        at = _skip_blank(text, at + 1)
    if text[at + 1 :].strip():
        raise _broken(path, text, _skip_blank(text, at + 1), "something follows the array")


def _document(path: Path) -> Iterator[Raw] | None:
    """The rows of a file that is one object: those listed in it, or itself; None where more than one object stands there."""
    text = _whole_text(path)
    value, end = _decode(path, text, _skip_blank(text, 0))
    if text[end:].strip():
        return None
    lists = [k for k in ("data", "instances", "rows", "examples") if isinstance(value, dict) and _is_rows(value.get(k))]
    if len(lists) > 1:
        raise DataError(f"{path}: {' and '.join(lists)} are both lists of rows; keep one of them in the file")
    if lists:
        return (Raw(f"{path}:{lists[0]}[{i}]", row) for i, row in enumerate(value[lists[0]]))
    line = text.count("\n", 0, _skip_blank(text, 0)) + 1
    return iter([Raw(f"{path}:{line}", value)])


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _csv(path: Path) -> Iterator[Raw]:
    """Rows of a table with a header line; all cells are text."""
    csv.field_size_limit(sys.maxsize)  # the library stops at 131,072 characters otherwise
    table = csv.reader(_csv_text(path), delimiter="\t" if ending_of(path) == ".tsv" else ",", strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in table:
            place, start = f"{path}:{start}", table.line_num + 1
            if not cells:
                continue  # a blank line
            if not header:
                header = _header(place, cells)
            elif len(cells) != len(header):
                wrong = f"{len(cells)} cells, but the header has {len(header)} columns; is a comma or a quote missing?"
                yield Raw(place, dict(zip(header, cells, strict=False)) | {"": cells[len(header) :]}, wrong)
            else:
                yield Raw(place, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        why = f'not valid CSV: {error}; is a quote missing? (inside a quoted cell, " is written "")'
        raise DataError(f"{path}:{start}: {why}") from None


def _csv_text(path: Path) -> Iterator[str]:
    for number, offset, line in _lines(path):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: {_not_utf8(error, offset)}") from None


def _header(place: str, names: Sequence[str]) -> list[str]:
    names = [n.strip() for n in names]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice or "" in names:
        what = f"the column {twice[0]!r} stands there twice" if twice and twice[0] else "a column has no name"
        raise DataError(f"{place}: the header line is wrong: {what}")
    return list(names)


def _parquet(path: Path) -> Iterator[Raw]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    at = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield Raw(f"{path}[{at}]", row)
                    at += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file, or a damaged one ({str(error).splitlines()[0]})") from None


READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
"""Endings of data files (each but Parquet also packed: .json.gz) and the functions that read them."""
