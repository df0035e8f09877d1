"""β and the learning rate on the demo's world: how far DPO goes from its reference, what it gains, and what its margins say.

    python benchmarks/beta.py --out runs/beta                                   # three worlds, each with four values of β
    python benchmarks/beta.py --out runs/beta --rates 1e-4 --seeds 1            # another learning rate, in one of them
    python benchmarks/beta.py --out runs/see --quick --seeds 1                  # that it runs

Each world has its own reference, replies and errors of judgment. All of its runs read the same pairs and differ in β and the
learning rate alone. What is finished is in OUT/seed-N/results and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from demo_world import FAINT, FIRST, INK, SECOND, TINY, Made, Row, dress, make_world, measured_once, of_policy, save_figure

from preftune.data.pairs import preferences
from preftune.data.write import write_examples
from preftune.demo.rubric import reward
from preftune.demo.story import LABEL_NOISE, QUICK
from preftune.errors import PreftuneError
from preftune.files import write_atomic
from preftune.label.rule import label_by_rule
from preftune.run import Run

BETAS = (0.01, 0.05, 0.1, 0.5)
COLUMNS = {
    "kl": ("KL, nats a reply", 2),
    "win_rate": ("win rate, %", 1),
    "reward": ("true reward", 2),
    "tokens": ("tokens a reply", 1),
    "malformed": ("malformed, %", 1),
    "log_ratio": ("margin of log-ratios, nats", 2),
    "margin": ("logged margin (β × that)", 2),
}
PERCENT = {"win_rate", "malformed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is made and measured")
    parser.add_argument("--seeds", type=int, default=3, help="how many worlds")
    parser.add_argument("--rates", default="1e-3", help="learning rates, separated by commas")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--svg", type=Path, help="draw the figure there")
    asked = parser.parse_args()
    rows: list[Row] = []
    rates = [float(rate) for rate in asked.rates.split(",")]
    try:
        for seed in range(asked.seeds):
            made = make_world(asked.out / f"seed-{seed}", TINY if asked.quick else QUICK, seed=seed)
            rows += world_rows(made, rates)
    except PreftuneError as error:
        print(error, file=sys.stderr)
        return 1
    found = summary(rows)
    print(markdown(found))
    if asked.json:
        write_atomic(asked.json, json.dumps({"summary": found, "runs": rows}, indent=1) + "\n")
    if asked.svg:
        draw(found, asked.svg)
    return 0


def world_rows(made: Made, rates: Sequence[float]) -> list[Row]:
    """A row for each β and learning rate in one world."""
    pairs = made.folder / "pairs.jsonl"
    if not pairs.exists():
        judged = label_by_rule(made.collected, reward, temperature=LABEL_NOISE, seed=made.seed, annotator="rule")
        write_examples(pairs, preferences(made.collected, judged).examples)
    rows = []
    for rate in rates:
        for beta in BETAS:
            name, settings = f"beta-{beta:g}_lr-{rate:g}", {"loss.name": "dpo", "loss.beta": beta, "optim.lr": rate}
            rows.append({"beta": beta, "lr": rate, **measured_once(made, name, settings, pairs, by=_measure)})
            print(f"   seed {made.seed}, {name}: " + ", ".join(f"{k} {_of(rows[-1], k):.3g}" for k in COLUMNS), flush=True)
    return rows


def _measure(made: Made, run: Run) -> Row:
    """What true reward and reference say, and the margin that the run itself logged at its end."""
    return {**of_policy(made, run), **logged(run)}


def logged(run: Run) -> Row:
    """The margin on training pairs, mean over the last tenth of the steps, and the same without its factor β, in nats."""
    rows = run.metrics(split="train")
    tail = [row["rewards/margins"] for row in rows[-max(1, len(rows) // 10) :]]
    margin = sum(tail) / len(tail)
    return {"margin": margin, "log_ratio": margin / run.config().loss_parameters["beta"]}


def _of(row: Row, name: str) -> float:
    value = row[name]
    return float(value[0] if isinstance(value, list) else value) * (100 if name in PERCENT else 1)


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each learning rate and β every figure as a list, a value a world."""
    found: list[dict[str, Any]] = []
    for rate in dict.fromkeys(row["lr"] for row in rows):
        for beta in BETAS:
            mine = [row for row in rows if (row["beta"], row["lr"]) == (beta, rate)]
            found.append({"lr": rate, "beta": beta, **{name: [_of(row, name) for row in mine] for name in COLUMNS}})
    return found


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The table: means over worlds, and the lowest and highest world in brackets."""
    heads = ["learning rate", "β", *(head for head, _ in COLUMNS.values())]
    lines = ["| " + " | ".join(heads) + " |", "|---:" * len(heads) + "|"]
    for row in found:
        cells = [f"{row['lr']:g}", f"{row['beta']:g}"]
        for name, (_, digits) in COLUMNS.items():
            values = row[name]
            low, high = (f"{end:.{digits}f}" for end in (min(values), max(values)))
            cells.append(f"{sum(values) / len(values):.{digits}f}" + (f" ({low}–{high})" if len(values) > 1 else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: Sequence[dict[str, Any]], file: Path) -> None:
    """KL by β, logged margin by β, win rate by KL: a line for each world, a colour for each learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    shift, logged_axes, frontier = figure.subplots(1, 3)
    rates = list(dict.fromkeys(row["lr"] for row in found))
    for rate, colour, marker in zip(rates, cycle((FIRST, SECOND)), cycle("os"), strict=False):
        mine = [row for row in found if row["lr"] == rate]
        betas = [row["beta"] for row in mine]
        for world in range(len(mine[0]["kl"])):
            kl, margin, wins = ([row[name][world] for row in mine] for name in ("kl", "margin", "win_rate"))
            look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "alpha": 0.8}
            label = f"learning rate {rate:g}" if world == 0 else None
            shift.plot(betas, kl, label=label, **look)
            logged_axes.plot(betas, margin, **look)
            frontier.plot(kl, wins, **look)
        for row in mine:
            place = {"xytext": (5, -9), "textcoords": "offset points", "fontsize": 7, "color": INK}
            frontier.annotate(f"β = {row['beta']:g}", (row["kl"][0], row["win_rate"][0]), **place)
    shift.set(xscale="log", yscale="log", xlabel="β", ylabel="KL from the reference, nats a reply")
    logged_axes.set(xscale="log", yscale="log", xlabel="β", ylabel="logged margin on training pairs")
    frontier.set(xlabel="KL from the reference, nats a reply", ylabel="win rate over the reference, %")
    shift.legend(frameon=False, labelcolor=INK, fontsize=8)
    for axes in (shift, logged_axes, frontier):
        dress(axes, INK, FAINT, grid="both")
    save_figure(figure, file, "KL falls and the logged margin rises with beta; win rate against KL for each beta")


if __name__ == "__main__":
    sys.exit(main())
