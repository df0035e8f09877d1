"""Faults to plant in trainings of the demo's world, at several strengths, and healthy trainings to leave alone.

    >>> FAULTS["lr_low"].finding, list(FAULTS["lr_low"].strengths)
    ('no_effect', ['1e-4', '1e-5', '1e-6'])

A fault is settings, data or a judge that differ from the healthy training's. `DATA` makes the preferences that it reads.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preftune.data.pairs import preferences
from preftune.data.types import Example, Pair, Prompt, Response
from preftune.demo.rubric import plain_text, reward, words
from preftune.demo.story import LABEL_NOISE
from preftune.label.rule import Rule, label_by_rule

Settings = Mapping[str, Any]
HEALTHY: Settings = {
    "loss.name": "dpo", "loss.beta": 0.1, "optim.lr": 1e-3, "optim.beta2": 0.95, "optim.schedule": "cosine",
    "batch.pairs_per_step": 8, "epochs": 2.0,
}  # fmt: skip


@dataclass(frozen=True)
class Plant:
    """One strength of a fault."""

    settings: Settings = field(default_factory=dict)
    data: str = "fair"  # of DATA
    judge: str = "fair"  # of JUDGES
    start: str = "sft"  # the model that is trained

    @property
    def training(self) -> str:
        """A name that trainings share which differ in nothing but the judge."""
        changed = [f"{name.rpartition('.')[2]}={value}" for name, value in self.settings.items()]
        return re.sub(r"[^\w.=+-]+", "_", "+".join([self.data, *changed, *([self.start] if self.start != "sft" else [])]))


@dataclass(frozen=True)
class Fault:
    """A fault at several strengths, weakest first; `named` is the one that the documentation names."""

    finding: str  # that should be a warning or an error
    strengths: Mapping[str, Plant]
    named: str
    cause: str = ""  # that its numbers should give as "cause"


def _labelled(examples: Sequence[Example], rule: Rule, seed: int, *, temperature: float = LABEL_NOISE) -> list[Example]:
    return preferences(examples, label_by_rule(examples, rule, temperature=temperature, seed=seed)).examples


def fair(examples: Sequence[Example], seed: int) -> list[Example]:
    """Bradley-Terry draws by the true reward: about one in ten is wrong."""
    return _labelled(examples, reward, seed)


def flipped(share: float) -> Callable[[Sequence[Example], int], list[Example]]:
    """A share of the preferences the other way round."""

    def make(examples: Sequence[Example], seed: int) -> list[Example]:
        rng = random.Random(seed)

        def maybe(pair: Pair) -> Pair:
            return pair._replace(winner=pair.loser, loser=pair.winner) if rng.random() < share else pair

        return [replace(e, pairs=tuple(maybe(pair) for pair in e.pairs)) for e in fair(examples, seed)]

    return make


def longer(per_word: float) -> Callable[[Sequence[Example], int], list[Example]]:
    """Judges who add `per_word` to the reward for each word, and infinity sees nothing else."""

    def length(prompt: Prompt, response: Response) -> float:
        return float(len(words(plain_text(response))))

    def seen(prompt: Prompt, response: Response) -> float:
        return reward(prompt, response) + per_word * length(prompt, response)

    def make(examples: Sequence[Example], seed: int) -> list[Example]:
        return (
            _labelled(examples, length, seed, temperature=0.0) if per_word == float("inf") else _labelled(examples, seen, seed)
        )

    return make


def few(n: int) -> Callable[[Sequence[Example], int], list[Example]]:
    """The preferences of `n` prompts."""
    return lambda examples, seed: fair(examples, seed)[:n]


def scrambled(share: float, *, losers: bool = False) -> Callable[[Sequence[Example], int], list[Example]]:
    """A share of the responses (or all that lose, and one pair a prompt) with their words in any order."""

    def make(examples: Sequence[Example], seed: int) -> list[Example]:
        rng = random.Random(seed)

        def mixed(text: Response) -> str:
            parts = words(plain_text(text))
            rng.shuffle(parts)
            return " ".join(parts)

        if losers:
            chosen = [(e, e.responses[e.pairs[0].winner]) for e in fair(examples, seed) if e.pairs]
            return [replace(e, responses=(good, mixed(good)), pairs=(Pair(0, 1),), labels=()) for e, good in chosen]
        return [
            replace(e, responses=tuple(mixed(r) if rng.random() < share else r for r in e.responses))
            for e in fair(examples, seed)
        ]

    return make


DATA: dict[str, Callable[[Sequence[Example], int], list[Example]]] = {
    "fair": fair,
    "flipped-25": flipped(0.25),
    "flipped-40": flipped(0.4),
    "flipped-50": flipped(0.5),
    "swapped-75": flipped(0.75),
    "swapped-100": flipped(1.0),
    "longer-0.2": longer(0.2),
    "longer-0.5": longer(0.5),
    "longer": longer(float("inf")),
    "few-10": few(10),
    "few-20": few(20),
    "few-60": few(60),
    "scrambled-20": scrambled(0.2),
    "scrambled-50": scrambled(0.5),
    "scrambled-100": scrambled(1.0),
    "scrambled-losers": scrambled(1.0, losers=True),
}  # fmt: skip
"""Name -> preferences made of prompts with the reference's replies, and a seed."""


def _with(**settings: Any) -> Plant:
    return Plant({name.replace("__", "."): value for name, value in settings.items()})


FAULTS: dict[str, Fault] = {
    "lr_low": Fault(
        "no_effect", {lr: _with(optim__lr=float(lr), epochs=1.0) for lr in ("1e-4", "1e-5", "1e-6")}, "1e-5", "learning_rate"
    ),
    "beta_large": Fault("no_effect", {f"{b:g}": _with(loss__beta=b, optim__lr=3e-4) for b in (10.0, 100.0)}, "100", "beta"),
    "lost_in_bf16": Fault(
        "no_effect",
        {lr: _with(precision="pure_bf16", optim__lr=float(lr), epochs=1.0) for lr in ("1e-4", "1e-5", "1e-6")},
        "1e-5",
        "bf16",
    ),
    "lora_weak": Fault(
        "no_effect", {f"{a:g}": _with(lora__r=4, lora__alpha=a, epochs=1.0) for a in (4.0, 0.4, 0.1)}, "0.1", "lora"
    ),
    "few_steps": Fault("no_effect", {str(n): _with(steps=n) for n in (4, 2, 1)}, "1", "steps"),
    "warm_up": Fault(
        "no_effect", {n: _with(optim__warmup=float(n), epochs=1.0) for n in ("10000", "100000")}, "100000", "warm_up"
    ),
    "lr_high": Fault("drifted", {f"{lr:g}": _with(optim__lr=lr) for lr in (3e-3, 1e-2, 3e-2)}, "0.01"),
    "beta_small": Fault(
        "drifted", {f"{b:g}": _with(loss__beta=b, optim__lr=3e-3) for b in (0.03, 0.01)}, "0.01"
    ),
    "few_prompts": Fault(
        "overfitting",
        {f"{n} × {e}": replace(_with(epochs=float(e)), data=f"few-{n}") for n, e in ((60, 15), (20, 20))},
        "20 × 20",
    ),
    "random_labels": Fault("preferences", {f"{n} %": Plant(data=f"flipped-{n}") for n in (25, 40, 50)}, "50 %"),
    "swapped": Fault("preferences", {f"{n} %": Plant(data=f"swapped-{n}") for n in (75, 100)}, "100 %", "swapped"),
    "longer_wins": Fault("length_bias", {n: Plant(data=n) for n in ("longer-0.2", "longer-0.5", "longer")}, "longer"),
    "displaced": Fault("displacement", {f"{b:g}": _with(loss__beta=b, optim__lr=3e-3) for b in (0.03, 0.01)}, "0.01"),
    "wrong_base": Fault("reference_mismatch", {"base": Plant(start="base")}, "base"),
    "off_policy": Fault("off_policy", {f"{n} %": Plant(data=f"scrambled-{n}") for n in (20, 50, 100)}, "100 %"),
    "forgot": Fault("forgetting", {f"{lr:g}": _with(optim__lr=lr) for lr in (3e-3, 1e-2, 3e-2)}, "0.01"),
    "hollow": Fault("no_wins", {n: Plant(data=n) for n in ("longer-0.5", "longer")}, "longer"),
    "judge_first": Fault("judge", {f"{p:.0%}": Plant(judge=f"first-{p:g}") for p in (0.25, 0.5, 0.9)}, "50%"),
    "judge_dumb": Fault("judge", {f"{p:.0%}": Plant(judge=f"mute-{p:g}") for p in (0.1, 0.3)}, "30%"),
    "no_clipping": Fault(
        "spikes", {f"{lr:g}": _with(optim__lr=lr, optim__clip=0.0, optim__warmup=0.0) for lr in (1e-2, 3e-2, 1e-1)}, "0.1"
    ),
    "trivial": Fault("trivial_pairs", {"all": Plant(data="scrambled-losers")}, "all"),
    "cut": Fault("truncated", {str(n): _with(batch__max_length=n) for n in (48, 32)}, "32"),
}  # fmt: skip
"""Name -> fault."""

SOUND: dict[str, Plant] = {
    "as it is": Plant(),
    "beta .05": _with(loss__beta=0.05),
    "beta .2": _with(loss__beta=0.2),
    "beta .3, 1 epoch": _with(loss__beta=0.3, epochs=1.0),
    "beta .5": _with(loss__beta=0.5),
    "beta 1": _with(loss__beta=1.0),
    "lr 5e-4": _with(optim__lr=5e-4),
    "lr 3e-4, 3 epochs": _with(optim__lr=3e-4, epochs=3.0),
    "linear, warm-up .2": _with(optim__schedule="linear", optim__warmup=0.2),
    "32 a step": _with(batch__pairs_per_step=32, epochs=3.0),
    "LoRA 8": _with(lora__r=8, optim__lr=2e-3),
    "LoRA 16 of attention": _with(lora__r=16, lora__targets=["q_proj", "k_proj", "v_proj", "o_proj"], optim__lr=2e-3),
    "bf16": _with(precision="bf16"),
    "ipo": _with(loss__name="ipo", loss__beta=0.1),
    "kto": _with(loss__name="kto", loss__beta=0.1),
    "orpo": Plant({"loss.name": "orpo", "optim.lr": 1e-3}),
    "simpo": Plant({"loss.name": "simpo", "optim.lr": 5e-4}),
    "smoothing .1": _with(loss__label_smoothing=0.1),
    "10 % of the labels flipped": Plant(data="flipped-10"),
    "half the prompts": Plant({"epochs": 3.0}, data="half"),
}
"""Name -> a training in which nothing is wrong."""
DATA |= {"flipped-10": flipped(0.1), "half": lambda examples, seed: fair(examples, seed)[: len(examples) // 2]}
