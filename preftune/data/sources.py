"""What a user can name as data, made into sources of rows: a file, a folder, a saved dataset, a hub id, rows in memory.

Besides a list of rows, of Examples, or of any of these:

    pairs.jsonl  pairs.csv.gz  a folder of such files    FOLDER:train   the files of it that are called train…
    a folder written by `datasets`' save_to_disk          FOLDER:train   one of its splits
    owner/name on the Hugging Face hub                    owner/name:test
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preftune.data.readers import READERS, Raw, ending_of, rows_of_file
from preftune.errors import DataError, nearest

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TRAIN = re.compile(r"train(?![a-z])", re.IGNORECASE)
_HELD_OUT = re.compile(r"(test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Rows that share their columns.

    name:        how messages call it.
    rows:        begins to read.
    cells:       True where every value is text (CSV), so that lists and messages stand there as JSON.
    path:        the file or saved dataset on disk; None for the hub and for rows in memory.
    folder:      the folder that was named, all of whose data files are read; a saved dataset's own.
    notes:       what was decided to get here.
    """

    name: str
    rows: Callable[[], Iterator[Raw]]
    cells: bool = False
    path: Path | None = None
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def open_sources(source: Any) -> list[Source]:
    """The sources that `source` names: a path or hub id, a list of those, rows or Examples, a dataset. Raises DataError."""
    if isinstance(source, (str, Path)):
        return _named(source)
    if _is_dataset(source):
        return [_dataset(source, "data")]
    if isinstance(source, Mapping):
        if source and all(_is_dataset(v) for v in source.values()):
            return [_split_of(source, "data", "")]
        raise DataError("data is one object, expected a list of rows (write [row] for a single one)")
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        expected = "a path, a hub id, a list of rows or of Examples, or a dataset"
        raise DataError(f"data is {type(source).__name__}, expected {expected}")
    items = list(source)
    if any(isinstance(i, (str, Path)) for i in items):
        wrong = next((i for i, item in enumerate(items) if not isinstance(item, (str, Path))), None)
        if wrong is not None:
            raise DataError(
                f"data[{wrong}] is {type(items[wrong]).__name__}, where others are paths; give paths or rows, not both"
            )
        return [s for i in items for s in _named(i)]
    return [Source("data", lambda: (Raw(f"data[{i}]", row) for i, row in enumerate(items)))]


def _named(source: str | Path) -> list[Source]:
    text = str(source)
    if not text.strip():
        raise DataError("data is an empty text, expected a file, a folder or a hub id")
    try:
        return _resolved(text, Path(text).expanduser(), may_be_hub=isinstance(source, str))
    except OSError as error:
        raise DataError(f"{text[:200]}: cannot be read: {error.strerror or error}") from None


def _resolved(text: str, path: Path, *, may_be_hub: bool) -> list[Source]:
    if path.exists():
        return _on_disk(path, "")
    base, colon, split = text.rpartition(":")
    if colon and base and split and Path(base).expanduser().exists():
        return _on_disk(Path(base).expanduser(), split)
    name, split = (base, split) if colon and base else (text, "")
    looks_local = path.suffix.lower() in {*READERS, ".gz", ".txt"} or Path(name).parent.is_dir()
    if may_be_hub and _HUB.fullmatch(name) and not looks_local:
        return [_hub(name, split)]
    raise DataError(_missing(path))


def _missing(path: Path) -> str:
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if parent != path.parent:
        return f"{path}: no such file; the folder {path.parent} does not exist"
    there = sorted(p.name for p in parent.iterdir() if (p.is_dir() or ending_of(p)) and not p.name.startswith("."))
    if not there:
        return f"{path}: no such file; {parent} holds no data file"
    close = difflib.get_close_matches(path.name, there, n=1)
    hint = f"did you mean {parent / close[0]}?" if close else f"there: {', '.join(there[:20])}{' …' if len(there) > 20 else ''}"
    return f"{path}: no such file or folder; {hint}"


def _on_disk(path: Path, split: str) -> list[Source]:
    if not path.is_dir():
        if split:
            raise DataError(f"{path}:{split}: a file has no splits; write {path}")
        ending = ending_of(path)
        return [Source(str(path), lambda: rows_of_file(path), ending in (".csv", ".tsv"), path)]
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [_saved(path, split)]
    return _folder(path, split)


def _folder(path: Path, split: str) -> list[Source]:
    """The data files of a folder, in the order of their names."""
    entries = sorted(path.iterdir())
    files = [p for p in entries if p.is_file() and ending_of(p) and not p.name.startswith(".")]
    if not files:
        inner = [p.name for p in entries if p.is_dir() and any(ending_of(f) for f in p.iterdir())]
        hint = f"its folders {', '.join(inner)} do: name one" if inner else f"expected names that end in {', '.join(READERS)}"
        raise DataError(f"{path}: this folder holds no data file; {hint}")
    if split:
        chosen = [p for p in files if re.match(rf"{re.escape(split)}(?![a-z])", p.name, re.IGNORECASE)]
        if not chosen:
            raise DataError(f"{path}:{split}: no file is called {split}…; files: {', '.join(p.name for p in files)}")
    else:
        chosen = files
        held_out = [p.name for p in files if _HELD_OUT.match(p.name)]
        if held_out and any(_TRAIN.match(p.name) for p in files):
            raise DataError(
                f"{path}: this folder holds training files and held-out ones ({', '.join(held_out)}), which must not be mixed: "
                f"name the split, {path}:train, or the file"
            )
    left = [p.name for p in entries if p not in chosen]
    names = ", ".join(left[:20]) + (" …" if len(left) > 20 else "")
    note = (f"{path}: {len(chosen)} files read; left alone: {names}",) if left else ()
    found = [s for p in chosen for s in _on_disk(p, "")]
    return [replace(s, folder=path, notes=note if i == 0 else ()) for i, s in enumerate(found)]


def _is_dataset(value: object) -> bool:
    return hasattr(value, "features") and hasattr(value, "column_names") and isinstance(value, Iterable)


def _dataset(dataset: Any, name: str, path: Path | None = None, notes: tuple[str, ...] = ()) -> Source:
    def rows() -> Iterator[Raw]:
        return (Raw(f"{name}[{i}]", row) for i, row in enumerate(dataset))

    return Source(name, rows, path=path, folder=path, notes=notes)


def _split_of(splits: Mapping[Any, Any], name: str, split: str, path: Path | None = None) -> Source:
    """One split of several: the one named, the only one, or train."""
    names = [str(s) for s in splits]
    if split and split not in names:
        raise DataError(f"{name}:{split}: no such split; {nearest(split, names)}")
    chosen = split or (names[0] if len(names) == 1 else "train")
    if chosen not in names:
        raise DataError(f"{name}: which split? Name one: {', '.join(f'{name}:{s}' for s in names)}")
    others = [n for n in names if n != chosen]
    note = (f"{name}: split {chosen} (there are also: {', '.join(others)})",) if others and not split else ()
    return _dataset(splits[chosen], f"{name}:{chosen}", path, note)


def _saved(path: Path, split: str) -> Source:
    datasets = _library(str(path))
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds, and none of them is ours
        raise DataError(f"{path}: this looks like a saved dataset, but it cannot be read: {_first_line(error)}") from None
    if isinstance(found, Mapping):
        return _split_of(found, str(path), split, path)
    if split:
        raise DataError(f"{path}:{split}: this saved dataset has no splits; write {path}")
    return _dataset(found, str(path), path)


def _hub(name: str, split: str) -> Source:
    datasets = _library(name)
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # no network, no such name, a licence to accept, …
        raise DataError(
            f"{name}: no such file, and as a dataset of the Hugging Face hub it cannot be loaded "
            f"({type(error).__name__}: {_first_line(error)}). Check the name and the network, or name a file"
        ) from None
    return _split_of(found, name, split)


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: reading this needs the library datasets: pip install datasets") from None
    return datasets


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
