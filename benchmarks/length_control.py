"""Judges who favour length, in the demo's world: how much longer the answers get, and what each remedy does about it.

    python benchmarks/length_control.py --out runs/objectives --seed 0 --seed 1     # a few minutes a seed
    python benchmarks/length_control.py --out runs/see --quick                      # that it runs

A label is a Bradley-Terry draw from the true reward plus BIAS for each word of the reply: of two equally good replies the
longer one wins. All arms start from the same SFT model and read the same pairs. A world that `objectives.py` left in OUT is
used again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from demo_world import (
    FAINT,
    FIRST,
    INK,
    SECOND,
    TINY,
    Made,
    Row,
    dress,
    make_world,
    measured_once,
    of_replies,
    save_figure,
    table,
)

from preftune.data.pairs import preferences
from preftune.data.read import read_examples
from preftune.data.types import Prompt, Response
from preftune.data.write import write_examples
from preftune.demo.rubric import plain_text, reward, words
from preftune.demo.story import BETA, LABEL_NOISE, QUICK
from preftune.errors import PreftuneError
from preftune.files import write_atomic
from preftune.label.rule import label_by_rule

BIAS = 0.2  # reward that judges see in one more word: ten words are worth a right fix
CANCELS = BIAS / LABEL_NOISE / BETA  # nats a token: the length_margin that takes just this bias out of DPO's reward
DPO = {"loss.name": "dpo", "loss.beta": BETA}
ARMS: dict[str, dict[str, Any]] = {
    "dpo": DPO,
    f"dpo, length_margin {CANCELS / 2:g}": DPO | {"loss.length_margin": CANCELS / 2},
    "dpo_norm": {"loss.name": "dpo_norm"},
    "simpo": {"loss.name": "simpo"},
    "dpo, ld_alpha 0.5": DPO | {"loss.ld_alpha": 0.5},
    "dpo, ld_alpha 0": DPO | {"loss.ld_alpha": 0.0},
    f"dpo, length_margin {CANCELS:g}": DPO | {"loss.length_margin": CANCELS},
    "dpo, length_margin 0.01": DPO | {"loss.length_margin": 0.01},
}
FAIR = "dpo, fair labels"
COLUMNS = {
    "training": "name",
    "seed": "seed",
    "tokens a reply": "tokens",
    "true reward": "reward",
    "win rate": "win_rate",
    "KL, nats a reply": "kl",
    "malformed": "malformed",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is made and measured")
    parser.add_argument("--seed", type=int, action="append", help="of the world and all draws; may be repeated; default 0")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    parser.add_argument("--svg", type=Path, help="draw the figure there")
    asked = parser.parse_args()
    rows: list[Row] = []
    about = []
    try:
        for seed in asked.seed or [0]:
            made = make_world(asked.out / f"seed-{seed}", TINY if asked.quick else QUICK, seed=seed)
            rows += one_seed(made)
            about.append({"seed": seed, **about_labels(made)})
    except PreftuneError as error:
        print(error, file=sys.stderr)
        return 1
    write_atomic(asked.out / "length_control.json", json.dumps({"bias": BIAS, "labels": about, "rows": rows}, indent=1))
    print("\n" + table(sorted(rows, key=lambda r: list(names()).index(r["name"])), COLUMNS))
    for one in about:
        print("; ".join(f"{k} {v:.3g}" for k, v in one.items()))
    if asked.svg:
        draw(rows, asked.svg)
    return 0


def names() -> dict[str, dict[str, Any]]:
    """Rows of the table in their order, with their settings."""
    return {"(the SFT model)": {}, FAIR: DPO} | ARMS


def seen(prompt: Prompt, response: Response) -> float:
    """What a judge who favours length sees."""
    return reward(prompt, response) + BIAS * len(words(plain_text(response)))


def one_seed(made: Made) -> list[Row]:
    """The reference, DPO on fair labels, and every arm on labels that favour length."""
    fair, biased = (_labelled(made, rule) for rule in (reward, seen))
    rows = [{"name": "(the SFT model)", "seed": made.seed, **of_replies(made.before)}]
    for name, loss in names().items():
        if loss:
            run = f"length/{name.replace(', ', '-').replace(' ', '-')}"
            rows.append(measured_once(made, run, loss, fair if name == FAIR else biased) | {"name": name})
            tokens, truth = rows[-1]["tokens"][0], rows[-1]["reward"][0]
            print(f"seed {made.seed}, {name}: {tokens:.1f} tokens, reward {truth:.2f}", flush=True)
    return rows


def _labelled(made: Made, rule: Any) -> Path:
    file = made.folder / f"length-{rule.__name__}.jsonl"
    if not file.exists():
        judgments = label_by_rule(made.collected, rule, temperature=LABEL_NOISE, seed=made.seed)
        write_examples(file, preferences(made.collected, judgments).examples)
    return file


def about_labels(made: Made) -> Row:
    """Of the labels that favour length: how often the longer reply wins, and how often the truly better one."""
    longer, better = [], []
    for example in read_examples(str(_labelled(made, seen))).examples:
        for pair in example.pairs:
            won, lost = (example.responses[k] for k in pair[:2])
            by_length = len(words(plain_text(won))) - len(words(plain_text(lost)))
            by_truth = reward(example.prompt, won) - reward(example.prompt, lost)
            longer += [by_length > 0] if by_length else []
            better += [by_truth > 0] if by_truth else []
    return {"pairs where the longer wins": mean(longer), "where the better wins": mean(better)}


def draw(rows: list[Row], file: Path) -> None:
    """Length and true reward of every training, a dot with its interval for each seed."""
    from matplotlib.figure import Figure

    shown = list(names())[::-1]
    figure = Figure(figsize=(8.4, 0.34 * len(shown) + 0.9), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(both, ("tokens", "reward"), ("tokens a reply", "true reward of a reply"), strict=True):
        for row in rows:
            value, low, high = row[key]
            seeds = sorted({r["seed"] for r in rows})
            at = shown.index(row["name"]) + 0.16 * (seeds.index(row["seed"]) - (len(seeds) - 1) / 2)
            colour = SECOND if row["name"] in ("dpo", FAIR, shown[-1]) else FIRST
            axes.errorbar(value, at, xerr=[[value - low], [high - value]], fmt="o", color=colour, markersize=4, linewidth=1)
        axes.set_xlabel(title)
        axes.set_yticks(range(len(shown)), shown)
        dress(axes, INK, FAINT, grid="x")
    save_figure(figure, file, "Tokens a reply and true reward of every training on labels that favour length")


if __name__ == "__main__":
    sys.exit(main())
