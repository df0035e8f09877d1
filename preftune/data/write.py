"""Examples out: a JSONL file that reads back as the same examples (format `prompt_responses`), all but their place and split.

{"id": "5f1c…", "prompt": "2+2=", "responses": ["4", "5"], "pairs": [[0, 1, 1.0, 0.0]]}
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from preftune.data.types import Example, Message
from preftune.files import json_line, write_atomic


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Writes the file whole, one example a line, and returns how many. Raises StorageError."""
    lines = [json_line(row_of(example)) for example in examples]
    write_atomic(path, "".join(lines))
    return len(lines)


def judged_file(judgments: Path) -> Path:
    """Where the examples that a file of judgments speaks of are kept: beside it, so that pairs can be made from it alone."""
    return judgments.with_suffix(".examples.jsonl")


def row_of(example: Example) -> dict[str, Any]:
    """One example as a row: id, prompt, responses, and the pairs, labels or scores that it has."""
    row: dict[str, Any] = {
        "id": example.id,
        "prompt": plain(example.prompt),
        "responses": [plain(response) for response in example.responses],
    }
    if example.pairs:
        row["pairs"] = [list(p) for p in example.pairs]
    if example.labels:
        row["labels"] = list(example.labels)
    if example.scores:
        row["scores"] = list(example.scores)
    if example.reference is not None:
        row["reference"] = plain(example.reference)
    if example.category:
        row["category"] = example.category
    if example.origin:
        row["source"] = example.origin
    return row


def plain(content: str | tuple[Message, ...]) -> str | list[dict[str, str]]:
    """Text as it is, messages as objects: what JSON holds."""
    return content if isinstance(content, str) else [{"role": m.role, "content": m.content} for m in content]
