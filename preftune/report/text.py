"""Values as people read them on a page: numbers with four digits, conversations as text, nested mappings as rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftune.evaluate.estimate import Estimate


def number(value: Any) -> str:
    """A number with four significant digits (whole ones in full, with separators); text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1e-4 else f"{value:.4g}"


def interval(estimate: Estimate) -> str:
    """From low to high; "" where the interval is not bounded, as that of a single prompt is not."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return ""
    return f"{number(estimate.low)} to {number(estimate.high)}"


def text(value: Any) -> str:
    """A value as people read it: text as it is, messages as role and content, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value):
        if len(value) == 1:
            return text(value[0]["content"])
        return "\n".join(f"{text(m.get('role', ''))}: {text(m['content'])}" for m in value)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return ", ".join(value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return number(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)


def short(place: str) -> str:
    """An absolute path by its last two parts: the rest says only whose disk it is on. Anything else as it is."""
    path = Path(place)
    return "/".join(("…", *path.parts[-2:])) if path.is_absolute() and len(path.parts) > 3 else place


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Name and text of each value of nested mappings, names joined by dots."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.") or [(f"{prefix}{key}", "none")]
        else:
            rows.append((f"{prefix}{key}", text(value)))
    return rows


def dicts(rows: Any) -> list[dict[str, Any]]:
    """The rows that are objects; [] of anything else."""
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
