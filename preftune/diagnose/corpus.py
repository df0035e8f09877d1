"""A data set as the checks look at it: texts, words and comparisons, each computed once and only if a check asks.

>>> corpus = Corpus(examples)
>>> unit = corpus.units[0]
>>> corpus.texts[unit.example][unit.winner]
'We are sorry.'
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.data.tokens import Report
from preftune.data.types import Example, Judgment, Prompt, Response
from preftune.diagnose.finding import Evidence, excerpt

_NO_SPACES = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # kana, Chinese characters, Hangul: each one counts as a word
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")


class Unit(NamedTuple):
    """What a cleaned file keeps or leaves out: one preference of an example, or an example without any."""

    example: int
    winner: int = -1
    loser: int = -1
    confidence: float = 1.0
    margin: float = 0.0


class Contrast(NamedTuple):
    """The preferences that are no ties, as arrays over pairs."""

    units: NDArray[np.int64]  # [P] index of the unit
    winners: list[str]
    losers: list[str]
    groups: list[str]  # key of the prompt


class Benchmark(NamedTuple):
    """Questions that must not stand in training data."""

    name: str
    questions: list[str]


class Scored(NamedTuple):
    """Mean log-probs per token under a model, nats.

    data:  per example that was scored: its index, and one number per response.
    own:   per prompt that was sampled: one number per response of the model itself.
    """

    data: list[tuple[int, list[float]]]
    own: list[list[float]]


@dataclass(frozen=True)
class Corpus:
    """A data set and what else a check may look at.

    examples:  what was read.
    bad:       rows that cannot be used: (place, reason).
    against:   what is to be evaluated on.
    report:    what a tokenizer and its template did to the examples; None without a model.
    scored:    how likely a model finds them; None without a model.
    judged:    verdicts of a judge or of people on some of the examples.
    memo:      what several checks compute alike.
    """

    examples: Sequence[Example]
    bad: Sequence[tuple[str, str]] = ()
    against: Sequence[Benchmark] = ()
    report: Report | None = None
    scored: Scored | None = None
    judged: Sequence[Judgment] = ()
    memo: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def units(self) -> list[Unit]:
        """Every preference, in order; an example without any is one unit."""
        found = []
        for at, example in enumerate(self.examples):
            found += [Unit(at, p.winner, p.loser, p.confidence, p.margin) for p in example.pairs] or [Unit(at)]
        return found

    @cached_property
    def keys(self) -> list[str]:
        """Per example the key of its prompt."""
        return [example.prompt_key for example in self.examples]

    @cached_property
    def prompts(self) -> list[str]:
        """Per example the text of its prompt, roles left out."""
        return [plain(example.prompt) for example in self.examples]

    @cached_property
    def texts(self) -> list[list[str]]:
        """Per example the text of each response."""
        return [[plain(response) for response in example.responses] for example in self.examples]

    @cached_property
    def canonical(self) -> list[list[str]]:
        """Per example each response without case, compatibility forms and repeated white space."""
        return [[canonical(text) for text in texts] for texts in self.texts]

    @cached_property
    def contrast(self) -> Contrast:
        """The preferences with a winner."""
        units = [i for i, unit in enumerate(self.units) if unit.winner >= 0 and unit.confidence > 0.5]
        sides = [(self.texts[u.example][u.winner], self.texts[u.example][u.loser]) for u in map(self.units.__getitem__, units)]
        groups = [self.keys[self.units[i].example] for i in units]
        return Contrast(np.array(units, np.int64), [w for w, _ in sides], [x for _, x in sides], groups)

    def evidence(self, unit: int, text: str | None = None) -> Evidence:
        """The place of a unit, with `text` or else its two responses."""
        one = self.units[unit]
        example = self.examples[one.example]
        if text is None:
            texts = self.texts[one.example]
            sides = (texts[one.winner], texts[one.loser]) if one.winner >= 0 else (texts[0],) if texts else ("",)
            text = " | ".join(excerpt(side, 80) for side in sides)
        return Evidence(example.source or example.id, text)

    def of_response(self, example: int, text: str) -> Evidence:
        """The place of an example, with an excerpt."""
        return Evidence(self.examples[example].source or self.examples[example].id, excerpt(text))


def plain(content: Prompt | Response) -> str:
    """A text itself; of messages their contents, a line break between them."""
    return content if isinstance(content, str) else "\n".join(message.content for message in content)


def canonical(text: str) -> str:
    """The text in one form: NFKC, no case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def says_something(text: str) -> bool:
    """Whether there is a letter, a digit or a symbol (emoji, +) in it: more than white space and punctuation."""
    return any(unicodedata.category(c)[0] in "LNS" for c in text)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; in scripts without spaces each character is one."""
    return _WORD.findall(text.lower())


def stable_hash(text: str) -> int:
    """64 bits that name this text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
