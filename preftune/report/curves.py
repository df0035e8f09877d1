"""Rows of metrics.jsonl in, pictures out: one small SVG per panel, with the colours of the page around it.

    >>> [curve.title for curve in curves(rows)]
    ['Loss', 'Accuracy', 'Margin']

A panel is one line in PANELS; it is drawn where at least one of its metrics was logged. Colours are CSS variables, so that a
picture follows the page into the dark; lines differ by marker and dash as well, so that it can be read without colours.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Panel(NamedTuple):
    """What one picture shows."""

    title: str
    unit: str
    metrics: tuple[str, ...]  # one or two; the second is dashed
    level: float | None = None  # a value worth a thin line across
    note: str = ""


PANELS = (
    Panel("Loss", "loss", ("loss",), note="lower is better; dpo starts at ln 2 = 0.693"),
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
    Panel("KL from the reference", "nats", ("kl",), level=0.0, note="per response"),
    Panel("Gradient norm", "L2", ("grad_norm",), note="before clipping"),
    Panel("Learning rate", "per step", ("learning_rate",)),
    Panel("Speed", "tokens/s", ("tokens_per_second",)),
    Panel("Response lengths", "tokens", ("lengths/chosen", "lengths/rejected")),
)

# Colours that no figure of matplotlib's uses, replaced in the SVG by the page's.
INK, FAINT, FIRST, SECOND = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", FIRST: "var(--series-1)", SECOND: "var(--series-2)"}


class Curve(NamedTuple):
    """One picture."""

    title: str
    note: str
    svg: str  # an <svg> element, safe to put into a page


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The panels of PANELS that `rows` (of metrics.jsonl) have numbers for. Imports matplotlib on first use."""
    drawn = []
    for panel in PANELS:
        lines = [
            (metric, split, points)
            for metric in panel.metrics
            for split in ("train", "eval")
            if (points := series(rows, metric, split))
        ]
        if lines:
            drawn.append(Curve(panel.title, panel.note, _draw(panel, lines)))
    return drawn


def series(rows: Sequence[Mapping[str, Any]], metric: str, split: str) -> list[tuple[int, float]]:
    """(step, value) of the rows of one split that have a finite number for `metric`, by step."""
    points = []
    for row in rows:
        step, value = row.get("step"), row.get(metric)
        if row.get("split") == split and isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value):
            points.append((step, float(value)))
    return sorted(points)


def _draw(panel: Panel, lines: list[tuple[str, str, list[tuple[int, float]]]]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": panel.title, "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        axes = figure.add_subplot()
        if panel.level is not None:
            axes.axhline(panel.level, color=FAINT, linewidth=1, zorder=0)
        for metric, split, points in lines:
            name = f"{metric.rsplit('/', 1)[-1]}, " if len(panel.metrics) > 1 else ""
            label = name + ("held out" if split == "eval" else "training")
            _line(axes, points, label=label, held_out=split == "eval", second=metric != panel.metrics[0])
        _dress(axes, panel, legend=len(lines) > 1)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return inline(out.getvalue(), f"{panel.title}, {panel.unit}, by step")


def _line(axes: Axes, points: list[tuple[int, float]], *, label: str, held_out: bool, second: bool) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(
        steps,
        values,
        label=label,
        color=SECOND if second else FIRST,
        linestyle=(0, (4, 2)) if second else "-",
        linewidth=2 if held_out else 1,
        alpha=1 if held_out else 0.55,
        marker="os"[second] if held_out or len(points) == 1 else None,
        markersize=4,
    )


def _dress(axes: Axes, panel: Panel, *, legend: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(panel.unit, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.tick_params(colors=INK, length=3)
    axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    if legend:
        place: dict[str, Any] = {
            "loc": "lower left",
            "bbox_to_anchor": (0.0, 1.0),
            "ncols": 2,
            "borderaxespad": 0,
        }  # over no line
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, **place)


def inline(svg: str, label: str) -> str:
    """The <svg> element alone, in the page's colours and font, without metadata, its own style sheet or a fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1, flags=re.DOTALL
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every picture, and used by nothing
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.strip()
