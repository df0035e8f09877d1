"""Every objective on the demo's world: win rate against the reference by the true reward, and the KL that it took.

    python benchmarks/objectives.py --out runs/objectives                                  # all: about ten minutes
    python benchmarks/objectives.py --out runs/objectives --only dpo,kto,my.py:my_loss     # some; one of your own
    python benchmarks/objectives.py --out runs/objectives --only dpo --set loss.beta=0.5   # with other settings
    python benchmarks/objectives.py --out runs/see --quick                                 # that it runs

Each objective starts from the same SFT model and reads what it is for, made from the same replies and the same errors of
judgment, with its own defaults. What is finished is in OUT/seed-N/results and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
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
    of_policy,
    of_replies,
    save_figure,
    table,
)

from preftune.data.pairs import labels, preferences
from preftune.data.types import Example, Judgment
from preftune.data.write import write_examples
from preftune.demo.rubric import reward
from preftune.demo.story import LABEL_NOISE, QUICK
from preftune.errors import PreftuneError
from preftune.files import write_atomic
from preftune.label.reward import score_by_reward
from preftune.label.rule import label_by_rule
from preftune.losses.objective import objective
from preftune.losses.records import Confidence, Labels, Margin, Pairs, Ranked, RefPairs, Scores, Tokens
from preftune.registry import LOSSES
from preftune.run import Run
from preftune.yamlfile import parse_word

N_JUDGES = 5
FAMILIES = {RefPairs: "pairs", Ranked: "lists", Labels: "unpaired", Pairs: "no reference", Tokens: "no reference"}
COLUMNS = {
    "objective": "name",
    "data": "data",
    "win rate": "win_rate",
    "true reward": "reward",
    "KL, nats a reply": "kl",
    "tokens a reply": "tokens",
    "ended": "ended",
    "malformed": "malformed",
    "loss, first": "loss_first",
    "last": "loss_last",
    "seconds": "seconds",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is made and measured")
    parser.add_argument("--seed", type=int, default=0, help="of the world, its models and all draws")
    parser.add_argument("--only", help="names of objectives, separated by commas; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of theirs; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    parser.add_argument("--svg", type=Path, help="draw the figure there")
    asked = parser.parse_args()
    try:
        names = _names(asked.only)
        made = make_world(asked.out / f"seed-{asked.seed}", TINY if asked.quick else QUICK, seed=asked.seed)
        files = write_data(made)
        rows = []
        for done, name in enumerate(names, 1):
            rows.append(row_of(made, name, files, asked.set))
            print(f"{done} of {len(names)}: {line(rows[-1])}", flush=True)
    except PreftuneError as error:
        print(error, file=sys.stderr)
        return 1
    start = {"name": "(the SFT model)", **of_replies(made.before)}
    known = [json.loads(file.read_text()) for file in sorted((made.folder / "results").glob("*.json"))]
    write_atomic(made.folder / "results.json", json.dumps([start, *known], indent=1))
    policies = sorted((r for r in rows if "win_rate" in r), key=lambda r: -r["win_rate"][0])
    print("\n" + table([start, *policies], COLUMNS))
    if asked.svg:
        draw(policies, asked.svg)
    return 0


def _names(only: str | None) -> list[str]:
    names = only.split(",") if only else offline()
    for name in names:
        LOSSES.whole_name(name)  # raises, with the nearest
    return names


def offline() -> list[str]:
    """Names of the objectives that learn from responses of the data; those on the policy's own are measured by rlhf.py."""
    return sorted(name for name in LOSSES if not objective(name, {}).needs_rollouts)


# Data


def write_data(made: Made) -> dict[str, Path]:
    """The same replies with the same kind of error, in the forms that objectives read: a file for each."""
    judges = [_judged(made, k) for k in range(N_JUDGES)]
    ways: dict[str, Callable[[], list[Example]]] = {
        "pairs": lambda: preferences(made.collected, judges[0]).examples,
        "thumbs": lambda: labels(made.collected, judges[0]).examples,
        "votes": lambda: preferences(made.collected, [j for judge in judges for j in judge]).examples,
        "ratings": lambda: [_rated(e, made.seed) for e in made.collected],
    }
    files = {name: made.folder / f"{name}.jsonl" for name in ways}
    for name, make in ways.items():
        if not files[name].exists():
            write_examples(files[name], make())
    return files


def _judged(made: Made, judge: int) -> list[Judgment]:
    seed = made.seed + 1000 * judge  # the first judge is the demo's
    return label_by_rule(made.collected, reward, temperature=LABEL_NOISE, seed=seed, annotator=f"judge {judge}")


def _rated(example: Example, seed: int) -> Example:
    """Different replies with noisy ratings. Gumbel noise: by ratings, one beats another as often as in a Bradley-Terry draw."""
    texts = tuple(dict.fromkeys(example.responses))
    rng = random.Random(f"ratings {seed} {example.id}")
    noise = (-LABEL_NOISE * math.log(-math.log(rng.random())) for _ in texts)
    return replace(
        example, responses=texts, scores=tuple(reward(example.prompt, t) + n for t, n in zip(texts, noise, strict=True))
    )


def kind_of_data(name: str) -> str:
    """Which of the files of `write_data` an objective is for."""
    wanted = objective(name, {})
    if wanted.record is Labels:
        return "thumbs"
    if wanted.record is Ranked or (Margin in wanted.units and wanted.record is RefPairs):
        return "ratings"
    return "votes" if Confidence in wanted.units else "pairs"


# Measuring


def row_of(made: Made, name: str, files: dict[str, Path], words: Sequence[str] = ()) -> Row:
    """What is measured of one objective: a policy by its replies, a reward model by its order of replies."""
    settings = {"loss.name": name} | dict(parse_word(word) for word in words)
    by = of_reward_model if objective(name, {}).record is Scores else of_policy
    called = " ".join([name.rpartition(":")[2], *words])
    return measured_once(made, called, settings, files[kind_of_data(name)], by=by)


def of_reward_model(made: Made, run: Run) -> Row:
    """How often the reward model prefers the truly better of two replies to an unseen prompt, and of how many pairs."""
    examples = [replace(e, responses=tuple(t)) for e, t in zip(made.unseen, made.before.answers.texts, strict=True)]
    scores = {(s.example, s.response): s.score for s in score_by_reward(examples, str(run.model))}
    right = []
    for example, truth in zip(examples, made.before.rewards(), strict=True):
        order = sorted(range(len(truth)), key=truth.__getitem__)
        apart = [(worse, better) for worse, better in combinations(order, 2) if truth[worse] < truth[better]]
        right += [scores[example.id, better] > scores[example.id, worse] for worse, better in apart]
    return {"accuracy": sum(right) / len(right), "n_pairs": len(right)}


def line(row: Row) -> str:
    """One line about one objective."""
    if "stopped" in row:
        return f"{row['name']}: stopped: {row['stopped']}"
    if "accuracy" in row:
        return f"{row['name']}: prefers the better of two unseen replies in {row['accuracy']:.1%} of {row['n_pairs']} pairs"
    return f"{row['name']}: win rate {row['win_rate'][0]:.3f}, reward {row['reward'][0]:.2f}, KL {row['kl'][0]:.2f}"


# The figure


CROWD = (2.4, 15.0, 0.77, 0.93)  # least and most KL, least and most win rate: where most objectives are


def draw(rows: list[Row], file: Path) -> None:
    """Win rate against KL, a point for each objective: all of them, and where most are once more, larger."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    everywhere, close = figure.subplots(1, 2, width_ratios=(2, 3))
    crowd = [r for r in rows if CROWD[0] < r["kl"][0] < CROWD[1] and CROWD[2] < r["win_rate"][0] < CROWD[3]]
    for axes, named in ((everywhere, [r for r in rows if r not in crowd]), (close, crowd)):
        _points(axes, rows)
        axes.set_xlabel("KL from the SFT model, nats a reply")
        if axes is close:
            axes.set(xlim=CROWD[:2], ylim=CROWD[2:])
        else:
            axes.set(xscale="log", xlim=(0.03, 1500), ylim=(0, 1), ylabel="win rate over the SFT model")
            axes.axhline(0.5, color=FAINT, linewidth=1, zorder=0)
            axes.legend(frameon=False, labelcolor=INK, loc="lower left")
        dress(axes, INK, FAINT, grid="both")
        figure.draw_without_rendering()  # places the axes, which the names need
        _name_points(axes, named, INK, FAINT)
    save_figure(figure, file, "Win rate against KL of every objective; on the right the crowded part")


def _points(axes: Any, rows: list[Row]) -> None:
    looks = {"pairs": ("o", FIRST), "lists": ("D", FIRST), "unpaired": ("s", SECOND), "no reference": ("^", SECOND)}
    for family, (marker, colour) in looks.items():
        mine = [r for r in rows if FAMILIES[objective(r["settings"]["loss.name"], {}).record] == family]
        x, y = [r["kl"][0] for r in mine], [r["win_rate"][0] for r in mine]
        axes.scatter(x, y, marker=marker, color=colour, label=family, s=22)


def _name_points(axes: Any, rows: list[Row], ink: str, faint: str) -> None:
    """Each name at the nearest place to its point where it covers no other name and no point, with a line if that is far."""
    points = [tuple(axes.transData.transform((r["kl"][0], r["win_rate"][0]))) for r in rows]
    taken = [(x - 4, x + 4, y) for x, y in points]  # left, right, middle, in pixels
    shifts = sorted(((side, up) for side in (1, -1) for up in range(-120, 121, 4)), key=lambda s: abs(s[1]) - s[0])
    for row, (x, y) in sorted(zip(rows, points, strict=True), key=lambda pair: -pair[1][1]):
        width = 7.5 * len(row["name"])
        for side, up in shifts:
            left = x + 8 + abs(up) / 3 if side > 0 else x - 8 - abs(up) / 3 - width
            box = (left, left + width, y + up)
            if all(abs(box[2] - m) > 11 or box[0] > r or box[1] < left_of for left_of, r, m in taken):
                break
        taken.append(box)
        at = axes.transData.inverted().transform((box[0] if side > 0 else box[1], box[2]))
        arrow = {"arrowstyle": "-", "color": faint, "linewidth": 0.7} if abs(up) > 8 else None
        look = {"color": ink, "fontsize": 8, "va": "center", "ha": "left" if side > 0 else "right", "arrowprops": arrow}
        axes.annotate(row["name"], (row["kl"][0], row["win_rate"][0]), at, **look)


if __name__ == "__main__":
    sys.exit(main())
