"""Prompts to answer: a text file with one a line, rows with a prompt and nothing else, or any preference file.

>>> read_prompts("prompts.txt").prompts[0].prompt
(Message(role='user', content='What is a tide?'),)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from preftune.data.read import read_examples
from preftune.data.readers import Raw
from preftune.data.rows import BadRow, check_prompt, prompt_of, response_of
from preftune.data.sources import open_sources
from preftune.data.types import Message, Prompt, Response, content_id
from preftune.errors import DataError, listing
from preftune.files import storage
from preftune.registry import FORMATS


class Asked(NamedTuple):
    """One prompt."""

    id: str
    prompt: Prompt
    reference: Response | None = None  # an answer that is known to be right


class Prompts(NamedTuple):
    """Prompts in the order of the file, each text once, and what a user should know."""

    prompts: list[Asked]
    notes: list[str]


def read_prompts(
    source: str, *, fields: Mapping[str, str] | None = None, format: str = "auto", quarantine: Path | None = None
) -> Prompts:
    """The prompts of a file. Raises DataError that lists every row that cannot be used.

    In a .txt file every line that is not blank is a message of the user. A row with the column `prompt`, or with `messages`
    that end with the user's, needs no response; of a file in any data format the prompts are taken. A prompt that stands there
    twice is asked once.

    quarantine: of a data format, the file that bad rows are moved to.
    """
    path = Path(source).expanduser()
    notes: list[str] = []
    if path.suffix.lower() == ".txt":
        found = _lines(path)
    else:
        rows = [raw for one in open_sources(source) for raw in one.rows()]
        bare = rows and isinstance(rows[0].value, Mapping) and _bare(rows[0].value, fields or {})
        if bare and format == "auto":
            found = _bare_rows(rows, fields or {})
        else:
            read = read_examples(source, format=format, fields=fields, quarantine=quarantine)
            found, notes = [Asked(e.id, e.prompt, e.reference) for e in read.examples], read.notes
    if not found:
        raise DataError(f"{source}: no prompts in it")
    once: dict[str, Asked] = {}
    for one in found:
        once.setdefault(content_id(one.prompt), one)
    ids = Counter(one.id for one in once.values())
    if twice := [f"{source}: id {name!r}: stands for {n} different prompts" for name, n in ids.items() if n > 1]:
        raise DataError(f"ids must be unique:\n{listing(twice)}")
    if len(once) < len(found):
        notes = [*notes, f"{source}: {len(found) - len(once)} lines repeat a prompt; each prompt is asked once"]
    return Prompts(list(once.values()), notes)


def _lines(path: Path) -> list[Asked]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected prompts, one a line")
    with storage(path, "read this file"):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    prompts = [(Message("user", line.strip()),) for line in text.splitlines() if line.strip()]
    return [Asked(content_id(prompt), prompt) for prompt in prompts]


def _bare(row: Mapping[Any, Any], fields: Mapping[str, str]) -> bool:
    """Whether a row has a prompt and is of no data format."""
    row = _renamed(row, fields)
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], Mapping):
        return str(messages[-1].get("role")) == "user"
    return "prompt" in row and not any(FORMATS[name].fits(row) for name in FORMATS)  # type: ignore[attr-defined]


def _bare_rows(rows: list[Raw], fields: Mapping[str, str]) -> list[Asked]:
    problems: list[str] = []

    def read() -> Iterator[Asked]:
        for raw in rows:
            try:
                if raw.problem or not isinstance(raw.value, Mapping):
                    raise BadRow(raw.problem or "a row must be an object with named columns")
                row = _renamed(raw.value, fields)
                name = "prompt" if row.get("prompt") is not None else "messages"
                prompt = check_prompt(prompt_of(row.get(name), name), name)
                known = row.get("reference")
                reference = None if known in (None, "") else response_of(known, "reference")
                own = row.get("id")
                yield Asked(str(own) if isinstance(own, (int, str)) and own != "" else content_id(prompt), prompt, reference)
            except BadRow as reason:
                problems.append(f"{raw.place}: {reason}")

    found = list(read())
    if problems:
        raise DataError(f"{len(problems)} of {len(rows)} rows hold no prompt that can be asked\n{listing(problems)}")
    return found


def _renamed(row: Mapping[Any, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    return {str(k): v for k, v in row.items()} | {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}
