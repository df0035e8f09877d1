"""Win rate of a policy's own answers against others' to the same prompts.

>>> counted([1.0, 0.75, 0.0, None], judge="the true reward", against="sft").win_rate.value
58.3

Answers are compared as `judge` compares any two: the other's first, the policy's second, both orders where a model is asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from preftune.data.judgments import read_judgments
from preftune.data.types import Example, Judgment, content_id
from preftune.errors import DataError
from preftune.evaluate.annotations import Annotations
from preftune.evaluate.benchmark import figures
from preftune.evaluate.estimate import Estimate, bootstrap, wilson
from preftune.evaluate.record import Wins
from preftune.evaluate.winrate import preferences_for, win_rate
from preftune.label.reliability import reliability
from preftune.label.template import instruction, transcript

_RATIOS = (0.0, 0.8, 1.25)  # of lengths, from here on: shorter, about as long, longer


def counted(
    preferences: Sequence[float | None],
    *,
    judge: str,
    against: str,
    tokens: float | None = None,
    tokens_base: float | None = None,
    seed: int = 0,
) -> Wins:
    """The record of preferences, one a prompt: the probability that the policy's answer is the better; None: no verdict."""
    rate = win_rate(preferences)
    return Wins(
        judge=judge,
        against=against,
        n_total=rate.n_total,
        n_wins=rate.n_wins,
        n_wins_base=rate.n_wins_base,
        n_draws=rate.n_draws,
        n_unscored=rate.n_dropped,
        win_rate=bootstrap([[100 * p] for p in preferences if p is not None], seed=seed),
        standard_error=rate.standard_error if rate.n_total > 1 else None,
        length_controlled=None,
        tokens=tokens,
        tokens_base=tokens_base,
    )


def comparisons(prompts: Sequence[Example], ours: Sequence[str], theirs: Sequence[str]) -> list[Example]:
    """What a judge is shown: the other's answer first, the policy's second. Other answers make another id."""
    return [
        Example(content_id(e.prompt, other, mine), e.prompt, (other, mine), e.source, reference=e.reference)
        for e, mine, other in zip(prompts, ours, theirs, strict=True)
    ]


class Judged:
    """Judgments of a file that speak of these comparisons, by who judged."""

    def __init__(self, file: Path, examples: Sequence[Example]) -> None:
        """Reads the file; judgments of other answers are left aside."""
        self.file = file
        self.examples = {e.id: e for e in examples}
        self.by: dict[str, dict[str, list[Judgment]]] = defaultdict(lambda: defaultdict(list))
        for one in read_judgments(file):
            if one.example in self.examples:
                self.by[one.annotator][one.example].append(one)

    def preferences(self, annotator: str) -> dict[str, float | None]:
        """Example -> probability that the policy's answer is the better; None: no verdict."""
        found = self.by[annotator]
        return {name: (preferences_for(acts) or [None])[0] for name, acts in found.items()}

    def wins(self, annotator: str, *, against: str, n_tokens: Sequence[tuple[int, int]], seed: int) -> tuple[Wins, list[str]]:
        """The record of one judge, and notes. n_tokens: of each comparison, tokens of the policy's answer and of the other."""
        known = self.preferences(annotator)
        kept = [(e, known[name], n) for (name, e), n in zip(self.examples.items(), n_tokens, strict=True) if name in known]
        told = Annotations(
            source=self.file,
            preferences=[p for _, p, _ in kept],
            lengths=[len(transcript(e.responses[1])) for e, _, _ in kept],
            lengths_base=[len(transcript(e.responses[0])) for e, _, _ in kept],
            instructions=[instruction(e.prompt) for e, _, _ in kept],
            places=[f"{self.file}: example {e.id}" for e, _, _ in kept],
        )
        controlled, notes = None, []
        try:
            found = figures(told, own=True, seed=seed)
            if (one := found.controlled) is not None:
                controlled = Estimate(one.win_rate, one.low, one.high, found.rate.n_total)
        except DataError as reason:
            notes.append(f"no length-controlled win rate by {annotator}: {reason}")
        mine, theirs = (float(np.mean([n[k] for _, _, n in kept])) if kept else None for k in (0, 1))
        record = counted(told.preferences, judge=annotator, against=against, tokens=mine, tokens_base=theirs, seed=seed)
        pairs = [(p, ours / max(base, 1)) for _, p, (ours, base) in kept if p is not None]
        consistent, first = self._orders(annotator)
        record = replace(
            record, length_controlled=controlled, by_length=_by_length(pairs), order_consistency=consistent, first_wins=first
        )
        return record, notes

    def _orders(self, annotator: str) -> tuple[Estimate | None, Estimate | None]:
        """How often both orders have one verdict, and how often the first one shown wins."""
        acts = [act for group in self.by[annotator].values() for act in group]
        (one,) = reliability(acts, list(self.examples.values()))
        n_twice = one.n_judgments - one.n_pairs
        consistent, first = one.order_consistency, one.p_first
        return (
            None if consistent is None else wilson(consistent * n_twice, n_twice),
            None if first is None else wilson(first * one.n_judgments, one.n_judgments),
        )


def _by_length(pairs: Sequence[tuple[float, float]]) -> tuple[tuple[float, float, Estimate], ...]:
    """Fraction of wins by the ratio of lengths, policy's over the other's."""
    found = []
    longest = max((ratio for _, ratio in pairs), default=0.0)
    for low, high in zip(_RATIOS, (*_RATIOS[1:], max(longest, _RATIOS[-1]) + 1), strict=True):
        inside = [p for p, ratio in pairs if low <= ratio < high]
        if inside:
            found.append((low, min(high, max(longest, low)), wilson(sum(inside), len(inside))))
    return tuple(found)
