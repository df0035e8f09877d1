"""The records that flow from a file to the engine. All are frozen; none knows torch.

    Example    what somebody asked, what was answered, and which answers were preferred: text
    Judgment   one verdict by one annotator over two responses of an Example; append-only
    Tree       an Example as token ids: one prompt, K branches

`Example.pairs`, `labels` and `scores` hold what the *file* states (a chosen and a rejected column, thumbs, ratings). Verdicts
that preftune collects itself are Judgments, from which pairs are derived and which nothing overwrites.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant", "tool"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


Prompt = str | tuple[Message, ...]
"""Plain text that a response continues, or the messages before the response."""

Response = str | tuple[Message, ...]
"""The text of the answer; in multi-turn SFT the turns after the prompt, of which the assistant's are scored."""


class Pair(NamedTuple):
    """Response `winner` is preferred over response `loser` (indices into `Example.responses`)."""

    winner: int
    loser: int
    confidence: float = 1.0  # fraction: how sure that the winner is better; 0.5 is a tie
    margin: float = 0.0  # score of the winner minus score of the loser, in the file's own unit; 0 where it gives none


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, its responses, and what is known of which are better.

    id:         stable hash of the content (`content_id`), or the file's own id.
    prompt:     text or messages.
    responses:  one or more; the index of a response is its name everywhere else.
    source:     `file:line`, or `dataset[row]`.
    split:      "train", "eval", or "" where nobody has decided.
    pairs:      preferences among the responses; empty for unpaired and SFT data.
    labels:     per response True (good), False (bad), None (unknown); empty where there are none.
    scores:     per response a rating, higher is better; empty where there are none.
    reference:  an answer that is known to be right, which a judge may be shown; in multi-turn data the turns after the prompt.
    category:   what the file's column of that name says, by which an evaluation is broken down; "" where it says nothing.
    origin:     the same of its column `source`.
    """

    id: str
    prompt: Prompt
    responses: tuple[Response, ...]
    source: str = ""
    split: str = ""
    pairs: tuple[Pair, ...] = ()
    labels: tuple[bool | None, ...] = ()
    scores: tuple[float, ...] = ()
    reference: Response | None = None
    category: str = ""
    origin: str = ""

    @property
    def prompt_key(self) -> str:
        """Hash of the prompt alone: examples that share it belong to the same split."""
        return content_id(self.prompt)


Verdict = Literal["i", "j", "tie", "both_bad", "unscored"]
Strength = Literal["", "slight", "clear"]


@dataclass(frozen=True, slots=True)
class Judgment:
    """One verdict over responses `i` and `j` of an example, shown in one order. Append-only, with its provenance.

    example:      `Example.id`.
    verdict:      "i" or "j" is better, "tie", "both_bad", or "unscored" (no verdict could be read; not a tie).
    annotator:    who or what judged: a person's name, a model and its template, a rule.
    shown_order:  the order in which the two were shown, (i, j) or (j, i).
    seconds:      time that the judgment took; 0 where it was not measured.
    at:           ISO 8601 time, UTC; "" where the judge is a pure function.
    why:          the reason given, or "".
    p:            probability that response `i` is the better one, where the judge states it (log-probs); None where not.
    strength:     "slight" or "clear", where somebody said how much better; "" where not.
    """

    example: str
    i: int
    j: int
    verdict: Verdict
    annotator: str
    shown_order: tuple[int, int]
    seconds: float = 0.0
    at: str = ""
    why: str = ""
    p: float | None = None
    strength: Strength = ""


class Branch(NamedTuple):
    """One response as tokens."""

    ids: NDArray[np.int32]  # [L] token ids, the end-of-turn token included where the response is whole
    scored: NDArray[np.bool_]  # [L] True where the token's log-prob counts (all of a reply; assistant turns in multi-turn SFT)


@dataclass(frozen=True, slots=True)
class Tree:
    """An Example as the engine reads it: the prompt once, each response a branch that sees the prompt and itself.

    prompt:    [P] token ids, exactly those that the model sees at inference; P >= 1.
    branches:  K responses.
    pairs, labels, scores, id: as in Example.
    """

    id: str
    prompt: NDArray[np.int32]
    branches: tuple[Branch, ...]
    pairs: tuple[Pair, ...] = ()
    labels: tuple[bool | None, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens read when the prompt is read once: P + sum of the branches' lengths."""
        return len(self.prompt) + sum(len(b.ids) for b in self.branches)


_JSON = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


def content_id(*content: object) -> str:
    """16 hex digits that name this content (text, Messages, nested tuples of them), the same on every machine."""
    return content_digest(content, size=8).hex()


def content_digest(content: object, *, size: int) -> bytes:
    """`size` bytes that name this content, the same on every machine."""
    return hashlib.blake2b(_JSON.encode(content).encode(), digest_size=size).digest()
