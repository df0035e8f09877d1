"""The implicit reward kept in a folder judges as `preftune score` scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds import World, cli, read_jsonl

import preftune
from preftune.data.read import read_examples
from preftune.errors import ModelError
from preftune.label.implicit import read_implicit
from preftune.label.reward import score_by_reward


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reward") / "r"
    left = cli("score", "--model", world.base, "--reference", world.other, "--beta", 0.3, "--reward", "--out", out)
    assert left.code == 0 and left.out.strip() == str(out / "reward.json"), left.err
    return out


def test_scores_are_those_of_score(world: World, folder: Path) -> None:
    examples = read_examples(str(world.file("held_out"))).examples
    expected = [r["reward"] for r in preftune.score(world.base, world.file("held_out"), reference=world.other, beta=0.3)]
    found = score_by_reward(examples, str(folder))
    assert [s.score for s in found] == pytest.approx(expected, abs=1e-4)
    assert [(s.example, s.response) for s in found] == [(e.id, k) for e in examples for k in range(2)]
    assert {s.annotator for s in score_by_reward(examples[:1], str(folder / "reward.json"))} == {"reward:r"}


def test_it_judges(world: World, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "judgments.jsonl"
    left = cli("judge", folder, "--by", "reward", "--data", world.file("held_out"), "--out", out)
    assert left.code == 0, left.err
    rewards = [r["reward"] for r in preftune.score(world.base, world.file("held_out"), reference=world.other, beta=0.3)]
    assert [row["verdict"] for row in read_jsonl(out)] == [
        "i" if a > b else "j" for a, b in zip(rewards[::2], rewards[1::2], strict=True)
    ]


def test_a_run_brings_its_reference_and_beta(world: World, tmp_path: Path) -> None:
    run = preftune.train(world.settings(tmp_path / "run", loss__beta=0.4, steps=1, samples__n=0), quiet=True)
    assert cli("score", "--model", run.path, "--reward", "--out", tmp_path / "r").code == 0
    found = read_implicit(str(tmp_path / "r"))
    assert found is not None and (found.policy, found.reference, found.beta) == (str(run.model), str(world.base), 0.4)


def test_mistakes(world: World, tmp_path: Path) -> None:
    for words, why in (
        (["--reward", "--out", tmp_path / "r"], "--reference"),
        (["--reward", "--reference", world.other], "--out"),
        (["--reward", "--reference", world.other, "--out", tmp_path / "r", "--beta", "-1"], "--beta"),
        ([], "--data"),
    ):
        left = cli("score", "--model", world.base, *words)
        assert left.code == 2 and why in left.err
    assert read_implicit(str(world.base)) is None
    for content in (
        "{",
        json.dumps({"kind": "other"}),
        json.dumps({"kind": "implicit", "policy": "a", "reference": "b", "beta": 0}),
    ):
        (tmp_path / "reward.json").write_text(content)
        with pytest.raises(ModelError, match="reward.json: not a reward"):
            read_implicit(str(tmp_path))
