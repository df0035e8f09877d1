"""The same steps by TRL: same model folder, rows, order and AdamW in float32, so the same losses, metrics and final weights.

Each job runs through `run_job`, and TRL over the same rows in the same order (`trl_for_tests`). Where the two define something
differently, a test says what the difference is.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from trl_for_tests import (
    MAX_LENGTH,
    N_STEPS,
    PER_STEP,
    SEED,
    Ours,
    Row,
    check_ids,
    check_steps,
    check_weights,
    generated,
    hh_rows,
    in_order,
    learned,
    make_model,
    our_trees,
    run_ours,
    same_settings,
    saved_weights,
    without_line_break,
)

from preftune.config import Config
from preftune.data.read import read_examples
from preftune.data.template import build_trees
from preftune.model.load import load_model, open_renderer
from preftune.model.lora import add_lora
from preftune.training.plan import Plan

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # warnings of the peer are not ours to mend


@dataclass(frozen=True)
class Case:
    """One comparison: what is trained, on what, and how TRL is set up."""

    chat: bool
    lora: bool = False
    beta: float = 0.1
    accumulate: int = 1
    precompute: bool = False


def dpo_trainer(model: Path, rows: list[Row], folder: Path, case: Case) -> Any:
    """TRL's trainer over `rows` in their order."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    settings = same_settings(folder, accumulate=case.accumulate, n_steps=-(-len(rows) // PER_STEP))
    settings |= {"beta": case.beta, "precompute_ref_log_probs": case.precompute}
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_config = adapters if case.lora else None
    return DPOTrainer(
        model=load_model(model) if peft_config else str(model),
        args=DPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=peft_config,
    )


def sft_trainer(model: Path, rows: list[Row], folder: Path, *, accumulate: int) -> Any:
    """TRL's trainer over `rows` in their order; what it scores is the completion."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = same_settings(folder, accumulate=accumulate, n_steps=len(rows) // PER_STEP)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return SFTTrainer(
        model=str(model), args=SFTConfig(**settings), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def check_learned(ours: Ours) -> None:
    """The run that is compared goes somewhere: it starts at ln 2, with margins of 0, and leaves both."""
    losses = np.array([s.loss for s in ours.steps])
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert np.abs(losses - math.log(2)).max() > 0.05
    assert max(abs(s.metrics["rewards/margins"]) for s in ours.steps) > 0.2


# Comparisons


@pytest.mark.parametrize(
    "case",
    [
        Case(chat=False, accumulate=2, precompute=True),
        Case(chat=True, beta=0.3),
        Case(chat=True, lora=True, accumulate=4),
        Case(chat=False, lora=True, precompute=True),
    ],
    ids=["full-text", "full-chat", "lora-chat", "lora-text"],
)
def test_generated_rows(case: Case, tmp_path: Path) -> None:
    compare(case, generated(32, chat=case.chat), tmp_path)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_hh_rows(lora: bool, shared_data: Path, tmp_path: Path) -> None:
    compare(Case(chat=True, lora=lora, accumulate=2), hh_rows(shared_data, tmp_path, 40), tmp_path)


def compare(case: Case, rows: list[Row], folder: Path) -> None:
    model = make_model(folder / "base")
    settings: Row = {"loss.beta": case.beta, "batch.tokens_per_microbatch": 300}
    if case.lora:
        settings |= {"lora.r": 8, "lora.alpha": 16}
    ours = run_ours(model, rows, folder, **settings)
    check_learned(ours)
    ordered = in_order(rows, N_STEPS)
    trainer = dpo_trainer(model, ordered, folder, case)
    trees = our_trees(model, ordered, folder)
    if case.chat:
        without_line_break(trainer)
    check_ids(trainer, trees)
    start = same_start(trainer, ours.config) if case.lora else saved_weights(model)
    trainer.train()
    check_steps(ours, trainer)
    check_accuracies(ours, trainer, case)
    check_weights(ours.weights, learned(trainer, start), start)


def check_accuracies(ours: Ours, trainer: Any, case: Case) -> None:
    """Before the first update every pair is a tie: one half for us, nothing for TRL, which counts what is strictly more."""
    mine = [s.metrics["rewards/accuracies"] for s in ours.steps]
    theirs = [row["rewards/accuracies"] for row in trainer.state.log_history if "loss" in row]
    assert mine[1:] == theirs[1:]
    assert mine[0] == 0.5
    if not case.precompute:  # another batch size rounds otherwise, and then TRL's first figure is that of a coin
        assert theirs[0] == 0.0


def same_start(trainer: Any, config: Config) -> dict[str, Tensor]:
    """Gives TRL's adapters the weights that the job's adapters began with."""
    assert config.model is not None
    adapted = add_lora(load_model(Path(config.model)), config.lora, base=config.model, seed=config.seed)
    start = {name: t.clone() for name, t in adapted.state_dict().items() if "lora_" in name}
    missing = trainer.model.load_state_dict(start, strict=False)
    assert start and not missing.unexpected_keys
    return {name.replace(".default", ""): t for name, t in start.items()}


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_sft(chat: bool, tmp_path: Path) -> None:
    """The loss of a step is the mean over all completion tokens of the step, however it is split: both say so."""
    n_steps = 10
    model = make_model(tmp_path / "base")
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in generated(20, chat=chat)]
    ours = run_ours(model, rows, tmp_path, **{"loss.name": "sft", "steps": n_steps, "batch.tokens_per_microbatch": 100})
    ordered = in_order(rows, n_steps)
    trainer = sft_trainer(model, ordered, tmp_path, accumulate=2)
    trees = our_trees(model, ordered, tmp_path)
    if chat:
        without_line_break(trainer)
    for row, tree in zip(trainer.train_dataset, trees, strict=True):
        (branch,) = tree.branches
        assert row["input_ids"] == [*tree.prompt.tolist(), *branch.ids.tolist()]
        assert row["labels"] == [-100] * len(tree.prompt) + branch.ids.tolist()
        assert branch.scored.all()
    start = saved_weights(model)
    trainer.train()
    check_steps(ours, trainer, ("loss", "grad_norm"), n_steps=n_steps)
    assert ours.steps[-1].loss < ours.steps[0].loss - 0.1
    check_weights(ours.weights, learned(trainer, start), start)


def test_where_the_two_differ(tmp_path: Path) -> None:
    """Known differences, so that a change on either side is seen: tokens across the boundary, and what is cut of a long row."""
    model = make_model(tmp_path / "base")
    merging = {"prompt": "Please answer: ferr", "chosen": "y and harbour", "rejected": "ies"}
    long = {"prompt": "ferry " * 600 + "harbour:", "chosen": " The last ferry", "rejected": " ten"}
    rows = [merging, long] * 2
    trainer = dpo_trainer(model, rows, tmp_path, Case(chat=False))
    theirs = trainer.train_dataset
    renderer = open_renderer(model, max_length=MAX_LENGTH)
    data = tmp_path / "differ.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (merging, long)))
    first, second = build_trees(read_examples(data).examples, renderer)

    asked = renderer.prompt_ids(merging["prompt"]).tolist()
    assert first.prompt.tolist() == asked, "ours is the prompt that inference feeds, and the reply is tokenized apart from it"
    assert renderer.report.boundary_merges > 0
    assert asked[: len(theirs[0]["prompt_ids"])] == theirs[0]["prompt_ids"] != asked, "TRL's prompt ends where tokens differ"

    assert renderer.report.prompts_truncated == 1
    assert renderer.report.responses_truncated == 0
    assert all(second.branches[k].ids[-1] == renderer.end_of_text for k in (0, 1)), "ours cuts the oldest part of the prompt"
    assert len(second.prompt) + max(len(b.ids) for b in second.branches) <= MAX_LENGTH
    assert len(theirs) == 2, "TRL drops a row whose prompt alone is too long, and else cuts the end of the reply"


def test_a_step_that_is_not_full(tmp_path: Path) -> None:
    """The last step of an epoch of 7: the mean over its 3 pairs for us, whatever the split; for TRL it depends on the split."""
    model, rows = make_model(tmp_path / "base"), generated(7, chat=False)
    ours = run_ours(model, rows, tmp_path, **{"loss.beta": 0.5, "steps": 2, "batch.tokens_per_microbatch": 100})
    plan = Plan.of(len(rows), pairs_per_step=PER_STEP, epochs=1.0, steps=2, seed=SEED)
    ordered = [rows[i] for step in range(2) for i in plan.examples(step)]
    last = []
    for accumulate in (1, 2):
        trainer = dpo_trainer(model, ordered, tmp_path, Case(chat=False, beta=0.5, accumulate=accumulate))
        trainer.train()
        last.append([row["loss"] for row in trainer.state.log_history if "loss" in row][1])
    whole, halves = last
    assert ours.steps[1].loss == pytest.approx(whole, rel=1e-4)
    assert halves != pytest.approx(whole, rel=1e-2), "TRL takes the mean of 2 pairs and of 1, then the mean of the two"
