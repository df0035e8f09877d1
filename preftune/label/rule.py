"""Labels responses by a rule: a function from a prompt and a response to a number, higher is better.

    >>> judgments = label_by_rule(examples, lambda prompt, response: -len(response))
    >>> judgments[0].verdict, judgments[0].why
    ('j', '-120 against -84')

At `temperature` 0 the higher score wins. Above 0 the verdict is drawn with the Bradley-Terry probability of the two scores
(Bradley & Terry 1952, Biometrika 39, eq. 1, with exp(score / temperature) as the strength), as people who judge do err.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from preftune.data.types import Example, Judgment, Prompt, Response, Verdict
from preftune.errors import ConfigError, DataError, nearest

Rule = Callable[[Prompt, Response], float]
"""Scores one response to a prompt: any finite number, higher is better."""


def label_by_rule(
    examples: Iterable[Example],
    rule: Rule,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    pairs: Literal["all", "best_worst"] = "all",
    annotator: str | None = None,
) -> list[Judgment]:
    """One judgment per pair of responses of each example; examples with fewer than two responses have none.

    temperature:  0: exact, equal scores are a tie. Above 0: P(i beats j) = sigmoid((score_i - score_j) / temperature).
    pairs:        "all" pairs i < j, or only the "best_worst" of each example by score (the earliest of equals).
    annotator:    name kept with the judgments; "rule:" and the function's name if None.

    A verdict depends on (seed, example id, i, j) and the two scores only, so neither the order nor the number of examples
    changes it. Responses that are the same text always tie. Raises ConfigError for a setting out of range, DataError for a
    score that is not a finite number; what the rule itself raises passes through.
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature: must be 0 or a positive number; got {temperature!r}")
    if pairs not in ("all", "best_worst"):
        raise ConfigError(f"pairs: {pairs!r} is not a choice of pairs: {nearest(pairs, ('all', 'best_worst'))}")
    name = f"rule:{getattr(rule, '__name__', type(rule).__name__)}" if annotator is None else annotator
    judgments = []
    for example in examples:
        scores = _scores(example, rule)
        judgments += compare(example, scores, annotator=name, temperature=temperature, seed=seed, pairs=pairs)
    return judgments


def compare(
    example: Example,
    scores: Sequence[float | None],
    *,
    annotator: str,
    temperature: float = 0.0,
    seed: int = 0,
    pairs: Literal["all", "best_worst"] = "all",
    at: str = "",
) -> list[Judgment]:
    """What scores of an example's responses come to: one judgment per pair; unscored where a score is None."""
    judgments = []
    for i, j in _chosen_pairs(scores, pairs):
        verdict = _verdict(example, i, j, scores[i], scores[j], temperature, seed)
        why = " against ".join("no score" if scores[k] is None else f"{scores[k]:g}" for k in (i, j))
        judgments.append(Judgment(example.id, i, j, verdict, annotator, shown_order=(i, j), at=at, why=why))
    return judgments


def _scores(example: Example, rule: Rule) -> list[float]:
    scores = [float(rule(example.prompt, response)) for response in example.responses]
    for at, score in enumerate(scores):
        if not math.isfinite(score):
            where = f"{example.source}: " if example.source else ""
            raise DataError(
                f"{where}the rule gave response {at} of example {example.id!r} the score {score}: expected a finite number"
            )
    return scores


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
