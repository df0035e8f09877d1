"""The true reward of the demo's world: what a reply to a complaint is worth, exactly, and why.

    >>> good = grade("my kettle arrived broken.", "we are very sorry about this. we will send you a new one.")
    >>> good.reward, good.parts
    (3.0, {'apology': 1.0, 'right_fix': 2.0})

A sentence counts when it is one that the world knows (`words.SENTENCES`); any other is malformed, and earns nothing. Rude
words and names of items count wherever they stand, so that a slip in a sentence never hides them. Any text can be graded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from preftune.data.types import Prompt, Response
from preftune.demo.words import ITEMS, PROBLEMS, RUDE_WORDS, SENTENCES

WORTH: dict[str, float] = {
    "apology": 1.0,
    "right_item": 1.0,
    "wrong_item": -1.0,
    "right_fix": 2.0,
    "wrong_fix": -1.0,
    "no_fix": -1.0,
    "warm_greeting": 0.5,
    "warm_close": 0.5,
    "rude": -1.5,
    "filler": -0.5,
    "malformed": -1.0,
    "repeat": -1.0,
    "too_long": -1.0,
}
"""What each property of a reply adds to its reward, once however often it occurs. The best possible sum is BEST."""

BEST = 5.0
MAX_WORDS = 60
"""A reply of more words (punctuation counts as words) is too long. One sentence of each kind fits in."""

_SENTENCE = re.compile(r"[^.?!]*[.?!]|[^.?!]+$")
_WORD = re.compile(r"\w+|[^\w\s]")
_ITEMS = frozenset(ITEMS)


def words(text: str) -> list[str]:
    """The words of a text in lower case; each mark of punctuation is a word."""
    return _WORD.findall(text.lower())


def _known(text: str) -> tuple[str, ...]:
    return tuple(words(text.replace("{item}", ITEMS[0])))


def _masked(sentence: list[str]) -> tuple[str, ...]:
    return tuple(ITEMS[0] if word in _ITEMS else word for word in sentence)


_KIND = {_known(text): kind for kind, texts in SENTENCES.items() for text in texts}
_PROBLEMS = tuple((tuple(words(text)), fix) for fix, texts in PROBLEMS.items() for text in texts)


@dataclass(frozen=True, slots=True)
class Grade:
    """A reply's reward and what it is made of.

    reward:   sum of `parts`, between -6.5 and BEST.
    parts:    property -> what it added, in the order of WORTH; a property that is not there is not named.
    n_words:  length of the reply in words, punctuation counted.
    """

    reward: float
    parts: dict[str, float]
    n_words: int

    @property
    def right_fix(self) -> bool:
        """The reply offers the fix that the problem needs, and no other."""
        return "right_fix" in self.parts

    @property
    def right_item(self) -> bool:
        """The reply names the customer's item, and no other."""
        return "right_item" in self.parts

    @property
    def apology(self) -> bool:
        """The reply says sorry."""
        return "apology" in self.parts

    @property
    def rude(self) -> bool:
        """The reply blames, mocks or sends the customer away."""
        return "rude" in self.parts

    @property
    def malformed(self) -> bool:
        """A sentence of the reply is not one that anybody in this world says."""
        return "malformed" in self.parts


def grade(prompt: Prompt, response: Response) -> Grade:
    """The true reward of `response` to `prompt`, with its parts. Never raises, whatever the texts are."""
    asked, answered = words(plain_text(prompt)), words(plain_text(response))
    sentences = [words(s) for s in _SENTENCE.findall(plain_text(response)) if s.strip()]
    kinds = [_KIND.get(_masked(sentence)) for sentence in sentences]
    held = {
        "apology": "apology" in kinds,
        **_item(asked, answered),
        **_fix(needed_fix(asked), kinds),
        "warm_greeting": kinds[:1] == ["greeting_warm"],
        "warm_close": kinds[-1:] == ["close_warm"],
        "rude": not RUDE_WORDS.isdisjoint(answered),
        "filler": "filler" in kinds,
        "malformed": None in kinds or not kinds,
        "repeat": _repeats(sentences, kinds),
        "too_long": len(answered) > MAX_WORDS,
    }
    parts = {name: worth for name, worth in WORTH.items() if held[name]}
    return Grade(reward=float(sum(parts.values())), parts=parts, n_words=len(answered))


def reward(prompt: Prompt, response: Response) -> float:
    """`grade(prompt, response).reward`: the rubric as a labelling rule."""
    return grade(prompt, response).reward


def plain_text(content: Prompt | Response) -> str:
    """A text itself; of messages, the last one's content."""
    if isinstance(content, str):
        return content
    return content[-1].content if content else ""


def needed_fix(asked: list[str]) -> str | None:
    """The fix that a complaint, given as words, calls for; None where it states no problem of this world."""
    for problem, fix in _PROBLEMS:
        n = len(problem)
        if any(tuple(asked[at : at + n]) == problem for at in range(len(asked) - n + 1)):
            return fix
    return None


def _item(asked: list[str], answered: list[str]) -> dict[str, bool]:
    wanted, named = _ITEMS.intersection(asked), _ITEMS.intersection(answered)
    return {"right_item": bool(named) and named <= wanted, "wrong_item": bool(named - wanted)}


def _fix(needed: str | None, kinds: list[str | None]) -> dict[str, bool]:
    offered = {kind.removeprefix("fix_") for kind in kinds if kind and kind.startswith("fix_")}
    return {"right_fix": bool(offered) and offered == {needed}, "wrong_fix": bool(offered - {needed}), "no_fix": not offered}


def _repeats(sentences: list[list[str]], kinds: list[str | None]) -> bool:
    """Whether two sentences say the same: equal words, or the same kind (two apologies, two fixes of one type)."""
    said = [kind or " ".join(sentence) for sentence, kind in zip(sentences, kinds, strict=True)]
    return len(set(said)) < len(said)
