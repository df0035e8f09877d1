"""What the results page shows: how far annotators agree, what each did, and the pairs on which they differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import NamedTuple

from preftune.data.types import Judgment
from preftune.files import json_line
from preftune.label.agree import Agreement, agreement
from preftune.web.show import Turn, rendered, text_of, turns
from preftune.web.store import Store


class Disagreement(NamedTuple):
    """A pair on which annotators differ: who said what, with the reasons given, and the texts to decide by."""

    said: list[tuple[str, str, str]]  # annotator, verdict in words, reason
    prompt: list[Turn]
    first: str
    second: str


class Results(NamedTuple):
    """Everything on the page. `more` disagreements are not shown."""

    n_pairs: int
    n_finished: int
    agreement: Agreement
    disagreements: list[Disagreement]
    more: int


_WORDS = {"i": "the first", "j": "the second", "tie": "a tie", "both_bad": "both bad"}
_SHOWN = 100


def results(store: Store) -> Results:
    """Of all judgments that stand."""
    judgments = store.judgments()
    by_pair: dict[tuple[str, int, int], list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        by_pair[judgment.example, judgment.i, judgment.j].append(judgment)
    differing = [pair for pair, given in by_pair.items() if len({g.verdict for g in given}) > 1]
    examples = {example.id: example for example in store.examples}
    shown = []
    for pair in differing[:_SHOWN]:
        example, i, j = examples[pair[0]], pair[1], pair[2]
        said = [(g.annotator, _WORDS[g.verdict], g.why) for g in by_pair[pair]]
        first, second = (rendered(text_of(example.responses[k])) for k in (i, j))
        shown.append(Disagreement(said, turns(example.prompt), first, second))
    n_finished = sum(len(given) >= store.overlap for given in by_pair.values())
    return Results(len(store.items), n_finished, agreement(judgments), shown, len(differing) - len(shown))


def jsonl(judgments: Iterable[Judgment]) -> str:
    """Judgments as the file that `preftune pairs` and `preftune agree` read."""
    return "".join(json_line(asdict(judgment)) for judgment in judgments)
