"""Scores against the definition: a plain transformers forward of prompt + response, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import World, read_jsonl, write_jsonl

import preftune
from preftune.errors import ConfigError, DataError


def by_definition(folder: Path, prompt: list[int], response: list[int]) -> float:
    """log π(response | prompt) by the model's own forward."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)
    with torch.no_grad():
        logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(response))


def test_log_probs_are_the_models_own(world: World, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows = list(preftune.score(world.base, world.file("held_out"), reference=world.other, beta=0.3))
    tokenizer = AutoTokenizer.from_pretrained(str(world.base))
    for row, (pair, name) in zip(
        rows[:4], [(p, n) for p in read_jsonl(world.file("held_out"))[:2] for n in ("chosen", "rejected")], strict=True
    ):
        prompt, response = (tokenizer(pair[n], add_special_tokens=False)["input_ids"] for n in ("prompt", name))
        response.append(tokenizer.eos_token_id)
        ours, theirs = (by_definition(folder, prompt, response) for folder in (world.base, world.other))
        assert row["n_tokens"] == len(response)
        assert row["logp_sum"] == pytest.approx(ours, abs=1e-3) and row["ref_logp_sum"] == pytest.approx(theirs, abs=1e-3)
        assert row["reward"] == pytest.approx(0.3 * (ours - theirs), abs=1e-3)


def test_order_ids_and_ragged_responses(world: World, tmp_path: Path) -> None:
    rows = [{"id": f"row-{i}", "prompt": f"What {i}?", "responses": ["a b c"] + [f"answer {k} " * (k + 1) for k in range(i)]}
            for i in range(6)]  # fmt: skip
    for i, row in enumerate(rows):
        row["scores"] = list(range(i + 1))
    scored = list(preftune.score(world.base, write_jsonl(tmp_path / "ragged.jsonl", rows), tokens_per_microbatch=64))
    assert [(r["id"], r["response"]) for r in scored] == [(f"row-{i}", k) for i in range(6) for k in range(i + 1)]
    again = list(preftune.score(world.base, tmp_path / "ragged.jsonl", tokens_per_microbatch=100_000))
    assert np.allclose([r["logp_sum"] for r in scored], [r["logp_sum"] for r in again], atol=1e-3)


def test_rows_from_memory(world: World) -> None:
    rows = list(preftune.score(world.base, [{"prompt": "Hello?", "completion": "Hello."}]))
    assert len(rows) == 1 and rows[0]["logp_sum"] < 0


def test_a_run_brings_its_reference_beta_and_limit(world: World, tmp_path: Path) -> None:
    run = preftune.train(world.settings(tmp_path / "run", loss__beta=0.4, steps=2, batch__max_length=64), quiet=True)
    rows = list(preftune.score(run.path, world.file("held_out")))
    plain = list(preftune.score(run.model, world.file("held_out"), reference=world.base, beta=0.4, max_length=64))
    assert rows == plain and any(r["reward"] for r in rows)
    other = list(preftune.score(run.path, world.file("held_out"), beta=0.8))
    assert all(b["reward"] == pytest.approx(2 * a["reward"]) for a, b in zip(rows, other, strict=True))


def test_a_run_is_scored_under_the_limit_that_it_was_trained_with(world: World, tmp_path: Path) -> None:
    """Without batch.max_length a run cuts at 1024 tokens although the context is longer: its scores must too."""
    from worlds import save_model

    base = save_model(tmp_path / "base", positions=4096)
    long = read_jsonl(world.file("pairs"))[:6]
    long[0]["prompt"] = "kettle lamp " * 800
    data = write_jsonl(tmp_path / "long.jsonl", long)
    held_out = write_jsonl(tmp_path / "held.jsonl", long[:1])
    settings = world.settings(tmp_path / "run", model=str(base), data=str(data), eval__data=str(held_out), steps=1)
    run = preftune.train(settings, quiet=True)
    chosen, rejected = preftune.score(run.path, held_out)
    last = run.metrics(split="eval")[-1]
    assert chosen["logp_sum"] == pytest.approx(last["logps/chosen"], abs=1e-3)
    assert rejected["logp_sum"] == pytest.approx(last["logps/rejected"], abs=1e-3)


def test_what_is_dropped_is_said(world: World, tmp_path: Path) -> None:
    long = " ".join(["kettle"] * 200)
    rows = [{"prompt": "Hello?", "chosen": f"{long} a", "rejected": f"{long} b"}, *read_jsonl(world.file("held_out"))[:1]]
    notes: list[str] = []
    scored = list(preftune.score(world.base, rows, max_length=64, on_note=notes.append))
    assert len(scored) == 2
    assert any("1 examples dropped" in note for note in notes)


def test_progress_counts_both_models(world: World) -> None:
    seen: list[Any] = []
    list(preftune.score(world.base, world.file("held_out"), reference=world.other, on_progress=lambda *at: seen.append(at)))
    assert seen[-1] == (20, 20) and [s[0] for s in seen] == sorted(s[0] for s in seen)


def test_mistakes(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beta"):
        list(preftune.score(world.base, world.file("pairs"), reference=world.other, beta=0.0))
    with pytest.raises(ConfigError, match="beta: .*give a reference"):
        list(preftune.score(world.base, world.file("pairs"), beta=0.5))
    with pytest.raises(DataError):
        list(preftune.score(world.base, tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="longer than the model's context"):
        list(preftune.score(world.base, world.file("pairs"), max_length=9999))
