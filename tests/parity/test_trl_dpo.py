"""The same steps by TRL: same model folder, rows, order and AdamW in float32, so the same losses, metrics and final weights.

Each job runs through `run_job`; TRL then gets the rows in the order that `Plan` gives, and reads them in sequence. Where the
two define something differently, a test says what the difference is.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers_for_tests import CHATML, CORPUS, byte_level
from torch import Tensor

from preftune.config import Config
from preftune.data.read import read_examples
from preftune.data.template import build_trees
from preftune.data.types import Prompt, Tree
from preftune.model.load import load_model, open_renderer, quiet_transformers
from preftune.model.lora import add_lora
from preftune.training.job import run_job
from preftune.training.loop import Step
from preftune.training.plan import Plan

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # warnings of the peer are not ours to mend

Row = dict[str, Any]
N_STEPS, PER_STEP, SEED, LR = 20, 4, 3, 1e-3
MAX_LENGTH = 512
COMPARED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm")


# The inputs: generated rows, a tiny model


@dataclass(frozen=True)
class Case:
    """One comparison: what is trained, on what, and how TRL is set up."""

    chat: bool
    lora: bool = False
    beta: float = 0.1
    accumulate: int = 1
    precompute: bool = False


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


def make_model(folder: Path) -> Path:
    """A tiny random Llama with grouped heads, and a tokenizer that was trained here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    special = ("<|im_start|>", "<|im_end|>", "<|end|>")
    tokenizer = byte_level(special=special, eos="<|im_end|>", pad="<|end|>", template=CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
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
            "model": str(model), "data": str(data), "out": str(folder / "run"), "cache": str(folder / "cache"), "device": "cpu",
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


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import datasets

    quiet_transformers()
    logging.getLogger("trl").setLevel(logging.ERROR)
    datasets.disable_progress_bar()
    yield
    datasets.enable_progress_bar()


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


def learned(trainer: Any, start: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {name.replace(".default", ""): t for name, t in trainer.model.state_dict().items()}
    return {name: weights[name] for name in start}


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
