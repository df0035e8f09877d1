"""Puts the findings about a data set on one HTML page, with plots of what a model could learn instead of quality.

    >>> write_page(inspect("pairs.jsonl"), Path("check.html"), title="pairs.jsonl")

As the report of a run, the page needs nothing but itself, and whatever it shows of the data is escaped.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.diagnose.check import Check
from preftune.files import write_atomic
from preftune.report.curves import FAINT, FIRST, INK, SECOND, Curve, inline
from preftune.report.page import templates
from preftune.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """Writes the page. Raises StorageError. Imports matplotlib."""
    quiet = [finding for finding in check.findings if finding.severity in ("ok", "skipped")]
    page = {
        "title": Path(title).name or title,
        "summary": check.summary,
        "counts": [(name, number(check.counts[key])) for key, name in _COUNTS.items()],
        "found": [finding for finding in check.findings if finding not in quiet],
        "quiet": quiet,
        "plots": plots({finding.name: finding.numbers for finding in check.findings}),
        "example": check.example,
        "notes": check.notes,
    }
    write_atomic(out, templates().get_template("check.html.jinja").render(page))


def plots(numbers: Mapping[str, Mapping[str, Any]]) -> list[Curve]:
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
        note = "on prompts not seen, with 95 % intervals; thin lines: chance, and the thresholds of note, warning and error"
        drawn.append(
            Curve("How often a cheat predicts the winner", note, _drawn("accuracy", lambda axes: _cheats(axes, cheats)))
        )
    histogram = numbers.get("length", {}).get("histogram")
    if histogram:
        note = "log2 of chosen by rejected length in characters; right of the line the chosen response is the longer one"
        svg = _drawn("ratios of length", lambda axes: _bars(axes, histogram))
        drawn.append(Curve("Length of chosen against rejected", note, svg))
    return drawn


def _drawn(name: str, draw: Any) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.tick_params(colors=INK, length=3)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(FAINT)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return inline(out.getvalue(), name)


def _cheats(axes: Axes, cheats: list[tuple[str, float, list[float]]]) -> None:
    for at in (0.5, *THRESHOLDS):
        axes.axvline(at, color=FAINT, linewidth=1, zorder=0)
    for row, (_, value, (low, high)) in enumerate(reversed(cheats)):
        axes.plot([low, high], [row, row], color=FIRST, linewidth=2)
        axes.plot([value], [row], "o", color=SECOND, markersize=5)
    axes.set_yticks(range(len(cheats)), [name for name, *_ in reversed(cheats)])
    axes.set_xlabel("share of the preferences", color=INK)
    axes.set_xlim(min(0.4, *(low for *_, (low, _) in cheats)), 1.0)


def _bars(axes: Axes, histogram: Mapping[str, list[float]]) -> None:
    edges, counts = histogram["edges"], histogram["counts"]
    axes.bar(edges[:-1], counts, width=[b - a for a, b in zip(edges, edges[1:], strict=False)], align="edge", color=FIRST)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel("log2(chosen / rejected)", color=INK)
    axes.set_ylabel("preferences", color=INK)
