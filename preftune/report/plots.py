"""What a plot shows, as plain numbers: the page draws it with uPlot, and prints it as a table for those who do not see it.

    >>> Plot("Loss", "step", "nats", (Line("held out", (0, 100), (0.693, 0.52)),))

There is one way to plot on our pages. A plot knows nothing of colours, pixels or HTML beyond its own data block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from preftune.report.text import number

if TYPE_CHECKING:
    from markupsafe import Markup

Values = Sequence[float | None]
Draw = Literal["line", "dots", "points", "bars", "faint"]
"""How a line is drawn: "dots" are joined by a line, "points" stand alone, "faint" is there to be seen past."""

_ROWS = 12  # of the table beside a plot: more would be read by nobody


class Line(NamedTuple):
    """One thing in a plot: `y` at `x`, with the 95 % interval from `low` to `high` where there is one."""

    name: str
    x: Sequence[float]
    y: Values
    low: Values = ()
    high: Values = ()
    x_low: Values = ()  # and the interval of x, for points
    x_high: Values = ()
    draw: Draw = "line"
    colour: int = 0  # of the page's series
    dashed: bool = False
    labels: Sequence[str] = ()  # words beside the points


class Plot(NamedTuple):
    """A picture, its title, what its axes are and one sentence on how to read it."""

    title: str
    x: str  # what the axis shows, with its unit
    y: str
    lines: Sequence[Line]
    note: str = ""
    levels: Sequence[float] = ()  # thin lines across
    uprights: Sequence[float] = ()  # thin lines upwards
    diagonal: bool = False  # a thin line where y = x
    names: Sequence[str] = ()  # of x = 0, 1, …, in place of numbers
    log2: bool = False  # the scale of x
    together: str = ""  # plots of one such name share the pointer and the zoom
    wide: bool = False

    def block(self) -> Markup:
        """The plot for the script, as JSON in which nothing can end a script element."""
        from markupsafe import Markup

        content = self._asdict() | {"lines": [_short(line) for line in self.lines if len(line.x)]}
        text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
        return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows of the same numbers: of a long curve a dozen places, evenly spaced, the ends among them."""
        lines = [line for line in self.lines if line.draw != "faint" and len(line.x)] or list(self.lines)
        at = sorted({x for line in lines for x in line.x})
        if len(at) > _ROWS:
            at = [at[round(k * (len(at) - 1) / (_ROWS - 1))] for k in range(_ROWS)]
        rows = [[self._place(x), *(_nearest(line, x, at) for line in lines)] for x in at]
        return [self.x, *(line.name for line in lines)], rows

    def _place(self, x: float | int) -> str:
        return self.names[int(x)] if self.names else number(x)


def _nearest(line: Line, x: float | int, places: Sequence[float | int]) -> str:
    """The value of a line at `x`, or at the place nearest to it that no other row is nearer to."""
    if not len(line.x):
        return ""
    k = min(range(len(line.x)), key=lambda i: abs(line.x[i] - x))
    value = line.y[k]
    if value is None or min(places, key=lambda p: abs(p - line.x[k])) != x:
        return ""
    label = f"{line.labels[k]}: " if len(line.labels) else ""
    low, high = (part[k] if len(part) else None for part in (line.low, line.high))
    return f"{label}{number(value)}" + (f" [{number(low)}, {number(high)}]" if low is not None and high is not None else "")


def _short(line: Line) -> dict[str, object]:
    """With six significant digits, and null for what is no finite number; what is not given is left out."""
    short = {name: value for name, value in line._asdict().items() if value not in ((), [], False, 0)}
    for name in ("x", "y", "low", "high", "x_low", "x_high"):
        if name in short:
            short[name] = _digits(short[name])
    return short


def _digits(values: Iterable[float | int | None]) -> list[float | int | None]:
    shown: list[float | int | None] = []
    for value in values:
        if value is None or not math.isfinite(value):
            shown.append(None)
        else:
            rounded = float(f"{value:.6g}")
            shown.append(int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded)
    return shown
