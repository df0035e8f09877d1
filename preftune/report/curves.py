"""Rows of metrics.jsonl in, plots out: what was logged, its running mean with a 95 % band, and held-out values beside it.

    >>> [plot.title for plot in curves([Course("first", rows)])]
    ['Loss', 'Accuracy', 'Margin']

A panel is one line in PANELS; it is drawn where at least one of its metrics was logged. Of a long run the faint line keeps the
least and the largest value of every stretch, so that a spike of one step stays visible. Several runs are compared by their
held-out values, or by their running means where nothing was held out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.evaluate.estimate import Estimate
from preftune.report.plots import Line, Plot

Points = list[tuple[int, float]]


class Panel(NamedTuple):
    """What one picture shows."""

    title: str
    unit: str
    metrics: tuple[str, ...]  # one, or those of chosen and rejected
    level: float | None = None  # a value worth a thin line across
    note: str = ""
    exact: bool = False  # set rather than measured: every step as it is
    own: str = ""  # in place of the note where the policy writes the replies that it learns from


PANELS = (
    Panel(
        "Score", "reward", ("objective/scores",), note="of the policy's own replies, as the reward gave it; higher is better"
    ),
    Panel("Score less KL", "reward", ("objective/rlhf_reward",), note="what is maximised: what a reply earns − β · KL"),
    Panel("KL of own replies", "nats a reply", ("objective/kl",), level=0.0, note="from the reference, on fresh samples"),
    Panel("Length of own replies", "tokens", ("lengths/mean",)),
    Panel("Entropy", "nats a reply", ("objective/entropy",), note="near 0 the policy says the same each time"),
    Panel("Clipped", "fraction", ("policy/clipfrac_avg",), note="of the ratios π/π_old, beyond loss.clip"),
    Panel(
        "Critic",
        "explained variance",
        ("val/explained_variance",),
        level=0.0,
        note="1: knows what comes; 0: no better than a mean",
    ),
    Panel(
        "Loss",
        "loss",
        ("loss",),
        note="lower is better; dpo starts at ln 2 = 0.693",
        own="training: the surrogate, which need not fall; held out: KL's price less the score",
    ),
    Panel("Accuracy", "fraction", ("rewards/accuracies",), level=0.5, note="pairs whose chosen response has the higher reward"),
    Panel("Margin", "reward", ("rewards/margins",), level=0.0, note="reward of chosen minus rejected"),
    Panel(
        "Rewards",
        "reward",
        ("rewards/chosen", "rewards/rejected"),
        level=0.0,
        note="what the objective compares; with a reference, β × how far each moved from it",
    ),
    Panel("Log-probabilities", "nats", ("logps/chosen", "logps/rejected"), note="of the whole response"),
    Panel(
        "Log-ratios",
        "nats",
        ("log_ratios/chosen", "log_ratios/rejected"),
        level=0.0,
        note="log π/π_ref of the whole response; both falling is likelihood displacement",
    ),
    Panel(
        "KL from the reference",
        "nats per response",
        ("kl",),
        level=0.0,
        note="on the responses of the data",
        own="on the replies that are learnt from, update by update",
    ),
    Panel("Response lengths", "tokens", ("lengths/chosen", "lengths/rejected"), note="of the data, not of own answers"),
    Panel("Gradient norm", "L2", ("grad_norm",), note="before clipping"),
    Panel("Learning rate", "size of an update", ("learning_rate",), exact=True),
    Panel("Speed", "tokens/s", ("tokens_per_second",)),
)

_WHOLE = 800  # steps up to which every value is drawn
_STRETCHES = 400  # of a longer run, each with its least and largest value
_CENTRES = 240  # places of the running mean
_RESAMPLES = 200


class Course(NamedTuple):
    """A run, its rows of metrics.jsonl, and what its evaluation says of held-out pairs after the last step, by metric."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    final: Mapping[str, Estimate] = {}


def curves(courses: Sequence[Course]) -> list[Plot]:
    """The panels of PANELS that the runs have numbers for."""
    plots = []
    own = all(any("objective/scores" in row for row in course.rows) for course in courses)
    for panel in PANELS:
        lines = _of_one(panel, courses[0]) if len(courses) == 1 else _of_several(panel, courses)
        if lines:
            levels = () if panel.level is None else (panel.level,)
            note = panel.own or panel.note if own else panel.note
            plots.append(Plot(panel.title, "step", panel.unit, lines, note, levels=levels, together="step"))
    return plots


def series(rows: Sequence[Mapping[str, Any]], metric: str, split: str) -> Points:
    """(step, value) of the rows of one split that have a finite number for `metric`, by step."""
    points = []
    for row in rows:
        step, value = row.get("step"), row.get(metric)
        if row.get("split") == split and isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value):
            points.append((step, float(value)))
    return sorted(points)


def _of_one(panel: Panel, course: Course) -> list[Line]:
    """Chosen and rejected by colour; of a panel with one metric, training and held out by colour."""
    lines, sides = [], len(panel.metrics) > 1
    for k, metric in enumerate(panel.metrics):
        side = f"{metric.rsplit('/', 1)[-1]}, " if sides else ""
        trained = series(course.rows, metric, "train")
        mean = running([] if panel.exact else trained)
        if len(mean.x):
            lines.append(_faint(f"{side}each step", trained, k))
            lines.append(mean._replace(name=f"{side}training", colour=k))
        elif trained:
            lines.append(Line(f"{side}training", *_columns(_thinned(trained)), colour=k))
        held_out = series(course.rows, metric, "eval")
        if held_out:
            name = f"{side}held out"
            lines.append(Line(name, *_columns(held_out), draw="dots", colour=k if sides else 1, dashed=sides))
        if lines and (found := course.final.get(metric)) is not None:
            lines.append(_final(f"{side}evaluated", found, course.rows, k if sides else 1))
    return lines


def _of_several(panel: Panel, courses: Sequence[Course]) -> list[Line]:
    """Runs by colour, rejected dashed."""
    lines = []
    for colour, course in enumerate(courses):
        for k, metric in enumerate(panel.metrics):
            name = f"{course.name}, {metric.rsplit('/', 1)[-1]}" if len(panel.metrics) > 1 else course.name
            held_out, trained = (series(course.rows, metric, split) for split in ("eval", "train"))
            if len(held_out) > 1:
                lines.append(Line(name, *_columns(held_out), draw="dots", colour=colour, dashed=k > 0))
            elif trained:
                mean = running([] if panel.exact else trained)
                line = mean if len(mean.x) else Line(name, *_columns(_thinned(trained)))
                lines.append(line._replace(name=name, colour=colour, dashed=k > 0))
    return lines


def _final(name: str, found: Estimate, rows: Sequence[Mapping[str, Any]], colour: int) -> Line:
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    return Line(name, [max(steps, default=0)], [found.value], [found.low], [found.high], draw="points", colour=colour)


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _faint(name: str, points: Points, colour: int) -> Line:
    return Line(name, *_columns(_thinned(points)), draw="faint", colour=colour)


def _thinned(points: Points) -> Points:
    """Every value, or the least and the largest of each stretch where they are too many to see."""
    if len(points) <= _WHOLE:
        return points
    ends = np.linspace(0, len(points), _STRETCHES + 1).astype(int)
    stretches = [points[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    extremes = ({min(one, key=lambda p: p[1]), max(one, key=lambda p: p[1])} for one in stretches)
    return [point for two in extremes for point in sorted(two)]


def running(points: Points) -> Line:
    """The mean of a window that moves along, at its middle, and its 95 % interval; without points below 20 values.

    The window is a twelfth of the steps, ten at least. The interval is the bootstrap's: of the means of 200 resamples of the
    window's values, after their line of trend is taken out, which is no uncertainty.
    """
    n = len(points)
    window = max(10, n // 12)
    if n < 20:
        return Line("", (), ())
    steps, values = (np.array(column, np.float64) for column in _columns(points))
    starts = np.unique(np.linspace(0, n - window, min(n - window + 1, _CENTRES)).astype(int))
    windows = values[starts[:, None] + np.arange(window)]  # [centres, window]
    means = windows.mean(1)
    low, high = np.quantile(_resampled(windows - means[:, None]), [0.025, 0.975], axis=1)
    x = steps[starts + window // 2]
    return Line("", x.tolist(), means.tolist(), (means + low).tolist(), (means + high).tolist())


def _resampled(deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """[centres, resamples]: means of resampled windows, less the window's own line of trend."""
    window = deviations.shape[1]
    at = np.arange(window) - (window - 1) / 2
    slope = deviations @ at / (at @ at)
    residuals = (deviations - slope[:, None] * at) * math.sqrt(window / (window - 2))  # two parameters were fitted
    counts = np.random.default_rng(0).multinomial(window, np.full(window, 1 / window), _RESAMPLES)
    means: NDArray[np.float64] = residuals @ counts.T / window
    return means
