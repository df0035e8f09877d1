"""What the comparisons with TRL share: rows, a tiny model, the job's side of a run, how two runs are held against each other.

A job runs through `run_job`; TRL then gets the rows in the order that `Plan` gives, and reads them in sequence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers_for_tests import CHATML, CORPUS, byte_level
from torch import Tensor

from preftune.config import Config
from preftune.data.read import read_examples
from preftune.data.template import build_trees
from preftune.data.types import Prompt, Tree
from preftune.model.load import open_renderer
from preftune.training.job import run_job
from preftune.training.loop import Step
from preftune.training.plan import Plan

Row = dict[str, Any]
N_STEPS, PER_STEP, SEED, LR = 20, 4, 3, 1e-3
MAX_LENGTH = 512
COMPARED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm")


# The inputs: generated and real rows, a tiny model


def generated(n: int, *, chat: bool, seed: int = 0) -> list[Row]:
    """Preferences made of a few words, one to three turns long."""
    draw = np.random.Generator(np.random.Philox(key=seed))
    words = " ".join(CORPUS[:4]).split()

    def text(most: int) -> str:
        return " ".join(draw.choice(words, size=int(draw.integers(2, most))))

    rows: list[Row] = []
    for i in range(n):
        chosen, rejected = f"{text(16)} {i}", f"{text(24)} no"
        if chat:
            turns = [text(10) for _ in range(2 * int(draw.integers(0, 2)) + 1)]
            prompt = [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(turns)]
            if i % 5 == 0:
                prompt = [{"role": "system", "content": text(5)}, *prompt]
            rows.append({"prompt": prompt, "chosen": reply(chosen), "rejected": reply(rejected)})
        else:  # the space makes the boundary that of two tokens, whoever tokenizes
            rows.append({"prompt": f"{text(16)}:", "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return rows


def reply(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def hh_rows(shared_data: Path, folder: Path, n: int) -> list[Row]:
    """The first `n` real dialogues that fit MAX_LENGTH by far, as messages."""
    file = shared_data / "hh_rlhf" / "harmless-base.test.subset.jsonl.gz"
    examples = read_examples(file, quarantine=folder / "aside.jsonl").examples
    rows = [
        {"prompt": as_messages(e.prompt), "chosen": reply(str(e.responses[0])), "rejected": reply(str(e.responses[1]))}
        for e in examples
    ]
    return [r for r in rows if len(json.dumps(r)) < 700][:n]


def as_messages(prompt: Prompt) -> list[Row]:
    assert not isinstance(prompt, str)
    return [{"role": m.role, "content": m.content} for m in prompt]


def make_model(folder: Path, *, layers: int = 2) -> Path:
    """A tiny random Llama with grouped heads, and a tokenizer that was trained here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    special = ("<|im_start|>", "<|im_end|>", "<|end|>")
    tokenizer = byte_level(special=special, eos="<|im_end|>", pad="<|end|>", template=CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.08, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Our side


@dataclass
class Ours:
    """What the job yielded, and what it left."""

    config: Config
    steps: list[Step] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def run_ours(model: Path, rows: list[Row], folder: Path, **settings: Any) -> Ours:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.of(
        {
            "model": str(model), "data": str(data), "out": str(folder / "run"), "device": "cpu",
            "cache": str(model.parent / "cache"),  # the reference is scored once for all that train from it
            "seed": SEED, "steps": N_STEPS, "precision": "fp32",
            "batch.pairs_per_step": PER_STEP, "batch.max_length": MAX_LENGTH,
            "optim.lr": LR, "optim.schedule": "constant", "optim.warmup": 0, "optim.clip": 1.0, "optim.weight_decay": 0.01,
            "eval.every": 0, "samples.n": 0, "checkpoint.every": 0,
        }
        | settings
    )  # fmt: skip
    ours = Ours(config)
    for event in run_job(config):
        if isinstance(event, Step):
            ours.steps.append(event)
    ours.weights = saved_weights(folder / "run" / "model")
    return ours


def saved_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def our_trees(model: Path, rows: list[Row], folder: Path) -> list[Tree]:
    """The rows as the job tokenizes them, one tree a row."""
    data = folder / "for-trees.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = open_renderer(model, max_length=MAX_LENGTH)
    trees = build_trees(read_examples(data).examples, renderer)
    assert len(trees) == len(rows)
    assert not (renderer.report.prompts_truncated or renderer.report.responses_truncated or renderer.report.boundary_merges)
    return trees


def in_order(rows: list[Row], n_steps: int) -> list[Row]:
    """The rows in the order in which the job's plan reads them, epoch after epoch."""
    assert len(rows) % PER_STEP == 0, "an epoch of whole steps: TRL's last step of an epoch would differ"
    plan = Plan.of(len(rows), pairs_per_step=PER_STEP, epochs=1.0, steps=n_steps, seed=SEED)
    return [rows[i] for step in range(n_steps) for i in plan.examples(step)]


# TRL's side


def same_settings(folder: Path, *, accumulate: int, n_steps: int) -> Row:
    """Arguments of both of TRL's trainers that say what the job's settings say; the rest are TRL's defaults."""
    return {
        "output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "seed": SEED,
        "report_to": "none", "disable_tqdm": True,
        "max_steps": n_steps, "per_device_train_batch_size": PER_STEP // accumulate, "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": LR, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.01, "max_grad_norm": 1.0,
        "gradient_checkpointing": False, "max_length": MAX_LENGTH,
    }  # fmt: skip


# How they are compared


def without_line_break(trainer: Any) -> None:
    """Takes away the line break that ChatML writes behind the last turn and TRL scores; the rest must be our ids."""
    (end,) = trainer.processing_class.encode("\n")
    sides = {"chosen_ids", "rejected_ids", "input_ids", "labels"}
    columns = [c for c in trainer.train_dataset.column_names if c in sides]

    def ours(row: Row) -> Row:
        assert all(row[c][-1] == end for c in columns)
        return {c: row[c][:-1] for c in columns}

    trainer.train_dataset = trainer.train_dataset.map(ours)


def check_ids(trainer: Any, trees: Sequence[Tree]) -> None:
    """TRL's columns hold the ids of our trees, and score the same of them."""
    for row, tree in zip(trainer.train_dataset, trees, strict=True):
        assert row["prompt_ids"] == tree.prompt.tolist()
        assert row["chosen_ids"] == tree.branches[tree.pairs[0].winner].ids.tolist()
        assert row["rejected_ids"] == tree.branches[tree.pairs[0].loser].ids.tolist()
        assert all(branch.scored.all() for branch in tree.branches)


def check_steps(ours: Ours, trainer: Any, names: Sequence[str] = COMPARED, *, n_steps: int = N_STEPS) -> None:
    """The same loss to 1e-4 of itself at each step, and the same metrics to 5e-4 of the largest."""
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(ours.steps) == len(logged) == n_steps
    for name in names:
        mine, theirs = np.array([s.metrics[name] for s in ours.steps]), np.array([row[name] for row in logged])
        scale = theirs if name == "loss" else np.abs(theirs).max()
        off = np.abs(mine - theirs) / scale
        assert off.max() <= (1e-4 if name == "loss" else 5e-4), (
            f"{name}: step {off.argmax()} differs by {off.max():.2e}: {mine} {theirs}"
        )
    assert [s.lr for s in ours.steps] == [row["learning_rate"] for row in logged]


def check_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """‖ours − theirs‖ <= 1e-3 · ‖update‖ over all weights that learn."""
    assert ours.keys() == theirs.keys() == start.keys()
    off, moved = (
        math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in a))
        for a, b in ((ours, theirs), (theirs, start))
    )
    assert moved > 0
    assert off <= 1e-3 * moved, f"‖difference‖ / ‖update‖ = {off / moved:.2e}"


def learned(trainer: Any, start: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {name.replace(".default", ""): t for name, t in trainer.model.state_dict().items()}
    return {name: weights[name] for name in start}
