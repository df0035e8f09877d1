"""What an evaluation measured, as tiles, as rows of a table and as plots: calibration, lengths, margins, the frontier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from preftune.evaluate.estimate import Estimate
from preftune.evaluate.record import Answers, Evaluation, Histogram, Preferences, Samples, Wins
from preftune.report.frontier import Point, frontier
from preftune.report.loaded import Loaded
from preftune.report.plots import Draw, Line, Plot, Values
from preftune.report.text import flat, interval, number, short

_CATEGORIES = 16  # in one plot; more are not read


class Row(NamedTuple):
    """A number of the table: what it is, the same before (""  where there is none), its interval, and what it rests on."""

    name: str
    before: str
    value: str
    interval: str
    n: str


class Tile(NamedTuple):
    """A number large enough to be seen first, and the words under it."""

    value: str
    name: str
    detail: str


def _share(estimate: Estimate) -> Estimate:
    """A fraction in percent."""
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high, estimate.n)


def _percent(estimate: Estimate) -> str:
    """The interval of a percentage, to a tenth."""
    return f"{estimate.low:.1f} to {estimate.high:.1f} %" if interval(estimate) else ""


def tiles(found: Evaluation) -> list[Tile]:
    """Up to four: what was won, how well it ranks, how far it went, how long its answers are."""
    made = []
    for wins in found.wins[:1]:
        controlled = wins.length_controlled
        more = f"; length-controlled {controlled.value:.1f} %" if controlled else ""
        made.append(Tile(f"{wins.win_rate.value:.1f} %", "win rate", f"{_percent(wins.win_rate)}{more}"))
    if found.held_out:
        accuracy = _share(found.held_out.accuracy)
        longer = 100 * found.held_out.length_only.value
        detail = f"{_percent(accuracy)}; the longer one: {longer:.1f} %"
        made.append(Tile(f"{accuracy.value:.1f} %", "held-out preference accuracy", detail))
    if found.samples and found.samples.kl_per_response:
        kl = found.samples.kl_per_response
        made.append(Tile(number(round(kl.value, 2)), "nats a response from the reference", interval(kl)))
    if found.samples:
        mine, other = found.samples.policy.tokens, found.samples.reference
        detail = f"{other.tokens.value:.0f} before" if other else interval(mine)
        made.append(Tile(f"{mine.value:.0f}", "tokens an answer", detail))
    return made[:4]


def rows(found: Evaluation) -> list[Row]:
    """All figures of an evaluation."""
    made = [_row(figure.name, figure.value, figure.before) for figure in found.figures]
    for wins in found.wins:
        made += _wins(wins)
    if found.held_out:
        made += _preferences(found.held_out, "held out")
    if found.train:
        made.append(_row("Accuracy on pairs it was trained on, %", _share(found.train.accuracy)))
    if found.samples:
        made += _samples(found.samples)
    for text in found.perplexity:
        before = None if text.reference is None else number(text.reference)
        made.append(Row(f"Perplexity on {text.name}", before or "", number(text.policy), "", f"{text.n_tokens:,} tokens"))
        if text.change:
            made.append(_row(f"Log-prob lost on {text.name}, nats per token", text.change))
    return made + [Row(f"Benchmark {name}", "", value, "", "") for name, value in flat(found.benchmarks)]


def _row(name: str, value: Estimate, before: Estimate | None = None) -> Row:
    return Row(name, number(before.value) if before else "", number(value.value), interval(value), f"{value.n:,}")


def _wins(wins: Wins) -> Iterator[Row]:
    who = f"against {short(wins.against)}, by {wins.judge}"
    tally = f"{wins.n_wins:,} won, {wins.n_wins_base:,} lost, {wins.n_draws:,} drawn"
    yield _row(f"Win rate {who}, %", wins.win_rate)._replace(n=tally)
    if wins.length_controlled:
        yield _row(f"Length-controlled win rate {who}, %", wins.length_controlled)
    if wins.order_consistency:
        yield _row(f"Judged alike in both orders ({wins.judge}), %", _share(wins.order_consistency))
    if wins.first_wins:
        yield _row(f"Verdicts for the answer shown first ({wins.judge}), %", _share(wins.first_wins))


def _preferences(found: Preferences, which: str) -> Iterator[Row]:
    yield _row(f"Preference accuracy, {which}, %", _share(found.accuracy))
    yield _row("  if the longer one always won, %", _share(found.length_only))
    if found.length_matched:
        yield _row("  on pairs of nearly equal length, %", _share(found.length_matched))
    if found.loss is not None:
        yield Row(f"Loss, {which}", "", number(found.loss), "", f"{found.n_pairs:,}")
    yield _row("Margin, reward of chosen minus rejected", found.margin)
    for side, ratio in (("chosen", found.chosen_log_ratio), ("rejected", found.rejected_log_ratio)):
        if ratio:
            yield _row(f"Log-ratio to the reference of {side} responses, nats", ratio)
    if found.calibration_error is not None:
        yield Row("Calibration error of σ(|margin|)", "", number(found.calibration_error), "", f"{found.n_pairs:,}")


def _samples(found: Samples) -> Iterator[Row]:
    if found.kl_per_response:
        yield _row("KL from the reference, nats per response", found.kl_per_response)
    if found.kl_per_token:
        yield _row("KL from the reference, nats per token", found.kl_per_token)
    if found.implicit_reward:
        yield _row("Implicit reward of own answers", found.implicit_reward)
    mine, other = found.policy, found.reference

    def of(name: str, part: str, share: bool = False) -> Row:
        value, before = getattr(mine, part), getattr(other, part) if other else None
        return _row(name, _share(value), before and _share(before)) if share else _row(name, value, before)

    yield of("Tokens an answer", "tokens")
    yield of("Answers that end by themselves, %", "ended", share=True)
    yield of("4-grams said before in the answer, %", "repetition", share=True)
    for name, part in (
        ("Distinct words", "distinct_1"),
        ("Distinct pairs of words", "distinct_2"),
        ("Distinct answers", "unique"),
    ):
        yield _ratio(name, part, mine, other)


def _ratio(name: str, part: str, mine: Answers, other: Answers | None) -> Row:
    before, value = ("" if a is None else number(100 * getattr(a, part)) for a in (other, mine))
    return Row(f"{name}, % of all", before, value, "", "")


def final(found: Evaluation | None) -> Mapping[str, Estimate]:
    """What the evaluation says of the metrics that training logs on held-out pairs."""
    if found is None or found.held_out is None:
        return {}
    held_out = found.held_out
    return {
        "rewards/accuracies": held_out.accuracy,
        "rewards/margins": held_out.margin,
    }


def frontiers(runs: Sequence[Loaded]) -> list[Plot]:
    """One plot for each judge and opponent: where every run stands between what it won and how far it went."""
    points: dict[tuple[str, str, bool], list[Point]] = {}
    for one in runs:
        found = one.evaluation
        if found is None or found.samples is None or found.samples.kl_per_response is None:
            continue
        for wins in found.wins:
            key = (wins.against, wins.judge, wins.against == found.against)
            points.setdefault(key, []).append(Point(one.name, found.samples.kl_per_response, wins.win_rate))
    return [
        frontier(of, gain="win rate, %", title=f"Against {short(against)}, judged by {judge}", best_of_wins=is_reference)
        for (against, judge, is_reference), of in points.items()
        if len(of) > 1 or is_reference  # one point alone says no more than the figures
    ]


def calibration(runs: Sequence[Loaded]) -> list[Plot]:
    """How often people prefer what the policy prefers, where it is so sure of it; and its margins."""
    lines = [
        _estimates(one.name, [b.predicted for b in held.calibration], [b.observed for b in held.calibration], colour, "dots")
        for colour, one in enumerate(runs)
        if (held := _held_out(one)) and held.calibration
    ]
    note = "on the line, a policy that is 70 % sure is right in 70 % of pairs; below it, it is surer than it should be"
    reliability = Plot(
        "Calibration of the implicit reward", "how sure it is, σ(|margin|)", "how often right", lines, note, diagonal=True
    )
    margins = [
        _histogram(one.name, held.margins, colour, "bars" if len(runs) == 1 else "line")
        for colour, one in enumerate(runs)
        if (held := _held_out(one)) and held.margins
    ]
    note = "right of the line the policy ranks the pair as people did"
    spread = Plot("Margins of held-out pairs", "margin, reward", "pairs", margins, note, uprights=(0.0,))
    return [plot for plot in (reliability, spread) if plot.lines]


def lengths(runs: Sequence[Loaded]) -> list[Plot]:
    """Whether longer answers are what wins."""
    lines = []
    for colour, one in enumerate(runs):
        for wins in one.evaluation.wins if one.evaluation else ():
            parts = [(math.sqrt(low * high), found) for low, high, found in wins.by_length if 0 < low < high < math.inf]
            if parts:
                name = f"{one.name}, {wins.judge}" if len(runs) > 1 else f"against {short(wins.against)}, by {wins.judge}"
                lines.append(_estimates(name, [x for x, _ in parts], [e for _, e in parts], colour, "dots"))
    note = "a line that climbs says that longer answers win, whatever is in them; flat is good"
    plot = Plot(
        "By the ratio of lengths", "length of the answer over the other's", "fraction won", lines, note, levels=(0.5,),
        uprights=(1.0,), log2=True,
    )  # fmt: skip
    return [plot] * bool(lines)


def breakdowns(runs: Sequence[Loaded]) -> list[Plot]:
    """Held-out accuracy by category, source and length, the largest groups first."""
    plots = []
    keys = dict.fromkeys(key for one in runs if (held := _held_out(one)) for key in held.by)
    for key in keys:
        tables = [(one.name, held.by.get(key, {})) for one in runs if (held := _held_out(one))]
        n_of: dict[str, int] = {}
        for _, table in tables:
            for name, found in table.items():
                n_of[name] = max(n_of.get(name, 0), found.n)
        largest = set(sorted(n_of, key=lambda name: -n_of[name])[:_CATEGORIES])
        names = [name for name in n_of if name in largest]
        lines = []
        for colour, (run, table) in enumerate(tables):
            at = [k for k, name in enumerate(names) if name in table]
            lines.append(_estimates(run, at, [table[names[k]] for k in at], colour, "points"))
        left = len(n_of) - len(names)
        note = f"95 % intervals{f'; {left} smaller groups are not drawn' if left else ''}"
        plots.append(Plot(f"Accuracy by {key}", key, "fraction", lines, note, levels=(0.5,), names=names, wide=len(names) > 5))
    return [plot for plot in plots if any(len(line.x) for line in plot.lines)]


def _held_out(one: Loaded) -> Preferences | None:
    return one.evaluation.held_out if one.evaluation else None


def _estimates(name: str, x: Sequence[float | int], found: Sequence[Estimate], colour: int, draw: Draw) -> Line:
    def bound(end: str) -> Values:
        return [value if math.isfinite(value := getattr(one, end)) else None for one in found]

    line = Line(name, x, [one.value for one in found], bound("low"), bound("high"), colour=colour)
    return line._replace(draw=draw)


def _histogram(name: str, found: Histogram, colour: int, draw: Draw) -> Line:
    middles = [(a + b) / 2 for a, b in zip(found.edges, found.edges[1:], strict=False)]
    return Line(name, middles, found.counts, colour=colour)._replace(draw=draw)
