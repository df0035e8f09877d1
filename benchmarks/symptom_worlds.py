"""Runs of the demo's world with what an evaluation measured of them, for `symptom_rates.py`: made once, kept, read again.

The reference has a second skill that no preference speaks of (it takes up a customer's words), so that there is a text on which
forgetting shows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from symptom_faults import DATA, HEALTHY, Plant

from preftune.config import Config
from preftune.data.read import read_examples
from preftune.data.template import build_trees
from preftune.data.types import Example, Message, Tree
from preftune.data.write import write_examples
from preftune.demo.rubric import reward
from preftune.demo.story import Size, collect, make_base, sft_settings, write_dialogues
from preftune.demo.words import ITEMS, OPENINGS, PROBLEMS, SUBJECTS, TAILS
from preftune.demo.world import World
from preftune.engine.policy import Policy
from preftune.engine.score import logps_of_all
from preftune.errors import PreftuneError
from preftune.evaluate.estimate import Estimate, mean
from preftune.evaluate.kl import divergence, trees_of
from preftune.evaluate.record import Evaluation, Perplexity, Wins
from preftune.evaluate.samples import Drawn, draw, record
from preftune.generate import Sampling
from preftune.model.load import load_model, open_renderer, quiet_transformers
from preftune.run import Run
from preftune.training.job import run_job

NEAR = (0.9, 1 / 0.9)
"""Ratio of lengths that are called about equal."""


@dataclass(frozen=True)
class Scale:
    """How much of everything a benchmark makes."""

    size: Size = Size(demonstrations=4000, sft_epochs=3, prompts=160, replies=3, max_tokens=64)
    n_takes_up: int = 1000  # demonstrations of the second skill
    n_references: int = 1  # made by SFT; seeds take them in turn
    held_out: float = 0.2  # share of the prompts
    eval_prompts: int = 150  # about items that no preference speaks of
    n_text: int = 80


def takes_up(n: int, seed: int) -> list[Example]:
    """The second skill: the customer names a thing, and the answer is what a customer says of it."""
    rng, found = random.Random(f"takes-up-{seed}"), {}
    while len(found) < n:
        item, fix = rng.choice(ITEMS), rng.choice(tuple(PROBLEMS))
        subject = rng.choice(SUBJECTS).format(item=item)
        said = f"{rng.choice(OPENINGS)} {subject} {rng.choice(PROBLEMS[fix])}. {rng.choice(TAILS)}".strip()
        found[said] = Example(said, (Message("user", f"{subject}."),), (said,))
    return list(found.values())


class Reference:
    """The model that all trainings of some seeds start from, made once by SFT."""

    def __init__(self, folder: Path, seed: int, scale: Scale) -> None:
        quiet_transformers()
        self.base = folder / "base"
        if not (folder / "sft" / "model").exists():
            make_base(World(seed), self.base, seed=seed)
            (folder / "demonstrations.jsonl").unlink(missing_ok=True)
            shown = [*World(seed).demonstrations(scale.size.demonstrations), *takes_up(scale.n_takes_up, seed)]
            random.Random(seed).shuffle(shown)
            write_dialogues(folder / "demonstrations.jsonl", shown)
            _train(sft_settings(self.base, folder, scale.size, seed) | {"samples.n": 0, "eval.every": 0})
        self.sft = Run.open(folder / "sft")


class Bench:
    """One seed's preferences of every kind, and its runs by name, in a folder."""

    def __init__(self, folder: Path, seed: int, scale: Scale) -> None:
        self.folder, self.seed, self.scale = folder / f"seed-{seed}", seed, scale
        number = seed % scale.n_references
        self.reference = Reference(folder / f"reference-{number}", number, scale)
        self.sft = self.reference.sft
        self.folder.mkdir(parents=True, exist_ok=True)
        self.world = World(seed)

    def data(self, name: str) -> dict[str, str]:
        """Settings that name preferences of a kind, and those that are held out."""
        collected = self.folder / "collected.jsonl"
        if not collected.exists():
            write_examples(collected, collect(self.sft, self.world, self.scale.size, self.seed))
        files = {"data": self.folder / f"{name}.jsonl", "eval.data": self.folder / f"{name}-held-out.jsonl"}
        if not all(file.exists() for file in files.values()):
            examples = list(read_examples(str(collected)).examples)
            n = round(len(examples) * (1 - self.scale.held_out))
            write_examples(files["data"], DATA[name](examples[:n], self.seed))
            kind = "fair" if name.partition("-")[0] in ("few", "half", "swapped") else name
            write_examples(files["eval.data"], DATA[kind](examples[n:], self.seed))
        return {key: str(file) for key, file in files.items()}

    def made(self, plant: Plant) -> bool:
        """Whether this was trained and measured, or training gave up."""
        run = Run(self.folder / "runs" / plant.training)
        return run.evaluation_file.exists() or any(event["kind"] == "failed" for event in run.events())

    def run(self, plant: Plant) -> Run:
        """A training with this plant, and its evaluation by a fair judge; what is there already is not made again."""
        run = Run(self.folder / "runs" / plant.training)
        if not run.metrics_file.exists():
            start = {"sft": self.sft.model, "base": self.reference.base}[plant.start]
            other = {"reference": str(self.sft.model)} if plant.start != "sft" else {}
            named = plant.settings.get("loss.name", "dpo")
            usual = {k: v for k, v in HEALTHY.items() if not k.startswith("loss.") or named == "dpo"}
            fixed = {"model": str(start), "out": str(run.path), "seed": self.seed, "cache": str(self.folder / "cache"),
                     "samples.n": 0, "checkpoint.every": 0, "eval.every": 16}  # fmt: skip
            _train({**usual, **fixed, **self.data(plant.data), **plant.settings, **other})
        if run.model.exists() and not run.evaluation_file.exists():
            run.write_json(run.evaluation_file, self.evaluation(run).as_dict())
        return run

    @cached_property
    def unseen(self) -> list[Example]:
        """Prompts about items that no preference speaks of."""
        return self.world.prompts(self.scale.eval_prompts, split="eval")

    @cached_property
    def _text(self) -> list[Tree]:
        return build_trees(takes_up(self.scale.n_text, self.seed + 1000), open_renderer(self.sft.model))

    @cached_property
    def _before(self) -> tuple[Drawn, list[np.ndarray]]:
        return self._answers(self.sft, self.seed + 1), self._logps(self.sft)

    def _sampling(self, seed: int) -> Sampling:
        return Sampling(max_tokens=self.scale.size.max_tokens, seed=seed)

    def _answers(self, run: Run, seed: int) -> Drawn:
        renderer = open_renderer(run.model)
        ids = [renderer.prompt_ids(e.prompt) for e in self.unseen]
        return draw(load_model(run.model), renderer, ids, self._sampling(seed))

    def _logps(self, run: Run) -> list[np.ndarray]:
        policy = Policy.choose(load_model(run.model), self._text)
        return [np.concatenate(per).astype(np.float64) for per in logps_of_all(policy, self._text, 8192)]

    def evaluation(self, run: Run) -> Evaluation:
        """What is measured of a run, as an evaluation leaves it; the judge is the true reward."""
        (before, before_logps), seed = self._before, self.seed + 2
        ours = self._answers(run, seed)
        trees = trees_of(ours.prompts, ours.replies)
        policy, frozen = (Policy.choose(load_model(r.model), trees) for r in (run, self.sft))
        kl = divergence(policy, frozen, trees)
        return Evaluation(
            policy=str(run.path), against=str(self.sft.model), beta=None, objective=None, at="", verdict="", worked=None,
            samples=record(ours, before, kl, self._sampling(seed), beta=None),
            wins=(judged(self.unseen, ours, before),),
            perplexity=(_perplexity(self._logps(run), before_logps),),
        )  # fmt: skip


def judged(prompts: Sequence[Example], ours: Drawn, theirs: Drawn) -> Wins:
    """The win rate of the replies by the true reward."""
    gains = [reward(e.prompt, a[0]) - reward(e.prompt, b[0]) for e, a, b in zip(prompts, ours.texts, theirs.texts, strict=True)]
    ratios = [len(a[0].ids) / max(1, len(b[0].ids)) for a, b in zip(ours.replies, theirs.replies, strict=True)]
    verdicts = [0.5 if gain == 0 else float(gain > 0) for gain in gains]
    near = [[v] for v, r in zip(verdicts, ratios, strict=True) if NEAR[0] <= r <= NEAR[1]]
    certain = mean([[1.0] for _ in verdicts])
    return Wins(
        judge="the true reward", against="the reference", n_total=len(verdicts), n_unscored=0,
        n_wins=verdicts.count(1.0), n_wins_base=verdicts.count(0.0), n_draws=verdicts.count(0.5),
        win_rate=mean([[100 * v] for v in verdicts]), standard_error=None, length_controlled=None,
        tokens=None, tokens_base=None, order_consistency=certain, first_wins=mean([[0.5] for _ in verdicts]),
        by_length=((*NEAR, mean(near)),) if len(near) > 1 else (),
    )  # fmt: skip


def judged_badly(fair: Wins, judge: str, seed: int) -> Wins:
    """Another judge of the same answers: "first-P" takes the first shown with probability P, "mute-P" says nothing."""
    kind, _, strength = judge.partition("-")
    rng, share = random.Random(seed), float(strength)
    truth = [1.0] * fair.n_wins + [0.0] * fair.n_wins_base + [0.5] * fair.n_draws
    if kind == "mute":
        kept = [v for v in truth if rng.random() >= share]
        both = [(v, v) for v in kept]
    else:
        both = [tuple(s if rng.random() < share else v for s in (1.0, 0.0)) for v in truth]  # shown first, then second
        kept = [sum(pair) / 2 for pair in both]
    return replace(
        fair, judge=judge, n_total=len(kept), n_unscored=len(truth) - len(kept), n_wins=sum(v > 0.5 for v in kept),
        n_wins_base=sum(v < 0.5 for v in kept), n_draws=kept.count(0.5), win_rate=mean([[100 * v] for v in kept]),
        order_consistency=mean([[float(a == b)] for a, b in both]), first_wins=mean([[(a + 1 - b) / 2] for a, b in both]),
    )  # fmt: skip


def _perplexity(logps: list[np.ndarray], before: list[np.ndarray]) -> Perplexity:
    change: Estimate = mean([list(b - a) for a, b in zip(logps, before, strict=True)])
    n = sum(map(len, logps))
    policy, reference = (float(np.exp(-np.concatenate(x).mean())) for x in (logps, before))
    return Perplexity("customers' words", n, policy, reference, change)


def _train(settings: dict[str, Any]) -> float:
    """A run to its end, or to where it gives up; seconds of CPU."""
    started = time.process_time()
    try:
        for _ in run_job(Config.of(settings), resume=False):
            pass
    except PreftuneError as error:
        print(f"   {settings['out']}: {error}", flush=True)
    return time.process_time() - started
