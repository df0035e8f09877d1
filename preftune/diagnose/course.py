"""Findings about the course of training: spikes of the loss and of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from preftune.diagnose.case import Case
from preftune.diagnose.finding import Finding, Severity, skipped

WINDOW = 16
"""Steps before one that it is compared with."""

LEAST = 8
"""Steps that a comparison needs before it."""

JUMP = 6.0
"""Robust standard deviations above the median of the steps before, in log gradient norm, from which a step is a spike."""

SMOOTH, RISEN = 4, 1.5
"""Steps whose mean loss is compared with the loss at the start, and how many times that it may be."""


def spikes(case: Case) -> Finding:
    """Steps that stand far above those before them, and a loss that rises above where training began."""
    name = "spikes"
    norms = [math.log(max(row["grad_norm"], 1e-30)) for row in case.train]
    losses = [row["loss"] for row in case.train]
    if len(norms) < 2 * LEAST:
        return skipped(name, f"{len(norms)} steps are too few to tell a spike ({2 * LEAST} are needed)")
    at, high, above = ([case.train[i]["step"] for i in found] for found in (jumps(norms), jumps(losses), risen(case)))
    both = sorted({*at} & {*high})
    numbers = {"gradient": at, "loss": high, "both": both, "above_start": above, "steps": len(norms)}
    said = f"{len(at)} spikes of the gradient and {len(high)} of the loss in {len(norms)} steps"
    remedy = (
        f"optim.warmup=0.1, a lower optim.lr (now {case.config.optim.lr or 0:g}), optim.clip=1 (now "
        f"{case.config.optim.clip:g}); look at the examples of these steps"
    )
    if above:
        said = (
            f"the loss rose to {max(losses):.3g} from {losses[0]:.3g}, and was {RISEN:g} times its start at {len(above)} steps"
        )
        severity: Severity = "error" if above[-1] == case.train[-1]["step"] else "warning"
        return Finding(name, severity, said, remedy, numbers)
    if not both:
        many = len(at) + len(high) > max(2, 0.02 * len(norms))
        return Finding(name, "note" if many else "ok", said, remedy if many else "", numbers)
    shown = ", ".join(str(step) for step in both[:5])
    return Finding(name, "error" if len(both) >= 3 else "warning", f"{said}; both at steps {shown}", remedy, numbers)


def risen(case: Case) -> list[int]:
    """Indices of steps up to which the last SMOOTH losses have a mean of RISEN times the loss at the start, or more.

    Where the policy starts as its reference all examples begin with one loss; else the worst of the first steps is the start.
    """
    losses = np.array([row["loss"] for row in case.train])
    exact = case.train[0].get("kl", 1.0) < 1e-3
    start = float(losses[0] if exact else losses[:LEAST].max())
    mean = np.convolve(losses, np.full(SMOOTH, 1 / SMOOTH), "valid")
    return [int(i) + SMOOTH - 1 for i in np.flatnonzero(mean > RISEN * start)] if start > 0 else []


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
