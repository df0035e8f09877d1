"""A judge looks at a sample of the preferences, and its verdicts are held against the labels.

    >>> judged = audited(corpus, lambda examples: judge_pairs(examples, judge, replies=replies, ledger=ledger).judgments, n=50)
    >>> audit(replace(corpus, judged=judged)).said
    'of 50 preferences a judge stands against the label in 8.0% [3.2%, 18.8%]'

A judge is not always right either. How often it changes sides when the two are shown the other way round says how much of the
disagreement is its own: if each of its verdicts goes wrong by itself with probability e, the orders differ in 2e(1 - e) of the
comparisons, and agree on the wrong side in e² / (e² + (1 - e)²) of those where they agree. That much is taken as the judge's.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import replace

from preftune.data.judgments import settled
from preftune.data.types import Example, Judgment
from preftune.diagnose.corpus import Corpus
from preftune.diagnose.finding import N_EXAMPLES, Finding, skipped
from preftune.diagnose.share import graded, share

Asking = Callable[[Sequence[Example]], list[Judgment]]
"""Has two responses of each example compared."""


def audited(corpus: Corpus, ask: Asking, n: int, *, seed: int = 0) -> list[Judgment]:
    """The judgments of `n` preferences drawn by the seed, or of all; those whose two responses are the same are left out."""
    stated = [
        unit for unit in corpus.contrast.units.tolist()
        if len({corpus.examples[corpus.units[unit].example].responses[k] for k in corpus.units[unit][1:3]}) == 2
    ]  # fmt: skip
    drawn = sorted(random.Random(seed).sample(stated, min(n, len(stated))))
    asked: dict[str, tuple[str, int, int]] = {}
    examples = []
    for unit in drawn:
        one = corpus.units[unit]
        example, (i, j) = corpus.examples[one.example], sorted((one.winner, one.loser))
        name = f"{example.id}/{i}/{j}"  # two preferences of one example are two questions
        asked[name] = (example.id, i, j)
        both = (example.responses[i], example.responses[j])
        examples.append(replace(example, id=name, responses=both, pairs=(), labels=(), scores=()))
    found = []
    for judgment in ask(examples):
        name, i, j = asked[judgment.example]
        order = (i, j) if judgment.shown_order == (0, 1) else (j, i)
        found.append(replace(judgment, example=name, i=i, j=j, shown_order=order))
    return found


def audit(corpus: Corpus) -> Finding:
    """Labels against verdicts of a judge, or of people, on some of the preferences; a tie stands half against the label.

    A comparison whose two orders contradict each other says nothing of the label; it says something of the judge.
    """
    if not corpus.judged:
        return skipped("audit", "nobody judged a sample (--audit N --judge-model NAME, or --judged FILE)")
    place = {
        (corpus.examples[u.example].id, min(u.winner, u.loser), max(u.winner, u.loser)): i
        for i, u in enumerate(corpus.units)
        if u.winner >= 0
    }
    every = [one for one in settled(corpus.judged) if (one.example, one.i, one.j) in place]
    if not every:
        return skipped("audit", "no judgment is of a preference of these data")
    torn, n_twice = _torn(corpus.judged, place.keys())
    n_unscored = sum(one.verdict == "unscored" for one in every)
    known = [one for one in every if one.verdict != "unscored" and (one.example, one.i, one.j, one.annotator) not in torn]
    numbers = {
        "n_judged": len(every), "n": len(known), "n_unscored": n_unscored, "n_contradictory": len(torn),
        "order_consistency": round(1 - len(torn) / n_twice, 4) if n_twice else None,
    }  # fmt: skip
    trust = _trust(len(every), n_unscored, len(torn), n_twice)
    if not known:
        return Finding("audit", "note", f"the judge gives no verdict that could be held against a label: {trust}",
                       "ask a better judge, or people (preftune annotate)", numbers)  # fmt: skip
    units = [place[one.example, one.i, one.j] for one in known]
    against = [
        0.5 if one.verdict not in ("i", "j") else float((one.i if one.verdict == "i" else one.j) != corpus.units[unit].winner)
        for one, unit in zip(known, units, strict=True)
    ]
    found = share(against, [corpus.keys[corpus.units[unit].example] for unit in units])
    own = _explained(len(torn) / n_twice if n_twice else 0.0)
    severity = graded(found, note=0.15 + own, warning=0.25 + own, error=0.4 + own)
    apart = list(dict.fromkeys(unit for unit, value in zip(units, against, strict=True) if value == 1))
    said = f"of {len(known)} verdicts on these preferences {found} stand against the label"
    if trust:
        said += f"; {trust}"
    if own >= 0.01:
        said += f", and by that alone would stand against right labels in {own:.1%}" + (
            ": enough to explain what was found" if found.low <= own else ""
        )
    return Finding(
        "audit",
        severity,
        said,
        "" if severity == "ok" else "read those that are apart: is it the label, or the judge (preftune agree)?",
        numbers | {
            "against": round(found.value, 4), "against_interval": found.interval, "n_opposite": len(apart),
            "explained_by_judge": round(own, 4),
        },
        tuple(corpus.evidence(unit) for unit in apart[:N_EXAMPLES]),
    )  # fmt: skip


def _torn(judgments: Sequence[Judgment], known: Container[tuple[str, int, int]]) -> tuple[set[tuple[str, int, int, str]], int]:
    """Comparisons whose two orders have different verdicts, and how many have a verdict in both."""
    orders: dict[tuple[str, int, int, str], dict[tuple[int, int], str]] = defaultdict(dict)
    for one in judgments:
        i, j = sorted((one.i, one.j))
        winner = {"i": str(one.i), "j": str(one.j)}.get(one.verdict, one.verdict)
        if (one.example, i, j) in known:
            orders[one.example, i, j, one.annotator][one.shown_order] = winner
    twice = {key: set(said.values()) for key, said in orders.items() if len(said) == 2 and "unscored" not in said.values()}
    return {key for key, said in twice.items() if len(said) > 1}, len(twice)


def _explained(torn: float) -> float:
    """The share of agreeing orders that are both wrong, for a judge whose orders differ in the share `torn`."""
    wrong = (1 - math.sqrt(max(0.0, 1 - 2 * torn))) / 2
    return wrong**2 / (wrong**2 + (1 - wrong) ** 2)


def _trust(n: int, n_unscored: int, n_torn: int, n_twice: int) -> str:
    """What is to be said of the judge itself, in words; "" where there is nothing."""
    said = []
    if n_unscored:
        said.append(f"on {n_unscored} of {n} it gives no verdict that can be read")
    if n_torn:
        said.append(f"on {n_torn} of {n_twice} it contradicts itself when the two are shown the other way round")
    return ", ".join(said)
