"""A reward model from preferences: trained, saved so that others read it, resumed, and refused where it makes no sense."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import World, cli, read_jsonl, same_weights, weights

from preftune.data.read import read_examples
from preftune.data.template import build_trees
from preftune.engine.reward import RewardModel
from preftune.errors import ModelError
from preftune.model.load import load_model, open_renderer
from preftune.model.reward import load_reward_model
from preftune.run import Run

SETTINGS = {"loss__name": "bradley_terry", "steps": 20, "optim__lr": 3e-3, "eval__every": 10, "checkpoint__every": 10}
LORA = {"lora__r": 4, "lora__merge": True}


def train(world: World, out: Path, **more: Any) -> Run:
    left = cli("train", *world.words(out, **SETTINGS | more))
    assert left.code == 0, left.err
    return Run.open(out)


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("rewards")
    return {"full": train(world, folder / "full"), "lora": train(world, folder / "lora", **LORA)}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_learns_who_wins(runs: dict[str, Run], kind: str) -> None:
    before, *_, after = runs[kind].metrics(split="eval")
    assert after["rewards/accuracies"] == 1.0 and after["loss"] < 0.3 < before["loss"]
    assert not runs[kind].samples(), "it writes no answers"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_others_read_it(world: World, runs: dict[str, Run], kind: str) -> None:
    """transformers' class, padded to the longest, gives the scores that were trained: pad and end of a response differ."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = runs[kind]
    folder = run.model if kind == "full" else run.merged
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = open_renderer(folder)
    trees = build_trees(read_examples(world.file("held_out")).examples, renderer)
    rows = [np.concatenate([t.prompt, b.ids]).tolist() for t in trees for b in t.branches]
    assert all(tokenizer.pad_token_id == theirs.config.pad_token_id != row[-1] for row in rows)
    ours = RewardModel.choose(load_reward_model(run.model), trees)
    with torch.no_grad():
        expected = theirs(**tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")).logits[:, 0]
        torch.testing.assert_close(ours(ours.pack(trees)), expected, rtol=1e-5, atol=1e-5)


def test_a_step_is_the_same_however_it_is_cut(world: World, tmp_path: Path) -> None:
    """One example a micro-batch, or all eight: the same losses and weights to rounding."""
    one, all_ = (train(world, tmp_path / str(n), steps=3, batch__tokens_per_microbatch=n) for n in (1, 8192))
    for a, b in zip(one.metrics(split="train"), all_.metrics(split="train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    mine, theirs = (weights(run.model) for run in (one, all_))
    assert max(float((mine[n] - theirs[n]).abs().max()) for n in mine) < 1e-6


def test_it_goes_on_bit_for_bit(world: World, runs: dict[str, Run], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(runs["full"].path, out)
    for gone in (out / "model", out / "checkpoints" / "step-000020"):
        shutil.rmtree(gone)
    words = world.words(out, **SETTINGS)
    assert cli("train", *words, "--resume").code == 0
    assert same_weights(out / "model", runs["full"].model)


def test_a_reward_model_is_trained_further(world: World, runs: dict[str, Run], tmp_path: Path) -> None:
    """From the head that it has, not from a new one."""
    run = train(world, tmp_path / "more", model=str(runs["full"].path))
    assert run.metrics(split="eval")[0]["rewards/accuracies"] == 1.0


def test_the_wrong_kind_of_model_is_said(world: World, runs: dict[str, Run], tmp_path: Path) -> None:
    for kind in runs:
        with pytest.raises(ModelError, match="a reward model, which scores responses"):
            load_model(runs[kind].model)
    with pytest.raises(ModelError, match="a language model, not a reward model"):
        load_reward_model(world.base)
    left = cli("train", *world.words(tmp_path / "x", model=str(runs["full"].path)))
    assert left.code == 2 and "a reward model" in left.err and "Traceback" not in left.err


def test_scores_and_log_probs_do_not_mix(world: World, tmp_path: Path) -> None:
    words = [w for w in world.words(tmp_path / "x") if not w.startswith("loss")]
    left = cli("train", *words, "loss=[{name: bradley_terry}, {name: sft}]")
    assert left.code == 2 and "train it by itself" in left.err, left.err


def test_judgments_by_it_agree_with_its_scores(world: World, runs: dict[str, Run], tmp_path: Path) -> None:
    """What is trained is what `preftune judge --by reward` reads."""
    out = tmp_path / "judgments.jsonl"
    model, data = str(runs["full"].path), str(world.file("held_out"))
    left = cli("judge", model, "--by", "reward", "--data", data, "--out", str(out))
    assert left.code == 0, left.err
    assert [row["verdict"] for row in read_jsonl(out)] == ["i"] * 10
