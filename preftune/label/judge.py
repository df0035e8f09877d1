"""Judging by a language model: examples in, one judgment for each two responses and each order in which they are shown.

    >>> judgments, n_left = judge_pairs(examples, judge, replies=replies, ledger=Ledger())
    >>> judgments[0].verdict, judgments[0].p
    ('i', 0.93)

Both orders are asked unless `order` is "seeded", where a random number that follows from the instruction decides. A reply that
holds no verdict is unscored: no tie, no loss, not remembered, asked again next time. Identical responses are a tie that nobody
is asked about.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from preftune.asking.records import Answer, Asker, Failed, Ledger, Request
from preftune.asking.replies import Replies, ask
from preftune.data.types import Example, Judgment, Verdict
from preftune.label.scored import Scored
from preftune.label.template import Template, Templates, instruction
from preftune.label.verdict import Read, read_pair, read_score

Order = Literal["both", "seeded"]
IDENTICAL = "identical responses"
"""Why of a tie that nobody was asked about."""


@dataclass(frozen=True)
class Judge:
    """A model that judges by a template.

    asker:        who answers.
    model:        its name there.
    templates:    what it is asked.
    temperature:  0 takes the likeliest reply.
    max_tokens:   longest reply; None: what the template says.
    """

    asker: Asker
    model: str
    templates: Templates
    temperature: float = 0.0
    max_tokens: int | None = None

    @property
    def annotator(self) -> str:
        """How judgments name it: the model, the template, and a hash of the template's words and the settings."""
        words = f"{self.templates.digest}/{self.temperature:g}/{self.max_tokens}"
        return f"{self.model}/{self.templates.name}@{hashlib.sha256(words.encode()).hexdigest()[:6]}"

    def request(self, example: Example, shown: Sequence[int], *, code: str) -> Request:
        """The request that shows these responses in this order. Raises DataError for a text that the template wants."""
        template = self.templates.of(example)
        rule = template.rule
        return Request(
            self.model,
            template.fill(example, [example.responses[k] for k in shown], code=code),
            temperature=self.temperature,
            max_tokens=self.max_tokens or template.max_tokens,
            top_logprobs=rule.top,
            choices=rule.labels if rule.top else (),
            schema=rule.schema,
        )


class Judged(NamedTuple):
    """What came of asking, and how many questions were left because of the money."""

    judgments: list[Judgment]
    n_left: int


class Rated(NamedTuple):
    """What came of asking for scores, and how many questions were left because of the money."""

    scores: list[Scored]
    n_left: int


class Asked(NamedTuple):
    """A question to a judge: two responses (one, for a score) of an example in the order shown."""

    example: Example
    shown: tuple[int, ...]
    template: Template
    code: str


def questions(
    examples: Sequence[Example],
    judge: Judge,
    *,
    order: Order,
    seed: int,
    secret: str,
    known: Collection[tuple[str, tuple[int, ...]]] = frozenset(),
) -> list[Asked]:
    """Everything that there is to ask, identical responses and what is `known` (example, order shown) left out."""
    asked = []
    for example in examples:
        template = judge.templates.of(example)
        if judge.templates.kind == "score":
            groups: list[tuple[int, ...]] = [(k,) for k in range(len(example.responses))]
        else:
            groups = [shown for i, j in _pairs(example) for shown in _orders(example, i, j, order, seed)]
        for shown in groups:
            if (example.id, shown) not in known:
                asked.append(Asked(example, shown, template, code_of(example, shown, secret) if template.own else ""))
    return asked


def judge_pairs(
    examples: Sequence[Example],
    judge: Judge,
    *,
    replies: Replies,
    ledger: Ledger,
    order: Order = "both",
    seed: int = 0,
    done: Sequence[Judgment] = (),
    max_cost: float | None = None,
    on_judgment: Callable[[Judgment], None] = lambda judgment: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """The judgments that are not among `done`.

    on_judgment: told of each at once, so that it can be written down. Responses of an example are compared each with each.
    A question that is not asked because of `max_cost` has no judgment. Raises DataError, ServerError, StorageError.
    """
    name = judge.annotator
    known = {(j.example, j.shown_order) for j in done if j.annotator == name and j.verdict != "unscored"}
    found: list[Judgment] = []
    n_left = 0

    def add(judgment: Judgment) -> None:
        found.append(judgment)
        on_judgment(judgment)

    for example in examples:
        for i, j in itertools.combinations(range(len(example.responses)), 2):
            if example.responses[i] == example.responses[j] and (example.id, (i, j)) not in known:
                add(Judgment(example.id, i, j, "tie", name, (i, j), 0.0, _now(), IDENTICAL))
    asked = questions(examples, judge, order=order, seed=seed, secret=replies.secret, known=known)
    for n, (index, answer, read) in enumerate(verdicts(asked, judge, replies, ledger, max_cost), 1):
        on_progress(n, len(asked))
        if isinstance(answer, Failed) and not answer.asked:
            n_left += 1
        else:
            add(_judgment(asked[index], answer, read, name))
    return Judged(found, n_left)


def judge_scores(
    examples: Sequence[Example],
    judge: Judge,
    *,
    replies: Replies,
    ledger: Ledger,
    max_cost: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rated:
    """The score of each response that was asked about, in the order of the examples; None where a reply holds none."""
    name = judge.annotator
    asked = questions(examples, judge, order="both", seed=0, secret=replies.secret)
    found: list[Scored | None] = [None] * len(asked)
    n_left = 0
    for n, (index, answer, read) in enumerate(verdicts(asked, judge, replies, ledger, max_cost), 1):
        on_progress(n, len(asked))
        if isinstance(answer, Failed) and not answer.asked:
            n_left += 1
            continue
        seconds = 0.0 if isinstance(answer, Failed) else answer.seconds
        one = asked[index]
        found[index] = Scored(one.example.id, one.shown[0], read.value, name, seconds, _now(), read.why)
    return Rated([one for one in found if one is not None], n_left)


def verdicts(
    asked: Sequence[Asked], judge: Judge, replies: Replies, ledger: Ledger, max_cost: float | None
) -> Iterator[tuple[int, Answer | Failed, Read]]:
    """(index of the question, the reply, what it says) as they come. A reply that says nothing is not remembered."""

    def read(index: int, answer: Answer) -> Read:
        one = asked[index]
        reader = read_pair if one.template.kind == "pair" else read_score
        return reader(answer, one.template.rule, code=one.code)

    def keep(index: int, answer: Answer) -> bool:
        return read(index, answer).value is not None

    requests = [judge.request(one.example, one.shown, code=one.code) for one in asked]
    for index, answer in ask(judge.asker, requests, replies=replies, ledger=ledger, keep=keep, max_cost=max_cost):
        yield index, answer, Read(None, answer.reason) if isinstance(answer, Failed) else read(index, answer)


def _judgment(asked: Asked, answer: Answer | Failed, read: Read, annotator: str) -> Judgment:
    """The verdict over the responses in their own order, whatever was shown first."""
    first, second = asked.shown
    seconds = 0.0 if isinstance(answer, Failed) else answer.seconds
    i, j = sorted(asked.shown)
    verdict: Verdict = "unscored"
    p: float | None = None
    if read.value is not None:
        p = read.value if first == i else 1.0 - read.value
        tie = p == 0.5 or read.label == (*asked.template.rule.labels, None, None)[2]
        verdict = "tie" if tie else "i" if p > 0.5 else "j"
    return Judgment(
        asked.example.id, i, j, verdict, annotator, (first, second), seconds, _now(), read.why, p if read.sure else None
    )


def _pairs(example: Example) -> list[tuple[int, int]]:
    every = itertools.combinations(range(len(example.responses)), 2)
    return [(i, j) for i, j in every if example.responses[i] != example.responses[j]]


def _orders(example: Example, i: int, j: int, order: Order, seed: int) -> list[tuple[int, int]]:
    if order == "both":
        return [(i, j), (j, i)]
    return [(j, i) if swapped(instruction(example.prompt), seed, i, j) else (i, j)]


def swapped(text: str, seed: int, i: int = 0, j: int = 1) -> bool:
    """Whether the second response is shown first: AlpacaEval's rule for its single order (with seed 0, for the first two)."""
    which = "" if (i, j) == (0, 1) else f"/{i}/{j}"
    return random.Random(f"is_switched_outputs{text}{seed}{which}").choices([False, True])[0]


def code_of(example: Example, shown: Sequence[int], secret: str) -> str:
    """Eight hex digits that nobody can know who does not know the secret; the same again for the same texts."""
    content = repr((example.prompt, [example.responses[k] for k in shown]))
    return hashlib.blake2b(content.encode(errors="replace"), digest_size=4, key=bytes.fromhex(secret)).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
