"""Which settings are the best by the metric, which are as good as far as can be told, and which are on the frontier.

Runs that differ in their seed alone are one candidate: its figures are means over seeds, with the interval of those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from preftune.evaluate.estimate import Estimate
from preftune.sweeping.grid import Axis, Settings, run_name, text_of
from preftune.sweeping.measure import KL, WIN_RATE, half_width, over_seeds, within_noise, without_seed
from preftune.sweeping.record import Row


class Candidate(NamedTuple):
    """Settings, the runs that have them, and what was measured: a figure of one run, or the mean over seeds."""

    settings: Settings
    runs: list[str]
    figures: dict[str, Estimate]

    @property
    def name(self) -> str:
        """The settings in words."""
        return described(self.settings) or "all runs"


class Verdict(NamedTuple):
    """The best candidate by the metric."""

    best: Candidate | None  # None where no run has the metric
    tied: list[Candidate]  # exactly as good
    near: list[Candidate]  # not told apart from the best: the interval of the difference holds 0
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON: candidates by their settings and runs."""
        return {
            "best": self.best and _named(self.best),
            "tied": [_named(c) for c in self.tied],
            "within_noise": [_named(c) for c in self.near],
            "sentence": self.sentence,
        }


def _named(candidate: Candidate) -> dict[str, Any]:
    return {"settings": candidate.settings, "runs": candidate.runs}


def described(settings: Settings) -> str:
    """Settings as words of a command line."""
    return " ".join(f"{name}={text_of(value)}" for name, value in settings.items())


def candidates(rows: Sequence[Row]) -> list[Candidate]:
    """The settings of runs that are done, in the order of the table."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "done":
            groups.setdefault(run_name(without_seed(row.settings)), []).append(row)
    found = []
    for members in groups.values():
        names = dict.fromkeys(name for row in members for name in row.figures)
        figures = {name: over_seeds([row.figures.get(name) for row in members]) for name in names}
        known = {name: e for name, e in figures.items() if e is not None}
        found.append(Candidate(without_seed(members[0].settings), [row.name for row in members], known))
    return found


def verdict(rows: Sequence[Row], metric: str, direction: int) -> Verdict:
    """The best by `metric` and who else might be; ties go to the earlier row, and are said."""
    measured = [c for c in candidates(rows) if metric in c.figures and not math.isnan(c.figures[metric].value)]
    if not measured:
        return Verdict(
            None, [], [], f"No run has {metric} yet." if any(r.status != "failed" for r in rows) else "All runs failed."
        )
    best = max(measured, key=lambda c: direction * c.figures[metric].value)
    others = [c for c in measured if c is not best]
    tied = [c for c in others if c.figures[metric].value == best.figures[metric].value]
    told = {id(c): within_noise(best.figures[metric], c.figures[metric]) for c in others}
    near = [c for c in others if told[id(c)] and c not in tied]
    sentence = (
        f"Best by {metric} ({'higher' if direction > 0 else 'lower'} is better): {best.name}, {shown(best.figures[metric])}."
    )
    if tied:
        sentence += f" Exactly as good: {'; '.join(c.name for c in tied)}."
    if near:
        sentence += f" Within noise of it: {'; '.join(f'{c.name} ({c.figures[metric].value:.4g})' for c in near)}."
    elif others and not tied and all(v is False for v in told.values()):
        sentence += " The others are worse by more than their 95 % intervals allow for noise."
    if any(v is None for v in told.values()):
        sentence += " Without intervals nothing says what is noise: repeat the runs with several seeds (seed=0,1,2)."
    return Verdict(best, tied, near, sentence)


def shown(e: Estimate | None) -> str:
    """Value and half its interval to two digits, as 0.912 ± 0.020; "" where there is none."""
    if e is None:
        return ""
    half = half_width(e)
    if not math.isfinite(half) or half <= 0:
        return f"{e.value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{e.value:.{digits}f} ± {half:.{digits}f}"


def gain_of(rows: Sequence[Row], metric: str) -> str:
    """What the frontier sets against KL: the win rate where there is one, else the metric."""
    return WIN_RATE if metric == KL or any(WIN_RATE in row.figures for row in rows) else metric


def frontier(found: Sequence[Candidate], gain: str, direction: int) -> list[Candidate]:
    """Candidates that no other one beats: as much gain at as little KL. In the order of their KL."""
    placed = [c for c in found if KL in c.figures and gain in c.figures]

    def beaten(c: Candidate) -> bool:
        mine = (c.figures[KL].value, -direction * c.figures[gain].value)
        theirs = [(o.figures[KL].value, -direction * o.figures[gain].value) for o in placed if o is not c]
        return any(o[0] <= mine[0] and o[1] <= mine[1] and o != mine for o in theirs)

    return sorted((c for c in placed if not beaten(c)), key=lambda c: c.figures[KL].value)


def varied(axes: Mapping[str, Axis]) -> list[str]:
    """Names of what sets candidates apart: the axes but for the seed."""
    return [name for name in axes if name != "seed"]
