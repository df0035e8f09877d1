"""The reward-KL frontier: what a policy won, against how far it went from the reference to win it.

    >>> frontier([Point("beta 0.1", kl=kl, gain=win_rate, group="dpo")], gain="win rate, %", best_of_wins=True)

Beside the runs stands what sampling n answers of the reference and keeping the best would win, whose KL is known without
measuring: log n − (n − 1)/n nats (Stiennon et al. 2020, appendix G.3), an upper bound where answers can repeat (Beirami et al.
2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from preftune.evaluate.best_of import kl_at_most
from preftune.evaluate.estimate import Estimate
from preftune.report.plots import Line, Plot, Values

BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Point(NamedTuple):
    """A run: KL(policy‖reference) in nats per response, and what it gained; runs of one group are joined by a line."""

    name: str
    kl: Estimate
    gain: Estimate
    group: str = ""


def frontier(points: Sequence[Point], *, gain: str, best_of_wins: bool = False, title: str = "Reward against KL") -> Plot:
    """The plot; a run without both numbers has no place in it.

    best_of_wins: gains are win rates over the reference in percent, so that best-of-n can be drawn beside them.
    """
    groups: dict[str, list[Point]] = {}
    points = [point for point in points if math.isfinite(point.kl.value) and math.isfinite(point.gain.value)]
    for point in sorted(points, key=lambda point: point.kl.value):
        groups.setdefault(point.group, []).append(point)
    lines = [_line(name, members, colour) for colour, (name, members) in enumerate(groups.items())]
    if best_of_wins and points:
        lines.append(_best_of(max(point.kl.value for point in points)))
    return Plot(
        title,
        "KL(policy‖reference), nats per response",
        gain,
        lines,
        note="up is better, left is cheaper; whiskers are 95 % intervals"
        + ("; best of n: what keeping the best of n answers of the reference wins, if the judge ranks them" * best_of_wins),
        levels=(50.0,) if best_of_wins else (),
        wide=True,
    )


def _best_of(farthest: float) -> Line:
    """Best of n beats one more answer in n of n + 1 cases, whatever the reward is, as long as no two answers tie."""
    beyond = [n for n in BEST_OF if kl_at_most(n) > farthest]
    shown = [n for n in BEST_OF if kl_at_most(n) <= farthest] + beyond[:1]
    return Line(
        "best of n of the reference",
        [kl_at_most(n) for n in shown],
        [100 * n / (n + 1) for n in shown],
        draw="dots",
        colour=7,
        dashed=True,
        labels=[f"n = {n}" if n > 1 else "" for n in shown],
    )


def _line(name: str, members: Sequence[Point], colour: int) -> Line:
    def bounds(part: str, end: str) -> Values:
        found = [float(getattr(getattr(point, part), end)) for point in members]
        return [value if math.isfinite(value) else None for value in found]

    return Line(
        name or "runs",
        [point.kl.value for point in members],
        [point.gain.value for point in members],
        low=bounds("gain", "low"),
        high=bounds("gain", "high"),
        x_low=bounds("kl", "low"),
        x_high=bounds("kl", "high"),
        draw="dots" if name and len(members) > 1 else "points",
        colour=colour,
        labels=[point.name for point in members],
    )
