"""A run on its own replies, killed while it writes them, learns from them or keeps them, ends with the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from crashes_for_tests import killed_at, signalled_at
from worlds import World, cli, command, finish, same_weights, spawn, timeless

import preftune
from preftune.run import Run
from preftune.training import rollouts

# two iterations of four updates; checkpoints after 3 and 6 fall between two updates of one
SETTINGS: dict[str, Any] = {
    "loss": "ppo", "rollout__prompts": 8, "rollout__max_tokens": 6, "rollout__epochs": 2, "rollout__kl_target": 1.0,
    "reward__normalize": True, "batch__pairs_per_step": 4, "steps": 8, "checkpoint__every": 3, "eval__every": 4,
    "optim__lr": 3e-3, "critic__lr": 1e-3, "samples__n": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rule") / "rule.py"
    file.write_text("def e(prompt, response):\n    return -float(response.count('e'))\n")
    return f"{file}:e"


@pytest.fixture(scope="module")
def uninterrupted(world: World, rule: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("whole") / "run"
    return preftune.train(world.settings(out, **SETTINGS, reward__rule=rule), quiet=True)


def assert_same(run: Run, whole: Run) -> None:
    assert same_weights(run.model, whole.model)
    last = [max(r.checkpoints.iterdir()) for r in (run, whole)]
    for name in ("critic-weights.safetensors", "critic-optimizer.safetensors", "state.json"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    assert list(timeless(run.metrics())) == list(timeless(whole.metrics()))
    assert run.samples() == whole.samples()
    assert {p.name for p in run.path.iterdir()} == {p.name for p in whole.path.iterdir()}


MOMENTS = [
    ("replies on disk", 1),
    ("update", 7),  # between two updates of the first iteration, after a checkpoint
    ("replies", 4),  # those of the second iteration: on from a checkpoint within the first
    ("update", 15),  # in the second, after a checkpoint within it
]


@pytest.mark.parametrize(("moment", "nth"), MOMENTS)
def test_killed_and_resumed_is_bit_identical(
    world: World, rule: str, uninterrupted: Run, tmp_path: Path, moment: str, nth: int
) -> None:
    out, log = tmp_path / "run", str(tmp_path / "log")
    words = ["train", *world.words(out, **SETTINGS, reward__rule=rule)]
    assert finish(spawn(killed_at, words, log, moment, nth)) == [-signal.SIGKILL], Path(log).read_text()
    left = cli(*words, "--resume")
    assert left.code == 0, left.err
    assert_same(Run.open(out), uninterrupted)


def test_stopped_within_an_iteration_and_killed_in_the_next(
    world: World, rule: str, uninterrupted: Run, tmp_path: Path
) -> None:
    """The folder's replies are then of a later iteration than the checkpoint's, which has its own."""
    out, log = tmp_path / "run", str(tmp_path / "log")
    words = ["train", *world.words(out, **SETTINGS, reward__rule=rule), "--resume"]
    assert finish(spawn(signalled_at, words, log, "update", 3, signal.SIGTERM)) == [75], Path(log).read_text()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000002"]
    assert finish(spawn(killed_at, words, log, "update", 5)) == [-signal.SIGKILL]
    assert finish(spawn(command, words, log)) == [0]
    run = Run.open(out)
    assert same_weights(run.model, uninterrupted.model)
    assert list(timeless(run.metrics())) == list(timeless(uninterrupted.metrics()))


@pytest.mark.parametrize("damaged", [False, True])
def test_replies_that_are_on_disk_are_not_written_again(
    world: World, rule: str, uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    out, log = tmp_path / "run", str(tmp_path / "log")
    words = ["train", *world.words(out, **SETTINGS, reward__rule=rule)]
    assert finish(spawn(killed_at, words, log, "update", 4)) == [-signal.SIGKILL]  # before there is any checkpoint
    kept, wrote = out / "rollouts.safetensors", []
    assert kept.exists() and not list((out / "checkpoints").glob("step-*"))
    if damaged:
        kept.write_bytes(os.urandom(200))
    write = rollouts.Rollouts._write

    def watched(self: Any, iteration: int, writer: Any) -> Any:
        wrote.append(iteration)
        return write(self, iteration, writer)

    monkeypatch.setattr(rollouts.Rollouts, "_write", watched)
    assert cli(*words, "--resume").code == 0
    assert wrote == ([0, 1] if damaged else [1])
    assert_same(Run.open(out), uninterrupted)
