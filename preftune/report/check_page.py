"""Puts the findings about a data set on one HTML page, with plots of what a model could learn instead of quality.

    >>> write_page(inspect("pairs.jsonl"), Path("check.html"), title="pairs.jsonl")

As the report of a run, the page needs nothing but itself, and whatever it shows of the data is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftune.diagnose.check import Check
from preftune.files import write_atomic
from preftune.report.html import render
from preftune.report.plots import Line, Plot
from preftune.report.text import number

THRESHOLDS = (0.55, 0.6, 0.7)
_COUNTS = {
    "rows_read": "rows",
    "used": "examples",
    "quarantined": "set aside",
    "prompts": "prompts",
    "pairs": "preferences",
    "labelled": "labelled responses",
    "responses": "responses",
}


def write_page(check: Check, out: Path, *, title: str) -> None:
    """Writes the page. Raises StorageError."""
    quiet = [finding for finding in check.findings if finding.severity in ("ok", "skipped")]
    page = {
        "title": Path(title).name or title,
        "summary": check.summary,
        "counts": [(name, number(check.counts[key])) for key, name in _COUNTS.items()],
        "found": [finding for finding in check.findings if finding not in quiet],
        "quiet": [(f"{finding.name.replace('_', ' ')} ({finding.severity})", finding.said) for finding in quiet],
        "plots": plots({finding.name: finding.numbers for finding in check.findings}),
        "example": check.example,
        "notes": check.notes,
    }
    write_atomic(out, render("check.html.jinja", page))


def plots(numbers: Mapping[str, Mapping[str, Any]]) -> list[Plot]:
    """Accuracy of each cheat with its interval, and the distribution of length ratios; those that there are numbers for."""
    cheats = [
        (name.replace("_", " "), found["accuracy"], found["accuracy_interval"])
        for name in ("length", "first_word", "formatting", "surface")
        if "accuracy" in (found := numbers.get(name, {}))
    ]
    words = numbers.get("label_noise", {})
    if "word_model_accuracy" in words:
        cheats.append(("all words", words["word_model_accuracy"], words["word_model_interval"]))
    drawn = []
    if cheats:
        names, values, intervals = zip(*cheats, strict=True)
        low, high = zip(*intervals, strict=True)
        line = Line("accuracy", range(len(names)), values, low, high, draw="points")
        note = "on prompts not seen, with 95 % intervals; thin lines: chance, and the thresholds of note, warning and error"
        title = "How often a cheat predicts the winner"
        drawn.append(Plot(title, "cheat", "share of the preferences", [line], note, (0.5, *THRESHOLDS), names=names))
    if histogram := numbers.get("length", {}).get("histogram"):
        edges = histogram["edges"]
        middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
        bars = Line("preferences", middles, histogram["counts"], draw="bars")
        note = "of lengths in characters; right of the line the chosen response is the longer one"
        title = "Length of chosen against rejected"
        drawn.append(Plot(title, "log2(chosen / rejected)", "preferences", [bars], note, uprights=(0.0,)))
    return drawn
