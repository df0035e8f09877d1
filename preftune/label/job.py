"""Judging from data to a file of judgments: what is there already is kept, what is missing is asked, all of it is summed up.

>>> job = Job(examples, Path("judgments.jsonl"), replies, Ledger(price_in=2.5))
>>> summary = job.by_models([Judge(server, "judge-1", own_template("pair"))])
>>> summary.annotators[0].order_consistency
0.94
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.asking.records import Ledger
from preftune.asking.replies import Replies
from preftune.data.judgments import append_judgments, read_judgments
from preftune.data.types import Example, Judgment
from preftune.errors import DataError
from preftune.files import json_line, write_atomic
from preftune.label.judge import Judge, Order, judge_pairs, judge_scores, questions
from preftune.label.reliability import Reliability, flags, reliability, votes
from preftune.label.scored import Pairs, Scored, compare

_FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class Summary:
    """What judging came to.

    annotators:   the figures of each judge, and of their vote where there are several.
    n_unscored:   acts of judging without a verdict.
    n_judgments:  acts of judging in all, unscored ones included.
    n_known:      of them, those that the file held before.
    n_not_asked:  questions that were left because of the money.
    """

    annotators: list[Reliability]
    n_judgments: int
    n_unscored: int
    n_known: int
    n_not_asked: int
    ledger: Ledger
    flags: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "judgments": self.n_judgments,
            "unscored": self.n_unscored,
            "known_before": self.n_known,
            "not_asked": self.n_not_asked,
            "annotators": [one.as_dict() for one in self.annotators],
            "ledger": self.ledger.as_dict(),
            "flags": self.flags,
        }

    def as_text(self) -> str:
        """For a terminal."""
        lines = [*(f"note: {flag}" for flag in self.flags)]
        for one in self.annotators:
            lines += one.lines()
        if self.n_known:
            lines.append(f"{self.n_known} of these judgments were in the file before")
        lines += self.ledger.lines()
        if self.n_not_asked:
            lines.append(f"{self.n_not_asked} questions were not asked: --max-cost")
        return "\n".join(lines)


@dataclass
class Job:
    """One run of judging.

    out:          judgments.jsonl; judgments that are in it are not made again.
    scores_out:   JSONL for the scores of single responses, a line each, written whole; None: they are only compared.
    """

    examples: Sequence[Example]
    out: Path
    replies: Replies
    ledger: Ledger
    order: Order = "both"
    seed: int = 0
    pairs: Pairs = "all"
    max_cost: float | None = None
    scores_out: Path | None = None
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None
    _waiting: list[Judgment] = field(default_factory=list)
    _scores: list[Scored] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises DataError where there is nothing to judge, before anything is asked."""
        if self.scores_out is None and not any(len(e.responses) > 1 for e in self.examples):
            raise DataError(
                "there is nothing to compare: no prompt has two responses (--score with --scores FILE rates single ones)"
            )

    def by_models(self, judges: Sequence[Judge]) -> Summary:
        """All judges, one after the other. Raises ServerError, DataError, StorageError; what came until then is written."""
        known, new, n_left = self._known(), [], 0
        for judge in judges:
            name = judge.annotator

            def progress(done: int, total: int, name: str = name) -> None:
                self.on_progress(name, done, total)

            if judge.templates.kind == "score":
                rated = judge_scores(
                    self.examples, judge, replies=self.replies, ledger=self.ledger, max_cost=self.max_cost, on_progress=progress
                )
                new += self._compared(rated.scores, name, known)
                n_left += rated.n_left
                continue
            with self._writing() as write:
                made = judge_pairs(
                    self.examples, judge, replies=self.replies, ledger=self.ledger, order=self.order, seed=self.seed,
                    done=known, max_cost=self.max_cost, on_judgment=write, on_progress=progress,
                )  # fmt: skip
            new += made.judgments
            n_left += made.n_left
        return self._summary(known, new, {judge.annotator for judge in judges}, n_left)

    def by_scores(self, scored: Sequence[Scored]) -> Summary:
        """Scores that a reward model or a rule gave, compared."""
        known = self._known()
        names = {one.annotator for one in scored}
        new = [judgment for name in sorted(names) for judgment in self._compared(scored, name, known)]
        return self._summary(known, new, names, 0)

    def _known(self) -> list[Judgment]:
        """What the file holds."""
        return read_judgments(self.out) if self.out.exists() else []

    @contextmanager
    def _writing(self) -> Iterator[Callable[[Judgment], None]]:
        """Judgments on the disk a second after they came, and whatever ends the block (replies themselves are kept at once)."""
        last = time.monotonic()

        def write(judgment: Judgment) -> None:
            nonlocal last
            self._waiting.append(judgment)
            if time.monotonic() - last > _FLUSH_SECONDS:
                self._flush()
                last = time.monotonic()

        try:
            yield write
        finally:
            self._flush()

    def _flush(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        append_judgments(self.out, self._waiting)
        self._waiting.clear()

    def _compared(self, scored: Sequence[Scored], name: str, known: Sequence[Judgment]) -> list[Judgment]:
        mine = [one for one in scored if one.annotator == name]
        if self.scores_out is not None:
            self._scores += mine
            write_atomic(self.scores_out, "".join(json_line(one._asdict()) for one in self._scores))
        by_example: dict[str, dict[int, Scored]] = {}
        for one in mine:
            by_example.setdefault(one.example, {})[one.response] = one
        judgments = []
        for example in self.examples:
            found = by_example.get(example.id, {})
            scores = [found[k].score if k in found else None for k in range(len(example.responses))]
            at = max((one.at for one in found.values()), default="")
            judgments += compare(example, scores, annotator=name, pairs=self.pairs, at=at)
        return self._write_new(judgments, known)

    def _write_new(self, judgments: Sequence[Judgment], known: Sequence[Judgment]) -> list[Judgment]:
        have = {(j.example, j.i, j.j, j.annotator, j.verdict) for j in known}
        new = [j for j in judgments if (j.example, j.i, j.j, j.annotator, j.verdict) not in have]
        with self._writing() as write:
            for judgment in new:
                write(judgment)
        return new

    def _summary(self, known: Sequence[Judgment], new: Sequence[Judgment], names: set[str], n_not_asked: int) -> Summary:
        mine = [j for j in (*known, *new) if j.annotator in names]
        figures = reliability(mine, self.examples)
        if len(names) > 1:
            figures += reliability(votes(mine), self.examples)
        n = sum(one.n_judgments for one in figures if one.annotator in names)
        unscored = sum(one.n_unscored for one in figures if one.annotator in names)
        return Summary(figures, n, unscored, len(mine) - len(new), n_not_asked, self.ledger, flags(self.examples))


@dataclass(frozen=True)
class Estimate:
    """What judging would cost: nothing is asked for it. Tokens are guessed at four characters each."""

    n_questions: int
    n_remembered: int
    tokens_in: int
    most_tokens_out: int
    cost: float
    flags: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))

    def as_text(self) -> str:
        """For a terminal."""
        return "\n".join(
            [
                *(f"note: {flag}" for flag in self.flags),
                f"{self.n_questions} questions, {self.n_remembered} of them remembered; nothing was asked",
                f"about {self.tokens_in:,} tokens to read (four characters each), at most {self.most_tokens_out:,} to write",
                *([f"a cost of about {self.cost:.4f} with replies as long as they may be"] if self.cost else []),
            ]
        )


def estimate(
    examples: Sequence[Example], judges: Sequence[Judge], replies: Replies, ledger: Ledger, *, order: Order, seed: int
) -> Estimate:
    """What there is to ask, what of it is known, and what the rest would cost."""
    n, known, read, written = 0, 0, 0, 0
    for judge in judges:
        for asked in questions(examples, judge, order=order, seed=seed, secret=replies.secret):
            request = judge.request(asked.example, asked.shown, code=asked.code)
            n += 1
            if replies.get(request.key(judge.asker.place)) is not None:
                known += 1
                continue
            read += -(-request.n_characters // 4)
            written += request.max_tokens
    return Estimate(n, known, read, written, ledger.price(read, written), flags(examples))
