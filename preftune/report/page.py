"""Puts one run, or several beside each other, on one HTML page: what came out, how it got there, and how to do it again.

    >>> write_report([Run("runs/first")])
    PosixPath('runs/first/report.html')

The page needs nothing but itself: no other host, no other file. Whatever it shows is escaped. A file of a run that is missing
or cannot be read is said to be so, in its place, and the rest of the page is written.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from preftune.errors import ConfigError
from preftune.files import write_atomic
from preftune.report import measured
from preftune.report.card import write_cards
from preftune.report.curves import Course, curves, series
from preftune.report.html import render
from preftune.report.loaded import Found, Loaded, load, names_of
from preftune.report.measured import Row, Tile
from preftune.report.plots import Plot
from preftune.report.samples import HEAT, Sample, samples
from preftune.report.text import flat, number, text
from preftune.run import Run

_DROPPED = 20  # rows that were left out, named one by one
_QUIET = ("ok", "skipped")  # findings that found nothing


class Summary(NamedTuple):
    """What one run came to, and the parts of its folder that are shown as they are."""

    name: str
    verdict: str
    outcome: str  # "yes", "no" or "open": whether it worked
    evaluated: bool
    tiles: list[Tile]
    rows: list[Row]
    notes: list[str]
    findings: list[Found]
    quiet: list[tuple[str, str]]  # names of those that found nothing, and what they said
    checked: list[Found]
    data: list[tuple[str, str]]
    dropped: list[tuple[str, str]]
    settings: str
    evaluate: str  # commands
    diagnose: str
    again: str
    environment: list[tuple[str, str]]
    events: list[tuple[str, str]]
    missing: dict[str, str]


class Page(NamedTuple):
    """Everything that the template shows. An empty part is shown as its entry in a run's `missing`."""

    title: str
    runs: list[Summary]
    differences: list[tuple[str, list[str]]]  # settings that are not the same in all runs
    compared: list[tuple[str, list[str]]]  # figures of all runs
    samples: list[Sample]
    n_prompts: int
    heat: tuple[float, ...]
    curves: list[Plot]
    frontiers: list[Plot]
    calibration: list[Plot]
    lengths: list[Plot]
    breakdowns: list[Plot]


def write_report(runs: Sequence[Run], out: Path | None = None) -> Path:
    """Writes the page of these runs, and the card beside each run's model; returns the path of the page.

    out: by default the run's own report.html. Raises StorageError, and ConfigError where several runs have no `out`.
    """
    runs = list({run.path.resolve(): run for run in runs}.values())
    if out is None and len(runs) > 1:
        raise ConfigError("several runs on one page: name the file to write, as --out compared.html")
    loaded = [load(run, name) for run, name in zip(runs, names_of(runs), strict=True)]
    target = out or runs[0].report_file
    write_atomic(target, render("page.html.jinja", page_of(loaded)._asdict()))
    for one in loaded:
        write_cards(one)
    return target


def page_of(runs: Sequence[Loaded]) -> Page:
    """The content of the page."""
    several = len(runs) > 1
    courses = [Course(one.name, one.metrics, {} if several else measured.final(one.evaluation)) for one in runs]
    return Page(
        title=" · ".join(one.name for one in runs) if len(runs) < 4 else f"{len(runs)} runs",
        runs=[_summary(one) for one in runs],
        differences=_differences(runs) if several else [],
        compared=_compared(runs) if several else [],
        samples=samples(runs),
        n_prompts=len({text(row.get("prompt", "")) for row in runs[0].answers or runs[0].samples}),
        heat=HEAT,
        curves=curves(courses),
        frontiers=measured.frontiers(runs),
        calibration=measured.calibration(runs),
        lengths=measured.lengths(runs),
        breakdowns=measured.breakdowns(runs),
    )


def _summary(one: Loaded) -> Summary:
    found = one.evaluation
    return Summary(
        name=one.name,
        verdict=found.verdict if found else _unevaluated(one),
        outcome={True: "yes", False: "no", None: "open"}[found.worked if found else None],
        evaluated=found is not None,
        tiles=measured.tiles(found) if found else [],
        rows=measured.rows(found) if found else [],
        notes=list(found.notes) if found else [],
        findings=[f for f in one.findings if f.severity not in _QUIET],
        quiet=[(f"{f.name.replace('_', ' ')} ({f.severity})", f.said) for f in one.findings if f.severity in _QUIET],
        checked=[f for f in one.checked if f.severity not in _QUIET],
        data=[(name.replace("_", " "), value) for name, value in flat(one.data) if name != "dropped_rows"],
        dropped=_dropped(one),
        settings=one.settings,
        evaluate=shlex.join(["preftune", "eval", str(one.run.path)]),
        diagnose=shlex.join(["preftune", "diagnose", str(one.run.path)]),
        again=shlex.join(["preftune", "train", str(one.run.config_file), f"out={one.run.path}-again"]),
        environment=flat(one.environment),
        events=one.events,
        missing=one.missing,
    )


def _unevaluated(one: Loaded) -> str:
    """What training itself measured, in a sentence, for a run that was not evaluated."""
    metrics = {"score": "objective/scores", "KL": "objective/kl"}  # a loss says nothing where replies are the policy's own
    if not series(one.metrics, metrics["score"], "eval"):
        metrics = {"loss": "loss", "accuracy": "rewards/accuracies", "the margin": "rewards/margins"}
    told = [
        f"{name} went from {number(points[0][1])} to {number(points[-1][1])}"
        for name, metric in metrics.items()
        if len(points := series(one.metrics, metric, "eval")) > 1
    ]
    steps = series(one.metrics, "loss", "eval")
    sentence = "Whether alignment worked was not evaluated."
    if told:
        sentence += f" On held-out examples, over {steps[-1][0] if steps else 0:,} steps, {_listed(told)}."
    return sentence


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _dropped(one: Loaded) -> list[tuple[str, str]]:
    """Rows that were left out, each with the reason; the last entry counts those that are not named."""
    rows = one.data.get("dropped_rows")
    if not isinstance(rows, list) or not rows:
        return []
    pairs = [(text(row[0]), text(row[1])) for row in rows[:_DROPPED] if isinstance(row, list) and len(row) == 2]
    return pairs + [("and", f"{len(rows) - _DROPPED:,} more, in {one.run.data_file.name}")] * (len(rows) > _DROPPED)


def _differences(runs: Sequence[Loaded]) -> list[tuple[str, list[str]]]:
    """Settings that differ, but for where a run was written; a setting that a run does not have is an en dash."""
    tables = [one.values for one in runs]
    names = dict.fromkeys(name for table in tables for name in table if name != "out")
    rows = [(name, [table.get(name, "–") for table in tables]) for name in names]
    return [row for row in rows if len(set(row[1])) > 1]


def _compared(runs: Sequence[Loaded]) -> list[tuple[str, list[str]]]:
    """Every figure that an evaluation of any of the runs has, run beside run."""
    tables = [{row.name: row for row in measured.rows(one.evaluation)} if one.evaluation else {} for one in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, [_cell(table.get(name)) for table in tables]) for name in names]


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{row.value} ({row.interval})" if row.interval else row.value
