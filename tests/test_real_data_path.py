"""SFT, DPO and scoring on the first rows of each real preference file, with a tiny model: counts, ln 2, finite figures."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from tokenizers_for_tests import CHATML, byte_level

from preftune.config import Config
from preftune.data.read import read_examples
from preftune.data.split import split_by_prompt
from preftune.run import Run
from preftune.scoring import score
from preftune.training.job import run_job

HELD_OUT, SEED = 0.2, 0
SETS = {  # file, first and last row, how many of them are bad
    "hh": ("hh_rlhf/harmless-base.test.subset.jsonl.gz", 110, 170, 1),  # an empty reply is among them
    "dpo_en_demo": ("dpo_en_demo/dpo_en_demo.subset.json.gz", 0, 60, 0),
    "alpaca_eval": ("alpaca_eval/annotations/claude-2.1_concise.json.gz", 0, 60, 0),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "base"
    special = ("<|im_start|>", "<|im_end|>", "<|end|>")
    tokenizer = byte_level(special=special, eos="<|im_end|>", pad="<|end|>", template=CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def some_rows(file: Path, first: int, last: int, folder: Path) -> Path:
    text = gzip.decompress(file.read_bytes()).decode("utf-8")
    short = folder / file.name.removesuffix(".gz")
    lines = text.split("\n")[first:last] if short.suffix == ".jsonl" else [json.dumps(json.loads(text)[first:last])]
    short.write_text("\n".join(lines), encoding="utf-8")
    return short


def run(out: Path, **settings: Any) -> Run:
    for _ in run_job(Config.of(settings | {"out": str(out), "device": "cpu", "seed": SEED})):
        pass
    return Run(out)


@pytest.mark.parametrize("name", SETS)
def test_from_a_real_file_to_scores(name: str, base: Path, shared_data: Path, tmp_path: Path) -> None:
    file, first, last, n_bad = SETS[name]
    data, aside = some_rows(shared_data / file, first, last, tmp_path), tmp_path / "aside.jsonl"
    shared: dict[str, Any] = {
        "data": str(data), "quarantine": str(aside), "eval.fraction": HELD_OUT, "eval.every": 3, "batch.max_length": 192,
        "batch.pairs_per_step": 8, "steps": 3, "cache": str(tmp_path / "cache"), "samples.n": 1, "samples.max_tokens": 4,
        "optim.warmup": 0,
    }  # fmt: skip
    sft = run(tmp_path / "sft", **shared, **{"model": str(base), "loss.name": "sft", "optim.lr": 1e-3})
    full = run(tmp_path / "full", **shared, **{"model": str(sft.path), "optim.lr": 1e-3})
    lora = run(tmp_path / "lora", **shared, **{"model": str(sft.path), "optim.lr": 1e-2, "lora.r": 4})
    for one in (sft, full, lora):
        check_counts(one, last - first, n_bad)
        check_metrics(one)
        assert (one.model / "model.safetensors").exists() or (one.model / "adapter_model.safetensors").exists()
        assert {row["when"] for row in one.samples()} == {"before", "after"}
    assert sft.metrics(split="eval")[-1]["loss"] < sft.metrics(split="eval")[0]["loss"]
    for one in (full, lora):
        assert one.metrics(split="train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        check_scores(one, data, aside)


def check_counts(run: Run, n_rows: int, n_bad: int) -> None:
    counts = run.read_json(run.data_file)
    assert counts["rows_read"] == n_rows
    assert counts["quarantined"] == n_bad
    assert counts["used"] + counts["dropped"] + counts["quarantined"] == n_rows
    assert counts["used"] == counts["train_examples"] + counts["eval_examples"]
    assert counts["used"] > 0.9 * n_rows


def check_metrics(run: Run) -> None:
    rows = run.metrics()
    assert [r["step"] for r in rows if r["split"] == "train"] == [0, 1, 2]
    assert [r["step"] for r in rows if r["split"] == "eval"] == [0, 3]
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row


def check_scores(run: Run, data: Path, aside: Path) -> None:
    """A row per response, and the rewards of the held-out pairs are those that the run measured at its end."""
    rewards: dict[str, dict[int, float]] = {}
    for row in score(run.path, str(data), quarantine=aside, device="cpu"):
        assert math.isfinite(row["logp_sum"]) and row["n_tokens"] > 0
        rewards.setdefault(row["id"], {})[row["response"]] = row["reward"]
    examples = read_examples(data, quarantine=aside).examples
    _, held_out = split_by_prompt(examples, HELD_OUT, SEED)
    pairs = [(rewards[e.id], p) for e in held_out if e.id in rewards for p in e.pairs if p.confidence > 0.5]
    last = run.metrics(split="eval")[-1]
    assert mean(r[p.winner] - r[p.loser] for r, p in pairs) == pytest.approx(last["rewards/margins"], rel=1e-3, abs=1e-4)
    assert mean(r[p.winner] > r[p.loser] for r, p in pairs) == pytest.approx(last["rewards/accuracies"], abs=1e-9)
