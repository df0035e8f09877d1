"""What a sweep varies, from words of the command line: several values, or a range, of a setting.

    >>> fixed, axes = parse(["epochs=2", "loss.beta=0.01..1..3", "optim.lr=1e-4,1e-3"])
    >>> fixed, axes
    (['epochs=2'], {'loss.beta': (0.01, 0.1, 1.0), 'optim.lr': (0.0001, 0.001)})

    a,b,c      these values; one that has commas itself stands in quotes, [brackets] or {braces}
    a..b..n    n values from a to b, each the same factor above the one before; whole numbers where a and b are written so
    a..b       any value between, evenly by its logarithm: for a search, not for a grid

One value is no axis: it is a setting of all runs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from preftune.errors import ConfigError
from preftune.yamlfile import parse_word


class Range(NamedTuple):
    """Any value from `low` to `high`, evenly by its logarithm; whole numbers where both are `int`."""

    low: int | float
    high: int | float

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def spread(self, n: int) -> tuple[int | float, ...]:
        """`n` values with both ends, each the same factor above the one before; whole ones rounded, each once."""
        values = [self.low * (self.high / self.low) ** (k / (n - 1)) for k in range(1, n - 1)]
        inner = [round(v) if self.whole else float(f"{v:.4g}") for v in values]
        return tuple(dict.fromkeys([self.low, *inner, self.high]))


Axis = tuple[Any, ...] | Range
Settings = dict[str, Any]
"""Dotted setting -> value: what sets one run apart from the others."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?:\.\.(\d+))?")


def parse(words: Sequence[str]) -> tuple[list[str], dict[str, Axis]]:
    """Words that hold for all runs, and what varies. Raises ConfigError for a word that is neither."""
    fixed: list[str] = []
    axes: dict[str, Axis] = {}
    for word in words:
        name, _, text = word.partition("=")
        if found := _RANGE.fullmatch(text):
            values: Axis = _range(name, *found.groups())
        else:
            pieces = _pieces(text)
            if len(pieces) > 1 and "" in pieces:
                raise ConfigError(f"command line: {word}: a value between commas is empty; expected {name}=A,B,C")
            values = tuple(parse_word(f"{name}={piece}")[1] for piece in pieces)
        if isinstance(values, tuple) and len(values) == 1:
            fixed.append(word)
        elif name in axes:
            raise ConfigError(f"command line: {name} is given twice; put all its values into one word, {name}=A,B,C")
        else:
            axes[name] = values
    if both := sorted({word.partition("=")[0] for word in fixed} & set(axes)):
        raise ConfigError(f"command line: {both[0]} is given twice, once with one value and once with several")
    return fixed, axes


def _pieces(text: str) -> list[str]:
    """The text at its commas, but for those within quotes, brackets and braces."""
    pieces, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        if c == "," and not quote and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += c
    return pieces


def _range(name: str, low: str, high: str, n: str | None) -> Axis:
    a, b = (int(x) if re.fullmatch(r"[-+]?\d+", x) else float(x) for x in (low, high))
    if isinstance(a, float) or isinstance(b, float):
        a, b = float(a), float(b)
    if not 0 < a < b:
        raise ConfigError(f"command line: {name}={low}..{high}: expected a smaller and a larger number, both above 0")
    if n is None:
        return Range(a, b)
    if int(n) < 2:
        raise ConfigError(f"command line: {name}={low}..{high}..{n}: expected 2 values or more")
    return Range(a, b).spread(int(n))


def checked_axes(given: Mapping[str, Any]) -> dict[str, Axis]:
    """Axes as Python gives them: a sequence of values, or a Range. Raises ConfigError."""
    axes: dict[str, Axis] = {}
    for name, values in given.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ConfigError(f"{name}: expected a list of values or a Range, got {values!r}")
        axes[name] = values if isinstance(values, Range) else tuple(values)
        if not axes[name]:
            raise ConfigError(f"{name}: expected one value or more, got none")
        if isinstance(values, Range) and not 0 < values.low < values.high:
            raise ConfigError(f"{name}: expected a range from a smaller to a larger number, both above 0, got {tuple(values)}")
    for name, axis in axes.items():
        if not isinstance(axis, Range) and (twice := [v for k, v in enumerate(axis) if v in axis[:k]]):
            raise ConfigError(f"{name}: the value {twice[0]!r} is given twice")
    return axes


def combinations(axes: Mapping[str, Axis]) -> list[Settings]:
    """Every combination, the last axis fastest. Raises ConfigError for a range, which has no end of values."""
    for name, axis in axes.items():
        if isinstance(axis, Range):
            raise ConfigError(
                f"{name}: {axis.low}..{axis.high} is a range for a search (--optuna N); for a grid say how many values, "
                f"{name}={axis.low}..{axis.high}..5"
            )
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def run_name(settings: Settings) -> str:
    """The settings as the name of a folder: beta-0.1_lr-0.001."""
    last = [name.rpartition(".")[2] for name in settings]
    short = [end if last.count(end) == 1 else name for name, end in zip(settings, last, strict=True)]
    parts = [f"{name}-{text_of(value).rpartition('/')[2]}" for name, value in zip(short, settings.values(), strict=True)]
    plain = re.sub(r"[^\w.+-]+", "-", "_".join(parts), flags=re.ASCII).strip("-.") or "run"
    exact = all(
        isinstance(v, int | float | bool | None) or re.fullmatch(r"[\w.+]+", str(v), re.ASCII) for v in settings.values()
    )
    if exact and len(plain) <= 100:
        return plain
    return f"{plain[:100]}-{hashlib.blake2b(repr(settings).encode(), digest_size=4).hexdigest()}"


def text_of(value: Any) -> str:
    """A value as people write it: 0.001 and not 0.0010000000000000002."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
