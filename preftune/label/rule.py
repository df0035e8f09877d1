"""Labels responses by a rule: a function from a prompt and a response to a number, higher is better.

    >>> judgments = label_by_rule(examples, lambda prompt, response: -len(response))
    >>> judgments[0].verdict, judgments[0].why
    ('j', '-120 against -84')

At `temperature` 0 the higher score wins. Above 0 the verdict is drawn with the Bradley-Terry probability of the two scores
(Bradley & Terry 1952, Biometrika 39, eq. 1, with exp(score / temperature) as the strength), as people who judge do err.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from preftune.data.types import Example, Judgment, Prompt, Response
from preftune.errors import ConfigError, DataError, nearest
from preftune.label.scored import Pairs, Scored, compare

Rule = Callable[[Prompt, Response], float]
"""Scores one response to a prompt: any finite number, higher is better."""


def label_by_rule(
    examples: Iterable[Example],
    rule: Rule,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    pairs: Pairs = "all",
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
    name = _name(rule) if annotator is None else annotator
    judgments = []
    for example in examples:
        scores = _scores(example, rule)
        judgments += compare(example, scores, annotator=name, temperature=temperature, seed=seed, pairs=pairs)
    return judgments


def score_by_rule(examples: Iterable[Example], rule: Rule) -> list[Scored]:
    """The rule's score of every response. Raises DataError where the rule fails or gives no finite number."""
    found = []
    for example in examples:
        try:
            scores = _scores(example, rule)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            where = f"{example.source}: " if example.source else ""
            raise DataError(f"{where}{_name(rule)} fails on example {example.id!r}: {type(error).__name__}: {error}") from error
        found += [Scored(example.id, k, score, _name(rule), 0.0, "", "") for k, score in enumerate(scores)]
    return found


def _name(rule: Rule) -> str:
    return f"rule:{getattr(rule, '__name__', type(rule).__name__)}"


def _scores(example: Example, rule: Rule) -> list[float]:
    scores = [float(rule(example.prompt, response)) for response in example.responses]
    for at, score in enumerate(scores):
        if not math.isfinite(score):
            where = f"{example.source}: " if example.source else ""
            raise DataError(
                f"{where}the rule gave response {at} of example {example.id!r} the score {score}: expected a finite number"
            )
    return scores
