"""The figures that AlpacaEval's leaderboard gives of a file of preferences, and what they are worth.

>>> found = figures(read_annotations(file), tables=read_tables(folder))
>>> found.as_dict()["win_rate"], found.as_dict()["length_controlled_winrate"]
(9.227125, 18.1975…)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from preftune.errors import DataError, listing
from preftune.evaluate.annotations import Annotations
from preftune.evaluate.estimate import Estimate, bootstrap
from preftune.evaluate.length_control import LengthControlled, length_controlled
from preftune.evaluate.length_tables import Tables
from preftune.evaluate.winrate import WinRate, win_rate

_ONE_SIDED = 0.9  # share of rows from which lengths at which both are equal lie at the edge of what was seen


@dataclass(frozen=True)
class Figures:
    """Win rate and length-controlled win rate of a model over a baseline, in percent.

    rate:            as `evaluate.winrate` counts it.
    interval:        the win rate with its bootstrap interval over rows.
    average_length:  of the model's answers, in whole characters; None where the file has none.
    controlled:      at equal lengths; None where it was not asked for.
    method:          how lengths were controlled: "alpaca_eval" (with its tables), "own rows" (without), or "".
    notes:           what a user should know.
    """

    rate: WinRate
    interval: Estimate
    average_length: int | None
    controlled: LengthControlled | None
    method: str
    model: str
    baseline: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: first the names that AlpacaEval's leaderboard has, then ours; None in the place of NaN."""
        rate, controlled = self.rate, self.controlled
        found: dict[str, Any] = {
            "n_total": rate.n_total,
            "n_wins": rate.n_wins,
            "n_wins_base": rate.n_wins_base,
            "n_draws": rate.n_draws,
            "win_rate": rate.win_rate,
            "standard_error": rate.standard_error,
            "discrete_win_rate": rate.discrete_win_rate,
            "avg_length": self.average_length,
            "length_controlled_winrate": controlled and controlled.win_rate,
            "lc_standard_error": controlled and controlled.standard_error,
            "win_rate_low": self.interval.low,
            "win_rate_high": self.interval.high,
            "lc_low": controlled and controlled.low,
            "lc_high": controlled and controlled.high,
            "lc_weights": controlled and {"length": controlled.length, "difficulty": controlled.difficulty,
                                          "model": controlled.model, "C": _known(controlled.strength)},
            "length_control": self.method or None,
            "n_dropped": rate.n_dropped,
            "model": self.model or None,
            "baseline": self.baseline or None,
            "notes": list(self.notes),
        }  # fmt: skip
        return {name: _known(value) for name, value in found.items()}

    def as_text(self) -> str:
        """For a terminal."""
        rate, one, interval = self.rate, self.controlled, self.interval
        names = f"{self.model or 'the model'} against {self.baseline or 'the baseline'}"
        lines = [
            f"{names}: {rate.n_total} preferences: {rate.n_wins} won, {rate.n_wins_base} lost, {rate.n_draws} drawn",
            f"  win rate                    {_percent(rate.win_rate, rate.standard_error, *interval[1:3])}",
        ]
        if one is not None:
            lines.append(f"  length-controlled win rate  {_percent(one.win_rate, one.standard_error, one.low, one.high)}")
        if self.average_length is not None:
            lines.append(f"  mean length of the answers  {self.average_length} characters")
        if rate.n_dropped:
            lines.append(f"  rows without a verdict, left out: {rate.n_dropped}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def figures(found: Annotations, *, tables: Tables | None = None, own: bool = False, seed: int = 0) -> Figures:
    """All figures of the file; those at equal lengths with `tables`, or with `own` from the rows alone.

    seed: of the bootstrap.

    Raises DataError where no row has a verdict, and where lengths are to be controlled and a row has no answers, or too little
    is there to fit; ConfigError where the tables do not belong to these rows.
    """
    kept = sorted([100 * p] for p in found.preferences if p is not None)  # the order of rows must not move the interval
    if not kept:
        n = len(found.preferences)
        raise DataError(f"{found.source}: none of its {n} rows has a verdict (AlpacaEval's preferences go from 1 to 2)")
    controlled, notes = None, list(found.notes)
    if tables is not None or own:
        controlled, more = _controlled(found, tables, seed)
        notes += more
    return Figures(
        rate=win_rate(found.preferences),
        interval=bootstrap(kept, seed=seed),
        average_length=found.average_length,
        controlled=controlled,
        method="" if controlled is None else "own rows" if tables is None else "alpaca_eval",
        model=found.model,
        baseline=found.baseline,
        notes=tuple(notes),
    )


def _controlled(found: Annotations, tables: Tables | None, seed: int) -> tuple[LengthControlled, list[str]]:
    """The figure, and what a user should know of it."""
    if found.model and found.model == found.baseline:
        same = LengthControlled(50.0, 50.0, 50.0, 0.0, 0.0, 0.0, 0.0, math.nan, sum(p is not None for p in found.preferences))
        return same, ["the model is the baseline: 50 by definition"]
    both = list(zip(found.lengths, found.lengths_base, strict=True))
    if bare := [f"{p}: no answers" for p, (a, b) in zip(found.places, both, strict=True) if a is None or b is None]:
        beside = " (of judgments: name what was judged, --data FILE)" if found.source.name.endswith(".jsonl") else ""
        raise DataError(f"length control needs both answers of every row; {len(bare)} rows lack one{beside}:\n{listing(bare)}")
    lengths, lengths_base = [a or 0 for a, _ in both], [b or 0 for _, b in both]
    if tables is not None:
        difficulty, note = tables.of(found)
        one = length_controlled(found.preferences, lengths, lengths_base, difficulty=difficulty, gamed=tables.gamed, seed=seed)
        return one, [note]
    one = length_controlled(found.preferences, lengths, lengths_base, seed=seed)
    notes = ["lengths are controlled by these rows alone: no difficulties, no gamed baseline (not AlpacaEval's figure)"]
    shorter = sum(a < b for a, b in zip(lengths, lengths_base, strict=True)) / len(lengths)
    if max(shorter, 1 - shorter) > _ONE_SIDED:
        side = "shorter" if shorter > 0.5 else "not shorter"
        share = f"{max(shorter, 1 - shorter):.0%}"
        notes.append(f"in {share} of the rows the model's answer is {side}: equal lengths lie at the edge of what was seen")
    return one, notes


def _percent(value: float, error: float | None, low: float, high: float) -> str:
    spread = "" if error is None or math.isnan(error) else f" ± {error:.2f}"
    interval = f"  [{low:.2f}, {high:.2f}]" if math.isfinite(low) else ""
    return f"{value:.2f} %{spread}{interval}"


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
