"""An evaluation on a terminal: tables with their intervals, and the verdict below."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from preftune.errors import printable
from preftune.evaluate.estimate import Estimate
from preftune.evaluate.record import Answers, Evaluation, Preferences, Wins

Row = tuple[str, str, str]
"""What was measured, of the policy (held-out), of what it is compared with (trained)."""


def show(found: Evaluation, console: Console) -> None:
    """Prints the evaluation. Nothing of it drives a terminal."""
    against = found.against or "no reference"
    console.print(f"[bold]{_safe(found.policy)}[/] against {_safe(against)}, 95 % intervals")
    if found.held_out is not None:
        _table(console, "Pairs", ("held out", "trained on"), _pairs(found.held_out, found.train))
        for what, parts in found.held_out.by.items():
            _table(
                console, f"Accuracy by {what}", ("held out", "pairs"), ((n, _percent(e), f"{e.n}") for n, e in parts.items())
            )
    if (samples := found.samples) is not None:
        title = f"{samples.n_per_prompt} answers to each of {samples.n_prompts} prompts, at most {samples.max_tokens} tokens"
        _table(console, title, ("policy", "reference"), _answers(found, samples.policy, samples.reference))
    for wins in found.wins:
        _table(console, f"Answers against those of {wins.against}, by {wins.judge}", ("", ""), _wins(wins))
    for one in found.perplexity:
        rows = [
            ("perplexity", f"{one.policy:.3f}", "" if one.reference is None else f"{one.reference:.3f}"),
            ("bits per byte", _number(one.bits_per_byte), _number(one.reference_bits_per_byte)),
            ("worse by, nats a token", _estimate(one.change), ""),
        ]
        title = f"{one.name}: {one.n_tokens:,} tokens, {one.n_documents:,} documents"
        _table(console, title, ("policy", "reference"), rows)
    for task, sides in found.benchmarks.items():
        ours, theirs = sides.get("policy", {}), sides.get("reference", {})
        _table(console, task, ("policy", "reference"), ((m, _number(v), _number(theirs.get(m))) for m, v in ours.items()))
    for note in found.notes:
        console.print(f"[dim]note: {_safe(note)}[/]")
    colour = {True: "green", False: "red", None: "yellow"}[found.worked]
    console.print(f"[bold {colour}]{_safe(found.verdict)}[/]")


def _table(console: Console, title: str, columns: tuple[str, str], rows: object) -> None:
    table = Table(title=_safe(title), title_justify="left")
    for k, name in enumerate(("", *columns)):
        table.add_column(name, justify="right" if k else "left")
    for row in rows:  # type: ignore[attr-defined]
        if row[1] or row[2]:
            table.add_row(*map(_safe, row))
    if table.row_count:
        console.print(table)


def _pairs(held_out: Preferences, train: Preferences | None) -> Iterator[Row]:
    def both(name: str, cell: str, other: str) -> Row:
        return name, cell, other if train is not None else ""

    t = train or held_out
    yield both("pairs", f"{held_out.n_pairs:,}", f"{t.n_pairs:,}")
    yield both("loss", _number(held_out.loss), _number(t.loss))
    yield both("accuracy, %", _percent(held_out.accuracy), _percent(t.accuracy))
    yield both("  at equal lengths", _percent(held_out.length_matched), _percent(t.length_matched))
    yield both("  of the longer one", _percent(held_out.length_only), _percent(t.length_only))
    yield both("margin of rewards", _estimate(held_out.margin), _estimate(t.margin))
    yield both("log-ratio of chosen, nats", _estimate(held_out.chosen_log_ratio), _estimate(t.chosen_log_ratio))
    yield both("log-ratio of rejected, nats", _estimate(held_out.rejected_log_ratio), _estimate(t.rejected_log_ratio))
    yield both("calibration error", _number(held_out.calibration_error), _number(t.calibration_error))


def _answers(found: Evaluation, ours: Answers, theirs: Answers | None) -> Iterator[Row]:
    def both(name: str, value: object, other: object) -> Row:
        return name, _cell(value), "" if theirs is None else _cell(other)

    samples, t = found.samples, theirs or ours
    assert samples is not None
    yield "KL, nats a response", _estimate(samples.kl_per_response), ""
    yield "KL, nats a token", _estimate(samples.kl_per_token), ""
    yield "implicit reward", _estimate(samples.implicit_reward), ""
    yield both("tokens", ours.tokens, t.tokens)
    yield both("end by themselves", ours.ended, t.ended)
    yield both("repeated 4-grams", ours.repetition, t.repetition)
    yield both("distinct words", ours.distinct_1, t.distinct_1)
    yield both("distinct pairs of words", ours.distinct_2, t.distinct_2)
    yield both("different answers", ours.unique, t.unique)


def _wins(wins: Wins) -> Iterator[Row]:
    error = "" if wins.standard_error is None else f"± {wins.standard_error:.2f}"
    yield "win rate, %", _estimate(wins.win_rate), error
    yield "  at equal lengths, %", _estimate(wins.length_controlled), ""
    yield "won, lost, drawn", f"{wins.n_wins}, {wins.n_wins_base}, {wins.n_draws}", f"of {wins.n_total}"
    yield "without a verdict", f"{wins.n_unscored}" if wins.n_unscored else "", ""
    yield "tokens, theirs", _number(wins.tokens), _number(wins.tokens_base)
    yield "same verdict in both orders, %", _percent(wins.order_consistency), ""
    yield "first one shown wins, %", _percent(wins.first_wins), ""


def _cell(value: object) -> str:
    return _estimate(value) if isinstance(value, Estimate) else _number(value) if isinstance(value, float) else ""


def _estimate(found: Estimate | None) -> str:
    if found is None or math.isnan(found.value):
        return ""
    places = 1 if abs(found.value) >= 20 else 2 if abs(found.value) >= 1 else 3
    interval = f" [{found.low:.{places}f}, {found.high:.{places}f}]" if math.isfinite(found.low) else ""
    return f"{found.value:.{places}f}{interval}"


def _percent(found: Estimate | None) -> str:
    return "" if found is None else _estimate(Estimate(100 * found.value, 100 * found.low, 100 * found.high, found.n))


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"


def _safe(text: str) -> str:
    return escape(printable(text))
