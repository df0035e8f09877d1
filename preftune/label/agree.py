"""How far annotators agree, beyond what chance would give: judgments in, figures out.

    >>> found = agreement(judgments)
    >>> found.alpha.value, found.alpha.n
    (0.8537268847795163, 490)

A unit is one comparison: an example and two of its responses. An annotator has one verdict on a unit, that which all of the
annotator's lines come to (`data.judgments.settled`). "unscored" is no verdict: that is missing data. A figure that does not
exist (one annotator, no overlap, one category) is None and says why.

- Cohen's κ: two annotators over the units that both judged (Cohen 1960, Educ. Psychol. Meas. 20).
- Fleiss' κ: the units that every annotator judged (Fleiss 1971, Psychol. Bull. 76).
- Krippendorff's α: every unit with two verdicts or more, so missing ones are no obstacle (Krippendorff 2011, "Computing
  Krippendorff's alpha-reliability", steps A to D). Nominal: verdicts are the same or not. Ordinal and interval: i < tie < j at
  1, 1.5 and 2, a slight preference half-way between a win and a tie; "both_bad" counts as a tie there.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.data.judgments import mirrored, settled
from preftune.data.types import Judgment, Verdict

CATEGORIES: tuple[Verdict, ...] = ("i", "tie", "j", "both_bad")
"""Verdicts on a unit, its responses in rising order."""

Unit = tuple[str, int, int]
"""Example id and two response indices, the smaller first."""

Ratings = Mapping[Unit, Mapping[str, int]]
"""Unit -> annotator -> index into CATEGORIES, or place on the scale from a clear i (0) over a tie (2) to a clear j (4)."""

N_BOOTSTRAP = 1000


class Figure(NamedTuple):
    """One number, the units that it rests on, and its 95 % interval where there is one; or why there is no number."""

    value: float | None
    n: int
    why: str = ""
    low: float | None = None
    high: float | None = None


class Between(NamedTuple):
    """Two annotators over the units that both judged."""

    annotators: tuple[str, str]
    percent: Figure
    kappa: Figure


class Annotator(NamedTuple):
    """What one annotator did.

    n_judgments:   rows of the file, unscored ones included.
    n_units:       comparisons with a verdict.
    verdicts:      verdict -> units.
    first_wins:    share of decided judgments in which the response shown first won; n counts judgments.
    consistent:    share of units judged more than once whose verdicts were all the same.
    with_others:   share of units on which the verdict is that of most other annotators; half where the others are split evenly.
    """

    name: str
    n_judgments: int
    n_unscored: int
    n_units: int
    verdicts: dict[str, int]
    first_wins: Figure
    consistent: Figure
    with_others: Figure


@dataclass(frozen=True)
class Agreement:
    """Agreement of all annotators. Counts add up: n_judgments rows give verdicts on n_units comparisons."""

    n_judgments: int
    n_unscored: int
    n_units: int
    n_shared: int
    annotators: list[Annotator]
    pairs: list[Between]
    percent: Figure
    fleiss: Figure
    alpha: Figure
    alpha_ordinal: Figure
    alpha_interval: Figure

    def as_text(self) -> str:
        """For a terminal."""
        lines = [
            f"{self.n_judgments} judgments ({self.n_unscored} unscored) on {self.n_units} comparisons, "
            f"{self.n_shared} of them by two annotators or more"
        ]
        lines += [
            f"{name:<24} {_shown(figure)}"
            for name, figure in (
                ("same verdict", self.percent),
                ("Fleiss' kappa", self.fleiss),
                ("Krippendorff's alpha", self.alpha),
                ("  ordinal", self.alpha_ordinal),
                ("  interval", self.alpha_interval),
            )
        ]
        for pair in self.pairs:
            lines.append(f"{' and '.join(pair.annotators)}: same {_shown(pair.percent)}; kappa {_shown(pair.kappa)}")
        for one in self.annotators:
            said = ", ".join(f"{verdict} {n}" for verdict, n in one.verdicts.items() if n)
            lines.append(f"{one.name}: {one.n_units} comparisons ({said or 'no verdict'}), {one.n_unscored} unscored")
            lines.append(f"  as most others {_shown(one.with_others)}")
            lines.append(f"  first shown wins {_shown(one.first_wins)}; the same when judged again {_shown(one.consistent)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a Figure is an object with value, n, why, low, high."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _shown(figure: Figure) -> str:
    if figure.value is None:
        return f"none: {figure.why}"
    interval = f" [{figure.low:.3f}, {figure.high:.3f}]" if figure.low is not None else ""
    return f"{figure.value:.3f}{interval} (n = {figure.n})"


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(v) for name, v in value._asdict().items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def agreement(judgments: Iterable[Judgment]) -> Agreement:
    """The figures of these judgments, whatever their order."""
    rows = list(judgments)
    ratings, graded = ratings_of(rows, _category), ratings_of(rows, _place)
    names = sorted({row.annotator for row in rows})
    shared, scaled = ([list(by.values()) for by in found.values() if len(by) > 1] for found in (ratings, graded))
    return Agreement(
        n_judgments=len(rows),
        n_unscored=sum(row.verdict == "unscored" for row in rows),
        n_units=len(ratings),
        n_shared=len(shared),
        annotators=[_annotator(name, rows, ratings) for name in names],
        pairs=[_between(a, b, ratings) for a, b in itertools.combinations(names, 2)],
        percent=_percent(shared, len(names)),
        fleiss=_fleiss(ratings, names),
        alpha=krippendorff(shared, len(names), "nominal"),
        alpha_ordinal=krippendorff(scaled, len(names), "ordinal"),
        alpha_interval=krippendorff(scaled, len(names), "interval"),
    )


def _category(one: Judgment) -> int:
    return CATEGORIES.index(one.verdict)


def _place(one: Judgment) -> int:
    if one.verdict not in ("i", "j"):
        return 2
    away = 1 if one.strength == "slight" else 2
    return 2 - away if one.verdict == "i" else 2 + away


def ratings_of(judgments: Iterable[Judgment], value: Callable[[Judgment], int]) -> dict[Unit, dict[str, int]]:
    """The value of each annotator's verdict on each unit."""
    ratings: dict[Unit, dict[str, int]] = defaultdict(dict)
    for one in settled(judgments):
        if one.verdict != "unscored":
            ratings[one.example, one.i, one.j][one.annotator] = value(one)
    return ratings


def _annotator(name: str, rows: Sequence[Judgment], ratings: Ratings) -> Annotator:
    own = [row for row in rows if row.annotator == name]
    verdicts = Counter(CATEGORIES[by[name]] for by in ratings.values() if name in by)
    first = [row.shown_order[0] == (row.i if row.verdict == "i" else row.j) for row in own if row.verdict in ("i", "j")]
    again: dict[Unit, list[str]] = defaultdict(list)
    for row in own:
        if row.verdict != "unscored":
            one = row if row.i < row.j else mirrored(row)
            again[one.example, one.i, one.j].append(one.verdict)
    same = [len(set(said)) == 1 for said in again.values() if len(said) > 1]
    others = [_with_most(by[name], [v for a, v in by.items() if a != name]) for by in ratings.values() if name in by]
    judged = [share for share in others if share is not None]
    return Annotator(
        name,
        len(own),
        sum(row.verdict == "unscored" for row in own),
        sum(verdicts.values()),
        {verdict: verdicts[verdict] for verdict in CATEGORIES},
        _share(first, "no judgment has a winner"),
        _share(same, "no comparison was judged twice by this annotator"),
        _share(judged, "nobody else judged the same comparisons"),
    )


def _with_most(mine: int, others: list[int]) -> float | None:
    """1 where `mine` is the verdict of most others, shared where several verdicts lead; None without others."""
    if not others:
        return None
    count = Counter(others)
    leading = [verdict for verdict, n in count.items() if n == max(count.values())]
    return (mine in leading) / len(leading)


def _share(values: Sequence[float] | Sequence[bool], why: str) -> Figure:
    return Figure(float(np.mean(values)), len(values)) if values else Figure(None, 0, why)


def _between(a: str, b: str, ratings: Ratings) -> Between:
    both = [(by[a], by[b]) for by in ratings.values() if a in by and b in by]
    if not both:
        none = Figure(None, 0, "these two judged no comparison in common")
        return Between((a, b), none, none)
    return Between((a, b), Figure(sum(x == y for x, y in both) / len(both), len(both)), cohen(both))


def cohen(both: Sequence[tuple[int, int]]) -> Figure:
    """Cohen's κ of two annotators' verdicts on the same units (one or more)."""
    n = len(both)
    observed = sum(x == y for x, y in both) / n
    first, second = Counter(x for x, _ in both), Counter(y for _, y in both)
    expected = sum(first[c] * second[c] for c in first) / n**2
    if expected == 1:
        return Figure(None, n, _ONE_CATEGORY)
    return Figure((observed - expected) / (1 - expected), n)


_ONE_CATEGORY = "every verdict is the same, so agreement is what chance alone would give"


def _overlap(n_shared: int, n_annotators: int) -> str:
    """Why nothing can be compared; "" where something can."""
    if n_annotators < 2:
        return f"{n_annotators} annotator: agreement needs two or more"
    return "" if n_shared else "no comparison was judged by two annotators"


def _percent(shared: Sequence[Sequence[int]], n_annotators: int) -> Figure:
    """Mean over units of the share of pairs of verdicts that are the same."""
    if why := _overlap(len(shared), n_annotators):
        return Figure(None, 0, why)
    return Figure(float(np.mean([np.mean([x == y for x, y in itertools.combinations(u, 2)]) for u in shared])), len(shared))


def _fleiss(ratings: Ratings, names: Sequence[str]) -> Figure:
    whole = [list(by.values()) for by in ratings.values() if len(by) == len(names)]
    if why := _overlap(len(whole), len(names)):
        return Figure(None, 0, why if len(names) < 2 else "no comparison was judged by every annotator")
    counts = _counts(whole)
    n_raters = len(names)
    observed = float(((counts**2).sum(1) - n_raters).mean()) / (n_raters * (n_raters - 1))
    expected = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    if expected == 1:
        return Figure(None, len(whole), _ONE_CATEGORY)
    return Figure((observed - expected) / (1 - expected), len(whole))


def _counts(units: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """[U, C] verdicts of each unit by category or place."""
    counts = np.zeros((len(units), 1 + max(max(unit) for unit in units)))
    for at, unit in enumerate(units):
        for verdict in unit:
            counts[at, verdict] += 1
    return counts


def krippendorff(units: Sequence[Sequence[int]], n_annotators: int, level: Literal["nominal", "ordinal", "interval"]) -> Figure:
    """Krippendorff's α of units with two verdicts or more, with a percentile interval from resampling units (seeded)."""
    if why := _overlap(len(units), n_annotators):
        return Figure(None, 0, why)
    counts = _counts(units)
    value = float(_alphas(_coincidences(counts).sum(0)[None], level)[0])
    if np.isnan(value):
        return Figure(None, len(units), _ONE_CATEGORY)
    patterns, n_each = np.unique(counts, axis=0, return_counts=True)  # units that look alike weigh together
    draws = np.random.default_rng(0).multinomial(len(units), n_each / len(units), size=N_BOOTSTRAP)
    drawn = _alphas(np.tensordot(draws.astype(np.float64), _coincidences(patterns), axes=1), level)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])  # a draw of one category alone has no α
    return Figure(value, len(units), low=float(low), high=float(high))


def _coincidences(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """[U, C, C] ordered pairs of verdicts within each unit, each weighed by 1 / (verdicts - 1); from counts [U, C]."""
    pairs = counts[:, :, None] * counts[:, None, :] - np.eye(counts.shape[1]) * counts[:, :, None]
    weighed: NDArray[np.float64] = pairs / (counts.sum(1) - 1)[:, None, None]
    return weighed


def _alphas(coincidences: NDArray[np.float64], level: str) -> NDArray[np.float64]:
    """[B] α of [B, C, C] coincidence matrices; NaN where there is one category only."""
    margins = coincidences.sum(-1)
    at = np.arange(margins.shape[-1], dtype=np.float64)
    if level == "nominal":
        distance = (at[:, None] != at[None, :]).astype(np.float64)
    elif level == "interval":
        distance = (at[:, None] - at[None, :]) ** 2  # in steps of the scale: their size cancels
    else:  # ordinal: verdicts that lie between two, and half of those at the two
        upto = np.cumsum(margins, -1) - margins / 2
        distance = (upto[..., :, None] - upto[..., None, :]) ** 2
    expected = (margins[..., :, None] * margins[..., None, :] * distance).sum((-1, -2))
    observed = (coincidences * distance).sum((-1, -2)) * (margins.sum(-1) - 1)
    found: NDArray[np.float64] = 1 - np.divide(observed, expected, out=np.full(expected.shape, np.nan), where=expected > 0)
    return found
