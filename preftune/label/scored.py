"""Scores of single responses, whoever gave them, and what they come to as judgments.

>>> compare(example, [2.5, 1.0], annotator="reward:small")[0].verdict
'i'
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from preftune.data.types import Example, Judgment, Verdict

Pairs = Literal["all", "best_worst"]
"""All pairs i < j of an example's responses, or the best against the worst by score (the earliest of equals)."""


class Scored(NamedTuple):
    """A score of one response."""

    example: str  # Example.id
    response: int
    score: float | None  # None: unscored
    annotator: str
    seconds: float
    at: str  # ISO 8601, UTC; "" for a pure function
    why: str


def compare(
    example: Example,
    scores: Sequence[float | None],
    *,
    annotator: str,
    temperature: float = 0.0,
    seed: int = 0,
    pairs: Pairs = "all",
    at: str = "",
) -> list[Judgment]:
    """What scores of an example's responses come to: one judgment per pair; unscored where a score is None."""
    judgments = []
    for i, j in _chosen_pairs(scores, pairs):
        verdict = _verdict(example, i, j, scores[i], scores[j], temperature, seed)
        why = " against ".join("no score" if scores[k] is None else f"{scores[k]:g}" for k in (i, j))
        judgments.append(Judgment(example.id, i, j, verdict, annotator, shown_order=(i, j), at=at, why=why))
    return judgments


def _chosen_pairs(scores: Sequence[float | None], pairs: str) -> list[tuple[int, int]]:
    if pairs == "all":
        return list(itertools.combinations(range(len(scores)), 2))
    known = {k: score for k, score in enumerate(scores) if score is not None}
    if len(known) < 2:
        return []
    best, worst = max(known, key=lambda k: (known[k], -k)), min(known, key=lambda k: (known[k], k))
    first, second = list(known)[:2]
    return [(first, second)] if best == worst else [(min(best, worst), max(best, worst))]


def _verdict(
    example: Example, i: int, j: int, one: float | None, other: float | None, temperature: float, seed: int
) -> Verdict:
    if example.responses[i] == example.responses[j]:
        return "tie"
    if one is None or other is None:
        return "unscored"
    if temperature == 0:
        return "tie" if one == other else "i" if one > other else "j"
    return "i" if _uniform(seed, example.id, i, j) < _sigmoid((one - other) / temperature) else "j"


def _uniform(*of: object) -> float:
    """A number in [0, 1) that follows from `of` alone, the same on every machine."""
    digest = hashlib.blake2b(repr(of).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
