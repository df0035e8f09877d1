"""sweep.html: the table with links to the reports of its runs, the frontier, and each figure by each setting that varies."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING
from urllib.parse import quote

from preftune.files import write_atomic
from preftune.report.frontier import Point, frontier
from preftune.report.html import render
from preftune.report.plots import Line, Plot
from preftune.report.text import flat
from preftune.sweeping.grid import text_of
from preftune.sweeping.measure import KL, WIN_RATE
from preftune.sweeping.record import COLUMNS, Folder
from preftune.sweeping.table import rows_of
from preftune.sweeping.verdict import Candidate, candidates, described, varied

if TYPE_CHECKING:
    from preftune.sweeping.job import Sweep


def write_page(found: Sweep) -> None:
    """Writes the page from what came of a sweep."""
    folder = Folder(found.path)
    done = candidates(found.rows)
    heads, cells = rows_of(found)
    runs = [c.runs for c in done] + [[row.name] for row in found.rows if row.status != "done"]
    content = {
        "title": found.path.resolve().name,
        "sentence": found.verdict.sentence,
        "notes": found.notes,
        "heads": heads,
        "rows": [{"cells": row, "links": _links(folder, names)} for row, names in zip(cells, runs, strict=True)],
        "interval": "over seeds, of their mean"
        if "seed" in found.plan.axes
        else "what other held-out prompts would have changed",
        "plots": _plots(found, done),
        "failed": [(described(row.settings) or row.name, row.reason) for row in found.rows if row.status == "failed"],
        "settings": [(name, value) for name, value in flat(found.plan.recipe) if name not in found.plan.axes],
        "again": f"preftune sweep --resume --out {shlex.quote(str(found.path))}",
    }
    write_atomic(folder.page_file, render("sweep.html.jinja", content))


def _links(folder: Folder, names: list[str]) -> list[tuple[str, str]]:
    """Reports of runs, as places beside the page."""
    pages = [(name, folder.run(name).report_file) for name in names]
    return [(name, quote(page.relative_to(folder.path).as_posix())) for name, page in pages if page.exists()]


def _plots(found: Sweep, done: list[Candidate]) -> list[Plot]:
    """The frontier, then KL, the gain and the length by each setting that has several values."""
    plots = []
    placed = [c for c in done if KL in c.figures and found.gain in c.figures]
    axes = varied(found.plan.axes)
    if placed:
        points = [Point(_label(c, axes[:1]), c.figures[KL], c.figures[found.gain], _label(c, axes[1:])) for c in placed]
        if found.gain == WIN_RATE:
            points += [
                Point(f"n = {one.n}", one.kl, one.win_rate, "best of n, measured with its ties") for one in found.best_of
            ]
        plots.append(frontier(points, gain=COLUMNS.get(found.gain, found.gain), best_of_wins=found.gain == WIN_RATE))
    names = [name for name in dict.fromkeys([*COLUMNS, found.plan.metric]) if any(name in c.figures for c in done)]
    for axis in axes:
        values = list(dict.fromkeys(text_of(c.settings[axis]) for c in done))
        if len(values) > 1:
            plots += [_by(axis, values, name, done, [a for a in axes if a != axis]) for name in names]
    return plots


def _label(candidate: Candidate, names: list[str]) -> str:
    return described({name: candidate.settings[name] for name in names})


def _by(axis: str, values: list[str], name: str, done: list[Candidate], others: list[str]) -> Plot:
    """One figure by one setting, a line for each combination of the others."""
    groups: dict[str, list[Candidate]] = {}
    for c in done:
        if name in c.figures:
            groups.setdefault(_label(c, others), []).append(c)
    lines = []
    for colour, (group, members) in enumerate(groups.items()):
        ends = [[v if math.isfinite(v) else None for v in (c.figures[name].low, c.figures[name].high)] for c in members]
        lines.append(
            Line(
                group or "runs",
                [values.index(text_of(c.settings[axis])) for c in members],
                [c.figures[name].value for c in members],
                low=[low for low, _ in ends],
                high=[high for _, high in ends],
                draw="dots",
                colour=colour,
            )
        )
    head = COLUMNS.get(name, name)
    title, _, unit = head.partition(", ")
    return Plot(title[:1].upper() + title[1:], axis, unit or head, lines, names=values)
