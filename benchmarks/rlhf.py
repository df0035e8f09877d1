"""RLHF on the demo's world, where the true reward is known: what PPO, RLOO and GRPO gain with it, and with a learned one.

    python benchmarks/rlhf.py --out runs/rlhf --seed 0                       # PPO with the true reward
    python benchmarks/rlhf.py --out runs/rlhf --seed 0 --reward learned      # with a reward model of noisy comparisons
    python benchmarks/rlhf.py --out runs/rlhf --seed 0 --loss rloo grpo --set rollout.beta=0.5

The reference is the demo's SFT model, made once for each seed. Replies to complaints about items that no training prompt
mentions are graded by the true reward. Intervals are 95 %, by prompt; a gain is over the replies to the same prompt before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo_world import TINY, Made, Row, make_world, of_policy, train
from demo_world import table as as_table

from preftune.config import Config
from preftune.data.pairs import preferences
from preftune.data.write import write_examples
from preftune.demo.rubric import reward
from preftune.demo.story import LABEL_NOISE, QUICK, measure
from preftune.errors import PreftuneError
from preftune.evaluate.estimate import mean
from preftune.files import make_folder, write_atomic
from preftune.label.rule import label_by_rule
from preftune.run import Run
from preftune.training.job import run_job
from preftune.yamlfile import parse_word

USUAL = {
    "rollout.max_tokens": 72, "rollout.prompts": 64, "rollout.epochs": 2, "rollout.beta": 0.3, "epochs": 3.0, "optim.lr": 1e-3,
    "optim.beta2": 0.95, "optim.schedule": "linear", "batch.pairs_per_step": 16, "checkpoint.every": 0, "eval.fraction": 0.0,
}  # fmt: skip
OF_LOSS = {"ppo": {"critic.lr": 1e-3}, "grpo": {"loss.beta": 0.0}}  # one tie to the reference, the same for all
LEARNED = {"loss.name": "bradley_terry", "epochs": 1.0, "optim.lr": 1e-3}
COLUMNS = {
    "run": "name",
    "true reward": "reward",
    "gain over SFT": "gain",
    "score of its reward": "score",
    "KL, nats a reply": "kl",
    "win rate": "win_rate",
    "tokens": "tokens",
    "malformed": "malformed",
    "updates": "steps",
    "CPU seconds": "seconds",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is made and measured")
    parser.add_argument("--seed", type=int, default=0, help="of the world, its models and all draws")
    parser.add_argument("--loss", nargs="+", default=["ppo"], help="ppo, rloo, grpo")
    parser.add_argument("--reward", choices=("true", "learned"), default="true")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of theirs; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    asked = parser.parse_args()
    try:
        made = make_world(asked.out / f"seed-{asked.seed}", TINY if asked.quick else QUICK, seed=asked.seed)
        for loss in asked.loss:
            row = row_of(made, loss, asked.reward, asked.set, quick=asked.quick)
            print(f"{row['name']}: true reward {row['reward'][0]:.2f}, gain {row['gain'][0]:.2f}, KL {row['kl'][0]:.2f}")
    except PreftuneError as error:
        print(error, file=sys.stderr)
        return 1
    known = [json.loads(file.read_text()) for file in sorted(asked.out.glob("seed-*/rlhf/*.json"))]
    write_atomic(asked.out / "rlhf.json", json.dumps(known, indent=1))
    print(as_table([row | {"name": f"{row['name']}, seed {row['seed']}"} for row in known], COLUMNS))
    return 0


def row_of(made: Made, loss: str, kind: str, words: Sequence[str], *, quick: bool = False) -> Row:
    """What is measured of one run; read from its file where it was measured before."""
    name = " ".join([loss, kind, *words])
    file = made.folder / "rlhf" / f"{name}.json"
    make_folder(file.parent)
    if file.exists():
        row: Row = json.loads(file.read_text())
        return row
    settings = {"loss.name": loss, **USUAL, **OF_LOSS.get(loss, {}), **_reward(made, kind)}
    settings |= {"steps": 2, "rollout.max_tokens": made.size.max_tokens} if quick else {}
    settings |= dict(parse_word(word) for word in words)
    out, started = made.folder / "runs" / name.replace("/", "-"), time.process_time()
    about = {"model": str(made.sft.model), "data": str(_prompts(made)), "out": str(out), "seed": made.seed, "samples.n": 0}
    for _ in run_job(Config.of(about | settings), resume=True):
        pass
    seconds = time.process_time() - started
    run = Run.open(out)
    begins = [r for r in run.metrics(split="train") if "objective/scores" in r]
    row = {
        "name": name,
        "seed": made.seed,
        "seconds": seconds,
        "steps": len(run.metrics(split="train")),
        **of_policy(made, run),
    }
    row |= {"gain": _gain(made, run), "score": begins[-1]["objective/scores"], "curve": _curve(begins)}
    write_atomic(file, json.dumps(row, indent=1))
    return row


def _curve(begins: Sequence[Row]) -> list[Row]:
    names = ("step", "objective/scores", "objective/kl", "lengths/mean", "val/explained_variance")
    return [{name: row[name] for name in names if name in row} for row in begins]


def _gain(made: Made, run: Run) -> list[float]:
    """True reward of a prompt's replies less that of the SFT model's to the same prompt: [value, low, high]."""
    after = measure(run, made.unseen, made.size, made.seed + 1).rewards()
    found = mean([[sum(a) / len(a) - sum(b) / len(b)] for a, b in zip(after, made.before.rewards(), strict=True)])
    return [found.value, found.low, found.high]


def _prompts(made: Made) -> Path:
    """The train prompts: those whose replies the preferences compare."""
    file = made.folder / "prompts.jsonl"
    if not file.exists():
        write_examples(file, made.collected)
    return file


def _reward(made: Made, kind: str) -> Row:
    """The rubric itself, or a model that learnt it from the demo's noisy comparisons."""
    if kind == "true":
        return {"reward.rule": f"{Path(__file__).with_name('true_reward.py')}:true_reward"}
    judgments = label_by_rule(made.collected, reward, temperature=LABEL_NOISE, seed=made.seed, annotator="rule:rubric+noise")
    pairs = made.folder / "pairs.jsonl"
    if not pairs.exists():
        write_examples(pairs, preferences(made.collected, judgments).examples)
    if not (made.folder / "runs" / "reward" / "model").exists():
        train(made, "reward", LEARNED, pairs)
    return {"reward.model": str(made.folder / "runs" / "reward")}


if __name__ == "__main__":
    sys.exit(main())
