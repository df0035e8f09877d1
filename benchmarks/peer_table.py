"""What `peer.py` shows of its cells: the table, the plot, and what has become slower since a former run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEAD = [
    "case", "TRL's setting", "steps", "tokens read a step, TRL / preftune", "CPU s/step, TRL / preftune", "by the clock",
    "ratio (CPU)", "ratio (clock)", "loss difference", "weight drift", "reference CPU s/step, TRL / preftune",
]  # fmt: skip
MEMORY_HEAD = ["case", "side", "peak MiB", "after start-up", "above it and the optimizer's state"]
CENTRE = {"size": "50M", "vocabulary": 50_000, "max_length": 512, "threads": 1, "precision": "fp32"}
"""The shape that the targets are for. A case of another shape says in what it differs."""
ALLOWED = 0.9
"""A case is slower where its ratio to TRL has fallen below this share of what it was."""


def table(cells: list[dict[str, Any]], *, head: bool = True) -> str:
    """Markdown."""
    lines = [HEAD, ["---"] * len(HEAD)] if head else []
    return "".join(f"| {' | '.join(line)} |\n" for line in [*lines, *map(row_of, cells)])


def row_of(cell: dict[str, Any]) -> list[str]:
    """One line of the table."""

    def both(seconds: dict[str, float], digits: int = 2) -> str:
        return " / ".join(f"{seconds[side]:.{digits}f}" for side in ("trl", "preftune"))

    reference = cell["reference_cpu"]
    theirs = f"{reference['trl']:.2f}" if reference["trl"] else "in the step"
    line = [case_of(cell), cell["peer"], str(cell["n_steps"])]
    line += [both(cell["tokens_read"], 0), both(cell["cpu"]), both(cell["wall"])]
    line += [f"**{cell['ratio_cpu']:.2f}**", f"{cell['ratio_wall']:.2f}"]
    line += [f"{cell['loss_difference']:.0e}", f"{cell['weight_drift']:.0e}"]
    return [*line, f"{theirs} / {reference['preftune']:.2f}"]


def case_of(cell: dict[str, Any]) -> str:
    """`hh, full, max_length 1024`: data, tuning, and in what the shape is not the usual one."""
    other = [f"{name} {value}" for name, value in cell["shape"].items() if value != CENTRE[name]]
    return ", ".join([cell["data"], cell["tuning"], *other])


def name_of(cell: dict[str, Any]) -> str:
    return f"{case_of(cell)}, {cell['peer']}"


def memory_table(peaks: list[dict[str, Any]]) -> str:
    """Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [MEMORY_HEAD, ["---"] * len(MEMORY_HEAD)]) + "".join(
        f"{peak_row(p)}\n" for p in peaks
    )


def peak_row(peak: dict[str, Any]) -> str:
    """One line of the table of memory."""
    side = peak["side"] if peak["side"].startswith("preftune") else f"TRL {peak['side']}"
    return f"| {case_of(peak)} | {side} | {peak['peak']:.0f} | {peak['start']:.0f} | {peak['above']:.0f} |"


def compared(cells: list[dict[str, Any]], former: list[dict[str, Any]]) -> list[str]:
    """Cases that are slower by more than 10 %, by their ratio to TRL: seconds are those of one machine and one day."""
    before = {name_of(c): c["ratio_cpu"] for c in former}
    found = []
    for cell in cells:
        was = before.get(name_of(cell))
        if was is not None and cell["ratio_cpu"] < ALLOWED * was:
            found.append(f"{name_of(cell)}: {cell['ratio_cpu']:.2f} times TRL's speed, {was:.2f} before")
    return found


def plot(content: dict[str, Any], file: Path) -> None:
    """Bars: how many times faster than each setting of TRL, with a line at equal speed."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "preftune"  # the same figures give the same file
    import matplotlib.pyplot as plt

    cells = [c for c in content["cells"] if c["shape"] == CENTRE] or content["cells"]
    groups = list(dict.fromkeys((c["data"], c["tuning"]) for c in cells))
    peers = list(dict.fromkeys(c["peer"] for c in cells))
    colours = dict(zip(peers, ("#26547c", "#4a8fb5", "#8bbfd6", "#e07a3f"), strict=False))
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    at, ticks = 0.0, []
    for data, tuning in groups:
        mine = [c for c in cells if (c["data"], c["tuning"]) == (data, tuning)]
        places = [at + i for i in range(len(mine))]
        ticks.append((sum(places) / len(places), f"{data}\n{tuning}"))
        for x, cell in zip(places, mine, strict=True):
            axes.bar(x, cell["ratio_cpu"], width=0.85, color=colours[cell["peer"]])
            axes.text(x, cell["ratio_cpu"], f"{cell['ratio_cpu']:.1f}", ha="center", va="bottom", fontsize=8)
        at += len(mine) + 1
    axes.axhline(1, color="#444444", linewidth=0.8)
    axes.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
    axes.set_ylabel("times TRL's speed (CPU time)")
    axes.legend([plt.Rectangle((0, 0), 1, 1, color=colours[p]) for p in peers], [f"TRL {p}" for p in peers], frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
