"""Checks for shortcuts: what tells chosen from rejected without reading them, which a model will learn in place of quality.

The thresholds are on the share of pairs in which the cheat is right, on prompts it has not seen: 0.55 is worth a note, 0.60 a
warning, 0.70 an error. A cheat that is right in a share a of the pairs pulls with a net 2a - 1 of them; at 0.70 that is as much
as a typical annotator's own judgment, who agrees with another in seven of ten comparisons, so nothing else can be learnt first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from preftune.diagnose import features
from preftune.diagnose.corpus import Corpus
from preftune.diagnose.features import Features
from preftune.diagnose.finding import N_EXAMPLES, Evidence, Finding, Severity, skipped
from preftune.diagnose.learn import Outcome, cross_validated, rows_of
from preftune.diagnose.share import Share, graded, share

CHEAT = {"note": 0.55, "warning": 0.6, "error": 0.7}
MIN_PAIRS = 50
"""Fewer pairs give an interval so wide that no accuracy below 0.83 could be told from chance at 99.9 %."""


def length(corpus: Corpus) -> Finding:
    """Whether the longer (or the shorter) response wins too often, and how far length alone predicts the winner."""
    pairs = corpus.contrast
    sizes = np.array([[len(w), len(x)] for w, x in zip(pairs.winners, pairs.losers, strict=True)]).reshape(-1, 2)
    unequal = np.flatnonzero(sizes[:, 0] != sizes[:, 1])
    if len(unequal) < MIN_PAIRS:
        return skipped("length", _too_few(len(unequal), "preferences between responses of different length"))
    longer = share((sizes[unequal, 0] > sizes[unequal, 1]), [pairs.groups[i] for i in unequal])
    cheat, outcome = _cheat(corpus, features.length)
    which = "longer" if longer.value >= 0.5 else "shorter"
    n_balanced = 2 * int(min((sizes[:, 0] > sizes[:, 1]).sum(), (sizes[:, 0] < sizes[:, 1]).sum()))
    severity = graded(cheat, **CHEAT)
    return Finding(
        "length",
        severity,
        f"the longer response wins in {longer} of {longer.n} preferences; length alone predicts the winner in {cheat}",
        ""
        if severity == "ok"
        else f"the model will learn that {which} is better: use a length-normalised loss (SimPO), a subsample in which both "
        f"win equally often ({n_balanced} preferences), or add examples in which the {_other(which)} one is right",
        _numbers(cheat, outcome)
        | {
            "longer_wins": round(longer.value, 4),
            "longer_wins_interval": longer.interval,
            "n_unequal": longer.n,
            "median_chosen": float(np.median(sizes[:, 0])),
            "median_rejected": float(np.median(sizes[:, 1])),
            "n_balanced": n_balanced,
            "histogram": _histogram(sizes),
        },
        _easiest(corpus, outcome) if severity != "ok" else (),
    )


def first_word(corpus: Corpus) -> Finding:
    """Whether the first one or two words give the winner away."""
    return _shortcut(
        corpus, "first_word", (features.opening,), "the first words", "vary how answers open, or cut stock openings"
    )


def formatting(corpus: Corpus) -> Finding:
    """Whether lists, headings, marks of punctuation or how the text ends give the winner away."""
    return _shortcut(
        corpus,
        "formatting",
        (features.formatting,),
        "formatting and punctuation",
        "bring both sides into one form, or balance them",
    )


def surface(corpus: Corpus) -> Finding:
    """How far everything that can be seen without reading predicts the winner, taken together."""
    return _shortcut(
        corpus,
        "surface",
        features.SURFACE,
        "length, openings, formatting, refusals and language together",
        "a model can win by these alone: balance them",
    )


def refusals(corpus: Corpus) -> Finding:
    """Whether refusing decides, and how often both responses refuse."""
    return _marker(
        corpus, "refusals", features.refuses, "refuses", "the model will learn to refuse {always}, whatever is asked"
    )


def flattery(corpus: Corpus) -> Finding:
    """Whether praise or eagerness at the start decides."""
    return _marker(
        corpus, "flattery", features.flatters, "opens with praise or eagerness", "the model will learn to flatter {always}"
    )


def language(corpus: Corpus) -> Finding:
    """Whether an answer in another language than the prompt's wins, or loses, by that alone."""
    pairs = corpus.contrast
    if len(pairs.units) < MIN_PAIRS:
        return skipped("language", _too_few(len(pairs.units), "preferences"))
    asked = [features.language(corpus.prompts[corpus.units[i].example]) for i in pairs.units]
    sides = [[features.language(text) for text in side] for side in (pairs.winners, pairs.losers)]
    strange = [[bool(a and s and a != s) for a, s in zip(asked, side, strict=True)] for side in sides]
    said = "is in another language than the prompt"
    finding = _decided(corpus, "language", strange[0], strange[1], said, "the model will learn to change the language {always}")
    chosen = share(strange[0], pairs.groups)
    counts: dict[str, int] = {}
    for name in sides[0]:
        counts[name or "unclear"] = counts.get(name or "unclear", 0) + 1
    return Finding(
        finding.name,
        finding.severity,
        f"{finding.said}; the chosen one is in {chosen}",
        finding.remedy,
        {**finding.numbers, "chosen_in_other_language": round(chosen.value, 4), "chosen_languages": counts},
        finding.examples,
    )


def _shortcut(corpus: Corpus, name: str, of: tuple[Features, ...], what: str, remedy: str) -> Finding:
    n = len(corpus.contrast.units)
    if n < MIN_PAIRS:
        return skipped(name, _too_few(n, "preferences"))
    cheat, outcome = _cheat(corpus, *of)
    severity = graded(cheat, **CHEAT)
    said = f"{what} predict the winner in {cheat} of {n} preferences"
    numbers = _numbers(cheat, outcome)
    if severity == "ok":
        return Finding(name, severity, said, numbers=numbers)
    strongest = ", ".join(
        f"{feature} {'for' if weight > 0 else 'against'} winning" for feature, weight in numbers["strongest"].items()
    )
    return Finding(name, severity, said, f"{remedy}; what weighs most: {strongest}", numbers, _easiest(corpus, outcome))


def _cheat(corpus: Corpus, *of: Features) -> tuple[Share, Outcome]:
    """How often a model of these features is right on prompts that it has not seen."""
    parts = [differences(corpus, one) for one in of]
    rows = [{name: value for part in row for name, value in part.items()} for row in zip(*parts, strict=True)]
    outcome = cross_validated(rows_of(rows), corpus.contrast.groups)
    return share(outcome.correct, corpus.contrast.groups), outcome


def differences(corpus: Corpus, of: Features) -> list[dict[str, float]]:
    """Per preference the features of the winner minus those of the loser; computed once for each kind of features."""
    if of not in corpus.memo:
        sides = zip(corpus.contrast.winners, corpus.contrast.losers, strict=True)
        corpus.memo[of] = [features.difference(of(winner), of(loser)) for winner, loser in sides]
    found: list[dict[str, float]] = corpus.memo[of]
    return found


def _numbers(cheat: Share, outcome: Outcome) -> dict[str, Any]:
    strongest = sorted(outcome.weights.items(), key=lambda item: -abs(item[1]))[:5]
    return {
        "accuracy": round(cheat.value, 4),
        "accuracy_interval": cheat.interval,
        "n": cheat.n,
        "strongest": {name: round(weight, 3) for name, weight in strongest},
    }


def _easiest(corpus: Corpus, outcome: Outcome) -> tuple[Evidence, ...]:
    """The pairs that the cheat gets right most clearly."""
    best = np.argsort(-outcome.score, kind="stable")[:N_EXAMPLES]
    return tuple(corpus.evidence(int(corpus.contrast.units[i])) for i in best)


def _marker(corpus: Corpus, name: str, has: Callable[[str], bool], what: str, remedy: str) -> Finding:
    pairs = corpus.contrast
    if len(pairs.units) < MIN_PAIRS:
        return skipped(name, _too_few(len(pairs.units), "preferences"))
    return _decided(corpus, name, [has(t) for t in pairs.winners], [has(t) for t in pairs.losers], what, remedy)


def _decided(corpus: Corpus, name: str, won: Sequence[bool], lost: Sequence[bool], what: str, remedy: str) -> Finding:
    """A mark that one of the two responses has: whether it decides.

    It does where, of the pairs in which one side alone has it, that side wins (or loses) more than seven in ten, and such pairs
    are more than 1 in 100.
    """
    pairs = corpus.contrast
    alone = [i for i, (a, b) in enumerate(zip(won, lost, strict=True)) if a != b]
    both = share([a and b for a, b in zip(won, lost, strict=True)], pairs.groups)
    numbers: dict[str, Any] = {"n": len(won), "n_one_side": len(alone), "both_sides": round(both.value, 4)}
    if len(alone) < 10:
        return Finding(name, "ok", f"one side alone {what} in {len(alone)} of {len(won)} preferences", numbers=numbers)
    wins = share([won[i] for i in alone], [pairs.groups[i] for i in alone])
    frequent = share([a != b for a, b in zip(won, lost, strict=True)], pairs.groups)
    decides = wins.surely_above >= CHEAT["error"] or wins.surely_below <= 1 - CHEAT["error"]
    severity: Severity = "ok"
    if decides:
        severity = graded(frequent, note=0.0, warning=0.01, error=0.4)  # 0.4 of the pairs decided: right in 0.70 of all
    always = "always" if wins.value >= 0.5 else "never"
    return Finding(
        name,
        severity,
        f"where one side alone {what} ({frequent} of the preferences), it wins {wins}",
        remedy.format(always=always) + ": add pairs in which it is the other way round" if decides else "",
        numbers | {"wins": round(wins.value, 4), "wins_interval": wins.interval, "one_side": round(frequent.value, 4)},
        tuple(corpus.evidence(int(pairs.units[i])) for i in alone[:N_EXAMPLES]) if decides else (),
    )


def _histogram(sizes: np.ndarray) -> dict[str, list[float]]:
    """log2 of chosen by rejected length, in 21 bins from -4 to 4: edges and counts."""
    ratio = np.log2((sizes[:, 0] + 1) / (sizes[:, 1] + 1))
    counts, edges = np.histogram(np.clip(ratio, -4, 4), 21, (-4, 4))
    return {"edges": [round(float(e), 3) for e in edges], "counts": [float(c) for c in counts]}


def _other(which: str) -> str:
    return "shorter" if which == "longer" else "longer"


def _too_few(n: int, what: str) -> str:
    return f"{n} {what}: too few to tell a shortcut from chance ({MIN_PAIRS} are needed)"
