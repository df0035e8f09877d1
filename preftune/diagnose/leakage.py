"""Whether texts that are to be evaluated on stand in the data: held-out sets, MT-Bench, AlpacaEval, or any file of questions.

>>> benchmark = read_benchmark("question.jsonl")
>>> leakage(Corpus(examples, against=[benchmark])).said
'2 of 80 questions of question.jsonl stand in the data'
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preftune.data.sources import open_sources
from preftune.diagnose.corpus import Benchmark, Corpus, words
from preftune.diagnose.finding import N_EXAMPLES, Evidence, Finding, Severity, excerpt, skipped
from preftune.diagnose.similar import Hasher, sequences
from preftune.errors import DataError

N_GRAM = 8
"""Words in a row that two texts must share."""

COVERED = 0.5
"""The share of a question's word sequences that one text of the data must hold."""

_COLUMNS = ("turns", "instruction", "question", "prompt", "conversations", "messages", "text", "input", "chosen")


def read_benchmark(source: str) -> Benchmark:
    """The questions of a file: JSONL, JSON, CSV or Parquet with one of the usual columns, or plain text, one question a line.

    Raises DataError where there is none.
    """
    path = Path(source).expanduser()
    if path.suffix == ".txt" and path.is_file():
        questions = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    else:
        rows = [raw for one in open_sources(source) for raw in one.rows()]
        questions = [text for raw in rows if isinstance(raw.value, Mapping) for text in _questions(raw.value)]
    if not questions:
        raise DataError(f"{source}: no question found; expected plain text, or rows with one of {', '.join(_COLUMNS)}")
    return Benchmark(path.name, questions)


def _questions(row: Mapping[str, Any]) -> Iterator[str]:
    name = next((c for c in _COLUMNS if row.get(c)), None)
    value = row[name] if name else ()
    if isinstance(value, str):
        yield value
        return
    for turn in value:
        if isinstance(turn, str):
            yield turn
        elif isinstance(turn, Mapping) and turn.get("role", turn.get("from")) in ("user", "human"):
            yield str(turn.get("content", turn.get("value", "")))


def leakage(corpus: Corpus) -> Finding:
    """Questions of which half or more of all runs of eight words stand in one prompt or response of the data.

    A question of fewer than eight words counts where it is the whole of a prompt or of one of its turns.
    """
    if not corpus.against:
        return skipped("leakage", "no file was named to compare with (--against FILE)")
    index = _Index(corpus.against)
    hits: dict[int, tuple[int, float]] = {}  # question -> (example, share of its sequences)
    for at, example in enumerate(corpus.examples):
        turns = [example.prompt] if isinstance(example.prompt, str) else [m.content for m in example.prompt]
        for text in (*turns, *corpus.texts[at]):
            for question, covered in index.found_in(text):
                if covered > hits.get(question, (0, 0.0))[1]:
                    hits[question] = (at, covered)
    n = len(index.questions)
    names = ", ".join(one.name for one in corpus.against)
    said = f"{len(hits)} of {n} questions of {names} stand in the data"
    if not hits:
        return Finding("leakage", "ok", said, numbers={"n_questions": n, "n_found": 0})
    shown = sorted(hits.items(), key=lambda item: (-item[1][1], item[0]))
    severity: Severity = "error" if len(hits) > 0.05 * n else "warning"
    by_file = Counter(index.questions[question][0] for question in hits)
    return Finding(
        "leakage",
        severity,
        said,
        "leave these rows out (--fix does), or the evaluation measures memory",
        {"n_questions": n, "n_found": len(hits), "by_file": dict(by_file)},
        tuple(
            Evidence(corpus.of_response(at, "").place, f"{covered:.0%} of: {excerpt(index.questions[question][1], 120)}")
            for question, (at, covered) in shown[:N_EXAMPLES]
        ),
        tuple(i for i, unit in enumerate(corpus.units) if unit.example in {at for at, _ in hits.values()}),
    )


class _Index:
    """Questions by their word sequences."""

    def __init__(self, against: Sequence[Benchmark]) -> None:
        self.questions = [(one.name, text) for one in against for text in one.questions]
        self._hasher = Hasher()
        self._by_gram: dict[int, list[int]] = defaultdict(list)
        self._short: dict[str, int] = {}
        self._sizes: list[int] = []
        for question, (_, text) in enumerate(self.questions):
            hashes = self._hasher(text)
            grams = set(sequences(hashes, N_GRAM).tolist()) if len(hashes) >= N_GRAM else set()
            self._sizes.append(len(grams))
            for gram in grams:
                self._by_gram[gram].append(question)
            if not grams and len(hashes):
                self._short[" ".join(words(text))] = question
        self._grams = np.array(sorted(self._by_gram), np.uint64)

    def found_in(self, text: str) -> Iterator[tuple[int, float]]:
        """(question, share of its sequences that the text holds) where that share is COVERED or more."""
        hashes = self._hasher(text)
        if len(hashes) < N_GRAM:
            question = self._short.get(" ".join(words(text)))
            if question is not None:
                yield question, 1.0
            return
        here = np.unique(sequences(hashes, N_GRAM))
        counts = Counter(q for gram in here[np.isin(here, self._grams)].tolist() for q in self._by_gram[gram])
        for question, n in counts.items():
            if n >= COVERED * self._sizes[question]:
                yield question, n / self._sizes[question]
