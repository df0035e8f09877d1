"""Sweeps as a user starts them: one reference for all, kills and failures that cost one run, and resume to the same bits."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sweeps_for_tests
from worlds import World, cli, read_jsonl, same_weights

import preftune
from preftune.errors import ConfigError
from preftune.evaluate.record import Evaluation
from preftune.run import Run
from preftune.sweeping import pool
from preftune.sweeping.job import Sweep, read_sweep
from preftune.sweeping.page import write_page
from preftune.sweeping.record import Row
from preftune.sweeping.verdict import candidates

SMALL = {"prompts": 3, "per_prompt": 1, "max_tokens": 6}
FEW = ("--prompts", "3", "--per-prompt", "1", "--max-tokens", "6")
GRID = {"loss.beta": [0.05, 0.1, 0.5, 1.0], "optim.lr": [1e-3, 1e-2]}


@pytest.fixture(autouse=True, scope="module")
def _quick_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "launch", sweeps_for_tests.launch)
        yield


def recipe(world: World, cache: Path, **more: Any) -> dict[str, Any]:
    settings = world.settings(Path("unused"), cache=str(cache), steps=6, checkpoint__every=1, samples__n=0, **more)
    return {name: value for name, value in settings.items() if name not in ("out", "optim.lr")}


def words(world: World, cache: Path, **more: Any) -> list[str]:
    return [f"{name}={value}" for name, value in recipe(world, cache, **more).items()]


@pytest.fixture(scope="module")
def swept(world: World, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Eight runs, two at a time, from an empty cache."""
    folder = tmp_path_factory.mktemp("sweep")
    return preftune.sweep(recipe(world, folder / "cache"), GRID, out=folder / "s", jobs=2, evaluation=SMALL, quiet=True)


def test_eight_runs_compute_the_reference_once(world: World, swept: Sweep) -> None:
    n = len(read_jsonl(world.file("pairs")))
    assert (swept.path / "scored").read_text().split() == [str(n)], "one pass, over every example"
    said = [
        e["message"]
        for row in swept.rows
        for e in Run.open(swept.path / "runs" / row.name).events()
        if e["kind"] == "reference"
    ]
    assert sum("scored into" in text for text in said) == 1 and sum("read from" in text for text in said) == 7


def test_each_combination_is_a_run_of_its_own_and_a_row(world: World, swept: Sweep) -> None:
    assert [tuple(row.settings.values()) for row in swept.rows] == [
        (b, lr) for b in GRID["loss.beta"] for lr in GRID["optim.lr"]
    ]
    assert all(row.status == "done" and row.seconds for row in swept.rows)
    for row in swept.rows:
        run = Run.open(swept.path / "runs" / row.name)
        config = run.config()
        assert (config.loss_parameters["beta"], config.optim.lr) == tuple(row.settings.values())
        assert run.model.is_dir() and len(run.metrics(split="train")) == 6
        found = Evaluation.of(run.read_json(run.evaluation_file))
        assert found.held_out is not None and found.samples is not None and found.samples.n_prompts == 3
        assert row.figures["held_out.accuracy"] == found.held_out.accuracy
        assert row.figures["samples.kl_per_response"].value == found.samples.kl_per_response.value  # type: ignore[union-attr]
        assert found.against == str(world.base), "the same reference for all"
    best = max(row.figures["held_out.accuracy"].value for row in swept.rows)
    assert swept.verdict.best is not None and swept.verdict.best.figures["held_out.accuracy"].value == best


def test_what_came_of_it_is_read_back_from_its_files(swept: Sweep) -> None:
    assert json.loads((swept.path / "sweep.json").read_text()) == json.loads(json.dumps(swept.as_dict()))
    assert read_sweep(swept.path).as_dict() == swept.as_dict()


def test_a_sweep_that_is_over_trains_nothing_again(swept: Sweep) -> None:
    before = {file: file.stat().st_mtime_ns for file in (swept.path / "runs").rglob("*")}
    left = cli("sweep", "--resume", "--out", str(swept.path), "--json")
    assert left.code == 0 and json.loads(left.out) == json.loads(json.dumps(swept.as_dict()))
    assert {file: file.stat().st_mtime_ns for file in (swept.path / "runs").rglob("*")} == before


def test_the_table_names_settings_figures_and_the_best(swept: Sweep) -> None:
    left = cli("sweep", "--resume", "--out", str(swept.path))
    assert left.code == 0
    assert "loss.beta" in left.out and "optim.lr" in left.out and "0.05" in left.out
    assert left.out.count("best") >= 1 and "Best by held_out.accuracy" in left.out
    assert "8 runs, 8 of them done already" in left.err


def test_a_killed_run_and_one_that_diverges_cost_only_themselves(world: World, swept: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "s"
    out.mkdir()
    (out / "crash").write_text("update:3")  # of the first run
    asked = [*words(world, swept.path.parent / "cache", loss__beta=0.1), "optim.lr=0.01,1e18,0.001", *FEW, "--out", str(out)]
    left = cli("sweep", *asked)
    assert left.code == 0, left.err
    killed, diverged, done = read_sweep(out).rows
    assert (killed.status, diverged.status, done.status) == ("failed", "failed", "done")
    assert "SIGKILL" in killed.reason and "memory" in killed.reason
    assert "loss is nan" in diverged.reason
    assert "2 of 3 runs failed" in left.out and diverged.reason[:30] in left.err

    assert cli("sweep", "--resume", "--out", str(out)).code == 0
    rows = read_sweep(out).rows
    assert [row.status for row in rows] == ["done", "failed", "done"], "what failed is tried again"
    for row in (rows[0], rows[2]):
        whole = swept.path / "runs" / f"beta-0.1_lr-{row.settings['optim.lr']:g}"
        assert same_weights(out / "runs" / row.name / "model", whole / "model")


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(world: World, swept: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "s"
    asked = [*words(world, swept.path.parent / "cache"), "optim.lr=0.01", "loss.beta=0.1,0.5", *FEW, "--out", str(out)]
    second = out / "runs" / "beta-0.5" / "metrics.jsonl"

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if second.exists() and len(second.read_text().splitlines()) > 1:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.002)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    left = cli("sweep", *asked)
    watcher.join()
    assert (
        left.code == 75
        and f"stopped after 1 of 2 runs; all is kept. Go on with: preftune sweep --resume --out {out}" in left.err
    )
    assert [row.status for row in read_sweep(out).rows] == ["done", "stopped"]
    assert len(Run.open(out / "runs" / "beta-0.5").metrics(split="train")) < 6

    assert cli("sweep", "--resume", "--out", str(out)).code == 0
    for beta in ("0.1", "0.5"):
        whole = swept.path / "runs" / f"beta-{beta}_lr-0.01"
        assert same_weights(out / "runs" / f"beta-{beta}" / "model", whole / "model")


def test_a_killed_sweep_goes_on_where_it_was(swept: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "s"
    shutil.copytree(swept.path, out)
    table = json.loads((out / "sweep.json").read_text())
    table["runs"][3] |= {"status": "running", "figures": {}}  # as a kill leaves it
    (out / "sweep.json").write_text(json.dumps(table))
    run = Run.open(out / "runs" / swept.rows[3].name)
    for gone in (run.model, sorted(run.checkpoints.iterdir())[-1]):
        shutil.rmtree(gone)
    run.evaluation_file.unlink()
    left = cli("sweep", "--resume", "--out", str(out))
    assert left.code == 0 and "7 of them done already" in left.err
    after = read_sweep(out)
    assert after.rows[3].figures == swept.rows[3].figures and after.verdict.sentence == swept.verdict.sentence
    assert same_weights(run.model, swept.path / "runs" / swept.rows[3].name / "model")


def test_all_settings_are_checked_before_the_first_run(world: World, tmp_path: Path) -> None:
    asked = [*words(world, tmp_path / "cache"), "loss.beta=0.1,-1,x", "--out", str(tmp_path / "s"), *FEW]
    left = cli("sweep", *asked)
    assert left.code == 2 and "2 of 3 runs have wrong settings" in left.err
    assert "loss.beta=-1: loss.beta" in left.err and "loss.beta=x: loss.beta" in left.err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--metric", "rewards/acuracies"], "did you mean rewards/accuracies"),
        (["--metric", "held_out.acuracy"], "did you mean held_out.accuracy"),
        (["--metric", "samples.policy"], "is no figure"),
        (["--metric", "figures.price.value"], "direction higher or lower"),
        (["--metric", "wins.0.win_rate"], "needs a judge"),
        (["--by", "rule"], "name FILE.py:FUNCTION behind the recipe"),
        (["nowhere.py:f", "--by", "rule"], "nowhere.py: no such file"),
        (["--best-of", "2"], "--by rule or --by reward gives scores"),
        (["--best-of", "two"], "expected numbers of answers"),
        (["--base-url", "http://127.0.0.1:1/v1"], "only a language model is asked"),
        (["out=runs/x"], "names the folders of its runs"),
        (["--resume", "--out", "nowhere"], "not a sweep"),
        (["--resume", "--out", "nowhere", "--prompts", "3"], "without any of it"),
        (["--beta", "1,2"], "No such option"),
        (["model=nowhere"], "no such folder"),
        (["data=nowhere.jsonl"], "nowhere.jsonl"),
        (["eval.fraction=0"], "there are none"),
    ],
)
def test_a_slip_is_said_before_anything_is_done(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [] if "--resume" in more else [*words(world, tmp_path / "cache"), "loss.beta=0.1,0.2"]
    left = cli("sweep", *given, *more)
    assert left.code == 2 and said in left.err, left.err
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_holds_another_sweep_is_refused(world: World, swept: Sweep) -> None:
    given = recipe(world, swept.path.parent / "cache")
    with pytest.raises(ConfigError, match="holds a sweep already"):
        preftune.sweep(given, GRID, out=swept.path)
    with pytest.raises(ConfigError, match=r"begun with other settings:\n  axes: "):
        preftune.sweep(given, {"loss.beta": [0.3, 0.4]}, out=swept.path, resume=True)


def test_gpus_are_given_out_one_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pool.seats_for(None, "auto") == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert pool.seats_for(2, "cuda") == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "GPU-ab"}]
    assert pool.seats_for(1, "auto") == [{"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(ConfigError, match="--jobs 3: there are 2 GPUs"):
        pool.seats_for(3, "auto")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=GPU-ab"):
        pool.seats_for(None, "cuda:1")


def test_processes_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert pool.seats_for(None, "cpu") == [{}]
    assert pool.seats_for(4, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 4


def test_a_rule_judges_every_run_alike_and_seeds_are_put_together(world: World, swept: Sweep, tmp_path: Path) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text("def longer(prompt, response):\n    return len(response)\n")
    out = tmp_path / "s"
    asked = [*words(world, swept.path.parent / "cache"), "optim.lr=0.01", "seed=0,1", *FEW, "--out", str(out)]
    left = cli("sweep", f"{rule}:longer", "--by", "rule", "--best-of", "1,2", *asked, "--json")
    assert left.code == 0, left.err
    found = json.loads(left.out)
    one, two = found["best_of"]
    assert (one["n"], one["kl_at_most"], one["kl"]["value"]) == (1, 0.0, 0.0) and one["win_rate"]["value"] == pytest.approx(
        50.0
    )
    assert two["win_rate"]["value"] >= 50 and two["score"]["value"] >= one["score"]["value"] and two["kl"]["n"] == 3
    assert found["metric"] == "wins.0.win_rate" and found["best"]["runs"] == ["seed-0", "seed-1"]
    rates = [run["figures"]["wins.0.win_rate"]["value"] for run in found["runs"]]
    (candidate,) = candidates(read_sweep(out).rows)
    assert candidate.figures["wins.0.win_rate"].value == pytest.approx(sum(rates) / 2)
    assert found["notes"] == ["Seeds hold out other examples each: give eval.data for the same ones in all runs."]


def test_the_page_shows_table_frontier_and_reasons_and_escapes_all(swept: Sweep, tmp_path: Path) -> None:
    assert (swept.path / "sweep.html").exists()
    failed = Row("x", {"loss.beta": 9, "optim.lr": 1}, "failed", reason="<script>alert(1)</script>")
    write_page(swept._replace(path=tmp_path, rows=[*swept.rows, failed]))
    page = (tmp_path / "sweep.html").read_text()
    assert swept.verdict.sentence in html.unescape(page) and "Reward against KL" in page and "loss.beta=9 optim.lr=1" in page
    assert "<script>alert(1)</script>" not in page and "&lt;script&gt;alert(1)" in page
