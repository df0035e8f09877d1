"""Judgments in, training data out: who wins among an example's responses, how sure that is, and what was left out and why.

    >>> found = preferences(examples, judgments)
    >>> found.examples[0].pairs
    (Pair(winner=1, loser=0, confidence=0.6666666666666666, margin=0.0),)
    >>> found.counts["tie"]
    12

Judgments are kept as they were given; what is trained on is derived from them anew whenever it is needed, by pure functions:
`preferences` for objectives that compare, `labels` for those that read good and bad responses apart, and `choose` for
examples that come with scores or preferences of their own.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

from preftune.data.judgments import settled, share_of_i
from preftune.data.types import Example, Judgment, Pair, Verdict
from preftune.errors import ConfigError, DataError, listing, nearest

Choice = Literal["all", "best_worst", "best_random"]
"""Which pairs of an example are kept: every one, the widest, or one of those that the best response wins."""


class Derived(NamedTuple):
    """Training data and the account of it.

    counts: `comparisons` (two responses of an example with one judgment or more), `kept` of them, and each reason for which
    others were left out: kept + those = comparisons. `judgments`, `unscored`, and `examples` with nothing left.
    """

    examples: list[Example]
    counts: dict[str, int]


class _Votes(NamedTuple):
    """What the annotators say of two responses of an example, `first` < `second`."""

    first: int
    second: int
    shares: list[float]  # per annotator: 1 for the first, 0 for the second, or a probability between
    both_bad: int

    @property
    def share(self) -> float:
        return sum(self.shares) / len(self.shares)  # exact for a tie of verdicts: they are halves


def preferences(
    examples: Sequence[Example],
    judgments: Iterable[Judgment],
    *,
    weigh: Literal["majority", "confidence"] = "majority",
    ties: Literal["drop", "soft"] = "drop",
    min_agreement: float = 0.5,
    min_annotators: int = 1,
    choice: Choice = "all",
    seed: int = 0,
) -> Derived:
    """The examples with `pairs` decided by the annotators' votes, in their order; those without a pair are left out.

    An annotator has one vote on two responses (`judgments.settled`); "tie" and "both_bad" are half a vote for each side,
    "unscored" is none. `Pair.confidence` is the winner's share of the votes, `Pair.margin` that of the example's own pair of
    the same winner and loser, else 0. Pairs that the examples came with are replaced.

    weigh:           "majority": a vote is the verdict. "confidence": it is the probability that the judge gave, if it did.
    ties:            equal votes make no pair, or ("soft") a pair of confidence 0.5, for objectives that learn from ties.
    min_agreement:   smallest share of the votes that the winner must have, 0.5 to 1.
    min_annotators:  fewest annotators with a verdict.
    choice:          as in `choose`.

    Raises DataError that lists every judgment of an unknown example or response, and every id that two examples share;
    ConfigError for a setting out of range.
    """
    _check_settings(weigh, ties, min_agreement, min_annotators)
    votes, counts = _votes(examples, list(judgments), weigh)
    kept: list[Example] = []
    for example in examples:
        pairs = []
        for one in votes.get(example.id, []):
            same = example.responses[one.first] == example.responses[one.second]
            why = "identical responses" if same else _why_not(one, ties, min_agreement, min_annotators)
            counts[why or "kept"] += 1
            if not why:
                pairs.append(_pair(one, example))
        if pairs:
            wanted = choose(replace(example, pairs=tuple(pairs)), choice, seed=seed)
            counts["not chosen"] += len(pairs) - len(wanted.pairs)
            counts["kept"] -= len(pairs) - len(wanted.pairs)
            kept.append(wanted)
    counts["examples without a pair"] = len(examples) - len(kept)
    return Derived(kept, dict(counts))


def labels(
    examples: Sequence[Example], judgments: Iterable[Judgment], *, min_annotators: int = 1, balance: bool = False, seed: int = 0
) -> Derived:
    """The examples with `labels` instead of pairs: a response is good where it has more than half of its votes, bad with fewer.

    A response that all annotators call bad ("both_bad") in a comparison has no vote there. Half of the votes is no label.
    `balance` takes labels away from the more frequent kind, drawn by the hash of seed, example and response, until both are
    equally many. Counts are of responses: `kept` = `good` + `bad`, `undecided`, `not judged`, `balanced away`.

    Raises DataError as `preferences` does.
    """
    votes, counts = _votes(examples, list(judgments), "majority")
    verdicts: dict[tuple[str, int], bool] = {}
    for example in examples:
        shares: dict[int, list[float]] = defaultdict(list)
        for one in votes.get(example.id, []):
            if len(one.shares) >= min_annotators:
                good = 1 - one.both_bad / len(one.shares)
                shares[one.first].append(one.share * good)
                shares[one.second].append((1 - one.share) * good)
        for at, values in shares.items():
            if (mean := sum(values) / len(values)) != 0.5:
                verdicts[example.id, at] = mean > 0.5
            else:
                counts["undecided"] += 1
        counts["not judged"] += len(example.responses) - len(shares)
    if balance:
        counts["balanced away"] = _balance(verdicts, seed)
    counts["good"], counts["bad"] = sum(verdicts.values()), len(verdicts) - sum(verdicts.values())
    counts["kept"] = len(verdicts)
    labelled = [
        replace(e, pairs=(), labels=tuple(verdicts.get((e.id, k)) for k in range(len(e.responses))), scores=())
        for e in examples
    ]
    kept = [e for e in labelled if any(label is not None for label in e.labels)]
    counts["examples without a label"] = len(examples) - len(kept)
    return Derived(kept, dict(counts))


def choose(example: Example, choice: Choice, *, seed: int = 0) -> Example:
    """The example with the pairs that are wanted of those that it has.

    A response's standing is its score, or else the mean share of the votes over its pairs. "best_worst": the pair whose
    standings differ most. "best_random": of the pairs that the response of highest standing wins, one that follows from
    (seed, example id). Equals: the earlier. Raises ConfigError for an unknown choice.
    """
    if choice not in get_args(Choice):
        raise ConfigError(f"choice: {choice!r} is not known: {nearest(choice, get_args(Choice))}")
    if choice == "all" or len(example.pairs) < 2:
        return example
    standing = dict(enumerate(example.scores)) or _standing(example.pairs)
    if choice == "best_worst":
        return replace(example, pairs=(max(example.pairs, key=lambda p: standing[p.winner] - standing[p.loser]),))
    best = max((p.winner for p in example.pairs), key=lambda k: (standing[k], -k))
    beaten = [p for p in example.pairs if p.winner == best]
    return replace(example, pairs=(beaten[_draw(seed, example.id, 0) % len(beaten)],))


def _standing(pairs: Sequence[Pair]) -> dict[int, float]:
    shares: dict[int, list[float]] = defaultdict(list)
    for pair in pairs:
        shares[pair.winner].append(pair.confidence)
        shares[pair.loser].append(1 - pair.confidence)
    return {k: sum(values) / len(values) for k, values in shares.items()}


def _draw(*of: object) -> int:
    """A whole number that follows from `of` alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=8).digest(), "big")


def _balance(verdicts: dict[tuple[str, int], bool], seed: int) -> int:
    """Takes labels away until good and bad are equally many; how many went."""
    by_kind: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for key, good in verdicts.items():
        by_kind[good].append(key)
    fewer, more = sorted(by_kind.values(), key=len)
    surplus = sorted(more, key=lambda key: _draw(seed, *key))[len(fewer) :]
    for key in surplus:
        del verdicts[key]
    return len(surplus)


def _pair(votes: _Votes, example: Example) -> Pair:
    """The winner first (of a tie, the first response), with the margin of the example's own pair of these two."""
    first = votes.share >= 0.5
    winner, loser = (votes.first, votes.second) if first else (votes.second, votes.first)
    margin = next((p.margin for p in example.pairs if (p.winner, p.loser) == (winner, loser)), 0.0)
    return Pair(winner, loser, votes.share if first else 1.0 - votes.share, margin)


def _why_not(votes: _Votes, ties: str, min_agreement: float, min_annotators: int) -> str:
    """The reason for which a comparison makes no pair; "" where it makes one."""
    if len(votes.shares) < min_annotators:
        return "no verdict" if not votes.shares else "too few annotators"
    sure = max(votes.share, 1.0 - votes.share)
    if sure == 0.5:
        if ties == "soft" and min_agreement == 0.5:
            return ""
        return "both bad" if votes.both_bad == len(votes.shares) else "tie"
    return "too little agreement" if sure < min_agreement else ""


def _votes(
    examples: Sequence[Example], judgments: Sequence[Judgment], weigh: str
) -> tuple[dict[str, list[_Votes]], Counter[str]]:
    """Per example its comparisons in order, those without a verdict included; and the counts so far."""
    by_id = {example.id: example for example in examples}
    _check_ids(examples, by_id)
    problems = [problem for judgment in judgments if (problem := _problem(judgment, by_id.get(judgment.example)))]
    if problems:
        raise DataError(
            f"{len(problems)} judgments do not fit the examples (are they the file that was judged?):\n{listing(problems)}"
        )
    found: dict[str, dict[tuple[int, int], _Votes]] = defaultdict(dict)
    for one in settled(judgments):
        votes = found[one.example].setdefault((one.i, one.j), _Votes(one.i, one.j, [], 0))
        share = share_of_i(one if weigh == "confidence" else replace(one, p=None))
        if share is None:
            continue
        votes.shares.append(share)
        if one.verdict == "both_bad":
            found[one.example][one.i, one.j] = votes._replace(both_bad=votes.both_bad + 1)
    counts = Counter(
        judgments=len(judgments),
        unscored=sum(judgment.verdict == "unscored" for judgment in judgments),
        comparisons=sum(map(len, found.values())),
    )
    return {name: [by[key] for key in sorted(by)] for name, by in found.items()}, counts


def _check_settings(weigh: str, ties: str, min_agreement: float, min_annotators: int) -> None:
    for name, value, known in (("weigh", weigh, ("majority", "confidence")), ("ties", ties, ("drop", "soft"))):
        if value not in known:
            raise ConfigError(f"{name}: {value!r} is not known: {nearest(value, known)}")
    if not 0.5 <= min_agreement <= 1:
        raise ConfigError(f"min_agreement: {min_agreement} given, expected a share of the votes from 0.5 to 1")
    if min_annotators < 1:
        raise ConfigError(f"min_annotators: {min_annotators} given, expected 1 or more")


def _problem(judgment: Judgment, example: Example | None) -> str:
    name = f"judgment of example {judgment.example!r} by {judgment.annotator!r}"
    if example is None:
        return f"{name}: no such example"
    if judgment.i == judgment.j:
        return f"{name}: compares response {judgment.i} with itself"
    wrong = [at for at in (judgment.i, judgment.j) if not 0 <= at < len(example.responses)]
    if wrong:
        return f"{name}: response {wrong[0]} does not exist, the example has {len(example.responses)} (numbered from 0)"
    if judgment.verdict not in get_args(Verdict):
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
