"""Findings about the course of training: spikes of the loss and of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from preftune.diagnose.case import Case
from preftune.diagnose.finding import Finding, skipped

WINDOW = 16
"""Steps before one that it is compared with."""

LEAST = 8
"""Steps that a comparison needs before it."""

JUMP = 6.0
"""Robust standard deviations above the median of the steps before, in log gradient norm, from which a step is a spike."""


def spikes(case: Case) -> Finding:
    """Steps whose gradient stands far above those before it, or whose loss rises above all that training began with."""
    name = "spikes"
    norms = [math.log(max(row["grad_norm"], 1e-30)) for row in case.train]
    losses = [row["loss"] for row in case.train]
    if len(norms) < 2 * LEAST:
        return skipped(name, f"{len(norms)} steps are too few to tell a spike ({2 * LEAST} are needed)")
    at = [case.train[i]["step"] for i in jumps(norms)]
    high = [case.train[i]["step"] for i in jumps(losses)]
    both = sorted({*at} & {*high})
    numbers = {"gradient": at, "loss": high, "both": both, "steps": len(norms)}
    said = f"{len(at)} spikes of the gradient and {len(high)} of the loss in {len(norms)} steps"
    if not both and len(at) + len(high) <= max(2, 0.02 * len(norms)):
        return Finding(name, "ok", said, numbers=numbers)
    shown = ", ".join(str(step) for step in (both or sorted({*at, *high}))[:5])
    severe = len(both) >= 3
    return Finding(
        name, "error" if severe else "warning" if both else "note", f"{said}, among them steps {shown}",
        f"optim.warmup=0.1, a lower optim.lr (now {case.config.optim.lr or 0:g}), optim.clip=1 (now "
        f"{case.config.optim.clip:g}); look at the examples of these steps",
        numbers,
    )  # fmt: skip


def jumps(values: Sequence[float]) -> list[int]:
    """Indices of values far above the median of those before them, by the median of absolute deviations."""
    found = []
    for i in range(LEAST, len(values)):
        before = np.asarray(values[max(0, i - WINDOW) : i])
        middle = float(np.median(before))
        spread = 1.4826 * float(np.median(np.abs(before - middle)))
        floor = 0.02 * max(abs(middle), 1e-12)  # a course without noise has no spread
        if values[i] - middle > JUMP * max(spread, floor):
            found.append(i)
    return found
