"""Exact resume: killed at any moment, stopped by a signal, or damaged on disk, a run ends with the same bits."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from crashes_for_tests import killed_at, signalled_at
from worlds import World, cli, command, finish, read_jsonl, same_weights, spawn, timeless, weights, write_jsonl

import preftune
from preftune.errors import ConfigError, DataError, ModelError
from preftune.run import Run

RESUMABLE = {"steps": 10, "checkpoint__every": 3, "eval__every": 2, "eval__keep": "best", "optim__lr": 3e-3}
LORA = {"lora__r": 2, "lora__dropout": 0.3, "lora__merge": True}


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The runs that nothing stopped: all weights, and LoRA with dropout; they also fill the reference cache."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {}
    for name, more in (("full", {}), ("lora", LORA)):
        words = world.words(folder / name, **RESUMABLE, **more)
        assert finish(spawn(command, ["train", *words], str(folder / f"{name}.log"))) == [0]
        runs[name] = Run.open(folder / name)
    return runs


def assert_same(run: Run, whole: Run) -> None:
    """The same weights bit for bit, the same metrics, the same samples, and no litter."""
    assert same_weights(run.model, whole.model)
    assert list(timeless(run.metrics())) == list(timeless(whole.metrics()))
    assert run.samples() == whole.samples()
    assert {p.name for p in run.path.iterdir()} == {p.name for p in whole.path.iterdir()}
    assert {p.name for p in run.checkpoints.iterdir()} == {p.name for p in whole.checkpoints.iterdir()}
    if whole.merged.exists():
        assert same_weights(run.merged, whole.merged)


MOMENTS = [
    ("update", 1), ("update", 8), ("evaluation", 4), ("samples", 1), ("weights of a checkpoint", 6),
    ("state and manifest of a checkpoint", 3), ("state and manifest of a checkpoint", 4), ("rename of a checkpoint", 2),
    ("removal of a checkpoint", 1), ("rename of a checkpoint", 4), ("samples", 2), ("saving the model", 1),
    ("model into its place", 1), ("report", 1),
]  # fmt: skip


@pytest.mark.parametrize(("moment", "nth"), MOMENTS)
def test_killed_and_resumed_is_bit_identical(
    world: World, uninterrupted: dict[str, Run], tmp_path: Path, moment: str, nth: int
) -> None:
    out, log = tmp_path / "run", str(tmp_path / "log")
    words = ["train", *world.words(out, **RESUMABLE)]
    assert finish(spawn(killed_at, words, log, moment, nth)) == [-signal.SIGKILL], Path(log).read_text()
    _nothing_partial_is_believed(out)
    left = cli("train", *words[1:], "--resume")
    assert left.code == 0, left.err
    assert_same(Run.open(out), uninterrupted["full"])


def _nothing_partial_is_believed(out: Path) -> None:
    from preftune.training.checkpoint import newest

    found, problems = newest(out / "checkpoints")
    assert not problems  # a checkpoint under its own name is whole
    assert found is None or found.step in (3, 6, 9, 10)
    model = out / "model"
    assert not model.exists() or (model / "model.safetensors").exists()


@pytest.mark.parametrize(("moment", "nth"), [("update", 5), ("saving the model", 2)])
def test_lora_with_dropout_resumes_bit_identical_too(
    world: World, uninterrupted: dict[str, Run], tmp_path: Path, moment: str, nth: int
) -> None:
    out, log = tmp_path / "run", str(tmp_path / "log")
    words = ["train", *world.words(out, **RESUMABLE, **LORA)]
    assert finish(spawn(killed_at, words, log, moment, nth)) == [-signal.SIGKILL]
    assert cli(*words, "--resume").code == 0
    assert_same(Run.open(out), uninterrupted["lora"])


def test_killed_twice_and_while_the_reference_is_scored(world: World, uninterrupted: dict[str, Run], tmp_path: Path) -> None:
    out, log = tmp_path / "run", str(tmp_path / "log")
    words = ["train", *world.words(out, **RESUMABLE, cache=str(tmp_path / "cache")), "--resume"]  # --resume starts it too
    for moment, nth in (("reference log-probs", 1), ("update", 5), ("update", 1), ("evaluation", 4)):
        assert finish(spawn(killed_at, words, log, moment, nth)) == [-signal.SIGKILL]
    assert finish(spawn(command, words, log)) == [0]
    assert_same(Run.open(out), uninterrupted["full"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(world: World, uninterrupted: dict[str, Run], tmp_path: Path, number: int) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    words = ["train", *world.words(out, **RESUMABLE)]
    assert finish(spawn(signalled_at, words, str(log), "update", 5, number)) == [75]
    last = log.read_text().strip().splitlines()[-1]
    assert last == f"preftune: stopped after 5 of 10 steps; all is saved. Go on with: preftune train --resume out={out}"
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000003", "step-000005"]
    assert cli("train", "--resume", f"out={out}").code == 0  # the command that it said
    assert_same(Run.open(out), uninterrupted["full"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_leaves_nothing(world: World, tmp_path: Path, number: int) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    words = ["train", *world.words(out, cache=str(tmp_path / "cache"))]
    code = finish(spawn(signalled_at, words, str(log), "reference log-probs", 1, number))
    assert code == [75]
    assert "Traceback" not in log.read_text() and "interrupted before the first step" in log.read_text().splitlines()[-1]
    assert not out.exists()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(world: World, uninterrupted: dict[str, Run], tmp_path: Path) -> None:
    out, log = tmp_path / "run", str(tmp_path / "log")
    words = ["train", *world.words(out, **RESUMABLE)]
    assert finish(spawn(killed_at, words, log, "update", 8)) == [-signal.SIGKILL]
    file = out / "checkpoints" / "step-000006" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    left = cli(*words, "--resume")
    assert left.code == 0
    assert "step-000006: not used: optimizer.safetensors is not what was written (sha256 differs)" in left.err
    assert "going on after step 3" in left.err
    assert_same(Run.open(out), uninterrupted["full"])


@pytest.fixture
def stopped(world: World, tmp_path: Path) -> list[str]:
    """Words of a run that was stopped after some steps."""
    words = ["train", *world.words(tmp_path / "run", **RESUMABLE)]
    assert finish(spawn(killed_at, words, str(tmp_path / "log"), "update", 5)) == [-signal.SIGKILL]
    return words


def test_other_settings_are_refused_with_the_difference(world: World, stopped: list[str], tmp_path: Path) -> None:
    left = cli(*stopped, "loss.beta=0.7", "seed=3", "--resume")
    assert left.code == 2
    for said in ("cannot go on with other settings", "loss.beta: 0.1 in the run, 0.7 now", "seed: 0 in the run, 3 now"):
        assert said in left.err
    assert left.err.count(" in the run, ") == 2
    assert cli(*stopped, "batch.tokens_per_microbatch=512", "samples.max_tokens=4", "--resume").code == 0


def test_changed_data_are_refused(world: World, tmp_path: Path) -> None:
    rows = read_jsonl(world.file("pairs"))
    data, held_out = write_jsonl(tmp_path / "data.jsonl", rows), write_jsonl(tmp_path / "held.jsonl", rows[:5])
    settings = world.settings(tmp_path / "run", **RESUMABLE, data=str(data), eval__data=str(held_out))
    words = ["train", *(f"{k}={v}" for k, v in settings.items())]
    assert finish(spawn(killed_at, words, str(tmp_path / "log"), "update", 5)) == [-signal.SIGKILL]
    for file in (data, held_out):
        kept = file.read_text()
        write_jsonl(file, [{**rows[0], "chosen": "Something else."}, *read_jsonl(file)[1:]])
        with pytest.raises(DataError, match="the data are not those that this run began with"):
            preftune.train(settings, resume=True, quiet=True)
        file.write_text(kept)
    preftune.train(settings, resume=True, quiet=True)


def test_a_changed_model_is_refused(world: World, tmp_path: Path) -> None:
    base = shutil.copytree(world.base, tmp_path / "base")
    settings = world.settings(tmp_path / "run", **RESUMABLE, model=str(base), lora__r=2)
    words = ["train", *(f"{k}={v}" for k, v in settings.items())]
    assert finish(spawn(killed_at, words, str(tmp_path / "log"), "update", 5)) == [-signal.SIGKILL]
    shutil.copy(world.other / "model.safetensors", base)
    with pytest.raises(ModelError, match="the model is not the one that this run began with"):
        preftune.train(settings, resume=True, quiet=True)


def test_adapters_do_not_go_on_over_another_base(world: World, tmp_path: Path) -> None:
    """Also where no reference tells the models apart."""
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    more = {"model": str(base), "loss.name": "sft", "lora__r": 2, "data": str(world.file("completions"))}
    words = ["train", *world.words(tmp_path / "run", **RESUMABLE, **more)]
    assert finish(spawn(killed_at, words, str(tmp_path / "log"), "update", 5)) == [-signal.SIGKILL]
    shutil.copy(world.other / "model.safetensors", base / "model.safetensors")
    left = cli(*words, "--resume")
    assert left.code == 2 and "the model is not the one that this run began with" in left.err


def test_resuming_a_finished_run_does_nothing(world: World, uninterrupted: dict[str, Run]) -> None:
    run = uninterrupted["full"]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(run.path.rglob("*")) if p.is_file()}
    left = cli("train", "--resume", f"out={run.path}")
    assert left.code == 0 and left.out == f"{run.path}\n"
    assert "finished already: nothing to do" in left.err
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(run.path.rglob("*")) if p.is_file()}
    assert {p for p in after if before.get(p) != after[p]} <= {run.report_file, run.diagnosis_file, run.events_file}


def test_merging_may_be_asked_for_later(world: World, tmp_path: Path) -> None:
    settings = world.settings(tmp_path / "run", lora__r=2, steps=2)
    first = preftune.train(settings, quiet=True)
    saved, rows = weights(first.model), first.metrics()
    run = preftune.train(settings | {"lora.merge": True}, resume=True, quiet=True)
    assert (run.merged / "model.safetensors").exists()
    assert saved.keys() == weights(run.model).keys() and all((v == weights(run.model)[n]).all() for n, v in saved.items())
    assert run.metrics() == rows


def test_resume_needs_to_know_the_folder(world: World, tmp_path: Path) -> None:
    left = cli("train", "--resume", f"out={tmp_path / 'none'}")
    assert left.code == 2 and "not a run folder" in left.err
    settings: dict[str, Any] = world.settings(tmp_path / "run")
    del settings["out"]
    with pytest.raises(ConfigError, match="out: name the folder"):
        preftune.train(settings, resume=True)
    assert not os.path.exists("runs")
