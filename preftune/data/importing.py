"""Preference sets of others into one file of ours: read in any format, brought together by prompt, pairs chosen, written.

>>> counts = import_file("ultrafeedback.jsonl", Path("pairs.jsonl"), choice="best_worst")
>>> counts["pairs"], counts["rows"]
(1000, 1000)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune.data.pairs import Choice, choose
from preftune.data.read import read_examples
from preftune.data.types import Example, Pair, content_id
from preftune.data.write import write_examples
from preftune.errors import DataError


def import_file(
    source: str | Path | Iterable[Any],
    out: Path,
    *,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    quarantine: str | Path | None = None,
    aspects: Sequence[str] = (),
    choice: Choice = "all",
    seed: int = 0,
    on_note: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """Writes the examples of `source` to `out` and returns the account: rows = examples + joined + quarantined.

    aspects:  ratings whose mean is a response's score, in formats that rate several; () for the format's own choice.
    choice:   which pairs of an example are kept (`pairs.choose`); their margins stay.

    Raises DataError and ConfigError as `read_examples` does, and DataError where `out` is the source.
    """
    if isinstance(source, (str, Path)) and Path(source).expanduser().resolve() == out.resolve():
        raise DataError(f"{out}: this is the data itself; name another file to write to")
    constants = {"aspects": tuple(aspects)} if aspects else {}
    data = read_examples(source, format=format, fields=fields, quarantine=quarantine, constants=constants)
    for line in data.notes:
        (on_note or (lambda text: None))(line)
    together = join(data.examples)
    chosen = [choose(example, choice, seed=seed) for example in together]
    write_examples(out, chosen)
    n_pairs = sum(len(example.pairs) for example in chosen)
    return {
        "rows": data.n_read,
        "quarantined": data.n_quarantined,
        "examples": len(chosen),
        "joined": len(data.examples) - len(chosen),
        "pairs": n_pairs,
        "pairs_not_chosen": sum(len(example.pairs) for example in together) - n_pairs,
        "without_pairs": sum(not example.pairs for example in chosen),
    }


def join(examples: Sequence[Example]) -> list[Example]:
    """Examples of one scored response, those of a prompt as one, with a pair of every two whose scores differ.

    Others stay as they are; a joined example stands where its first response stood. A response that is there twice with
    different scores has their mean.
    """
    alone = [e for e in examples if len(e.responses) == 1 and len(e.scores) == 1]
    by_prompt: dict[str, list[Example]] = defaultdict(list)
    for example in alone:
        by_prompt[example.prompt_key].append(example)
    single = {id(e) for e in alone}
    found = []
    for example in examples:
        if id(example) not in single:
            found.append(example)
        elif by_prompt[example.prompt_key][0] is example:
            found.append(_joined(by_prompt[example.prompt_key]))
    return found


def _joined(examples: Sequence[Example]) -> Example:
    if len(examples) == 1:
        return examples[0]
    scores: dict[Any, list[float]] = defaultdict(list)
    for example in examples:
        scores[example.responses[0]].append(example.scores[0])
    responses = tuple(scores)
    means = tuple(sum(values) / len(values) for values in scores.values())
    pairs = tuple(Pair(i, j, margin=a - b) for i, a in enumerate(means) for j, b in enumerate(means) if a > b)
    first = examples[0]
    return replace(first, id=content_id(first.prompt, responses), responses=responses, scores=means, pairs=pairs)
