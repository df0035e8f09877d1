"""Judgments in, preferences out: who wins among an example's responses, and how sure that is.

    >>> trained_on = preferences(examples, judgments)
    >>> trained_on[0].pairs
    (Pair(winner=1, loser=0, confidence=0.6666666666666666, margin=0.0),)

Judgments are kept as they were given; pairs are derived from them anew whenever they are needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from preftune.data.types import Example, Judgment, Pair
from preftune.errors import DataError, listing

_SHARE_OF_I: Mapping[str, float] = {"i": 1.0, "j": 0.0, "tie": 0.5, "both_bad": 0.5}


def preferences(examples: Sequence[Example], judgments: Iterable[Judgment]) -> list[Example]:
    """The examples with `pairs` decided by the majority of verdicts, in their order.

    A verdict is one vote; "tie" and "both_bad" are half a vote for each side, "unscored" is none. `Pair.confidence` is the
    winner's share of the votes. Two responses with equal votes make no pair. Pairs that the examples came with are replaced,
    and an example for which no pair is decided is left out, so the lengths tell how many were.

    Raises DataError that lists every judgment of an unknown example or response, and every id that two examples share.
    """
    by_id = {example.id: example for example in examples}
    _check_ids(examples, by_id)
    votes: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    problems: list[str] = []
    for judgment in judgments:
        problem = _problem(judgment, by_id.get(judgment.example))
        if problem:
            problems.append(problem)
        elif judgment.verdict != "unscored":
            share = _SHARE_OF_I[judgment.verdict]
            first, second = sorted((judgment.i, judgment.j))
            votes[judgment.example][first, second].append(share if first == judgment.i else 1.0 - share)
    if problems:
        raise DataError(f"{len(problems)} judgments do not fit the examples:\n{listing(problems)}")
    return [replace(e, pairs=pairs) for e in examples if (pairs := _decided(votes.get(e.id, {})))]


def _decided(votes: Mapping[tuple[int, int], list[float]]) -> tuple[Pair, ...]:
    pairs = []
    for (first, second), shares in sorted(votes.items()):
        share = sum(shares) / len(shares)  # exact for a tie: shares are halves
        if share > 0.5:
            pairs.append(Pair(first, second, confidence=share))
        elif share < 0.5:
            pairs.append(Pair(second, first, confidence=1.0 - share))
    return tuple(pairs)


def _problem(judgment: Judgment, example: Example | None) -> str:
    name = f"judgment of example {judgment.example!r} by {judgment.annotator!r}"
    if example is None:
        return f"{name}: no such example"
    if judgment.i == judgment.j:
        return f"{name}: compares response {judgment.i} with itself"
    wrong = [at for at in (judgment.i, judgment.j) if not 0 <= at < len(example.responses)]
    if wrong:
        return f"{name}: response {wrong[0]} does not exist, the example has {len(example.responses)} (numbered from 0)"
    if judgment.verdict != "unscored" and judgment.verdict not in _SHARE_OF_I:
        return f"{name}: verdict {judgment.verdict!r} is none of i, j, tie, both_bad, unscored"
    return ""


def _check_ids(examples: Sequence[Example], by_id: Mapping[str, Example]) -> None:
    if len(by_id) < len(examples):
        twice = [
            f"{e.source or '(no source)'}: id {e.id!r} is also that of another example"
            for e in examples
            if by_id[e.id] is not e
        ]
        raise DataError(f"ids must be unique, since judgments name examples by them:\n{listing(twice)}")
