"""The run's folder: what is written reads back, and what is not a run is said to be none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from preftune.config import Config
from preftune.errors import StorageError
from preftune.files import write_atomic
from preftune.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "run")
    write_atomic(run.config_file, Config.of({"model": "base", "loss.beta": 0.3}).to_yaml())
    return run


def test_nothing_is_created_until_something_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert (run.metrics(), run.events(), run.samples(), run.read_json(run.env_file)) == ([], [], [], None)
    assert not run.path.exists()
    assert repr(run) == f"Run('{tmp_path}/run')"


def test_settings_read_back_equal(run: Run) -> None:
    assert Run.open(run.path).config() == Config.of({"model": "base", "loss.beta": 0.3})


def test_a_folder_in_use_is_not_taken_twice(run: Run) -> None:
    with pytest.raises(StorageError, match=r"holds a run already\. Go on with it \(--resume\)"):
        Run.create(run.path)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"not a run folder .* expected the out= of an earlier run"):
        Run.open(tmp_path)
    with pytest.raises(StorageError, match="no such folder, so not a run folder"):
        Run.open(tmp_path / "none")


def test_a_folder_above_or_below_a_run_names_the_run(run: Run) -> None:
    run.model.mkdir()
    for folder in (run.model, run.path.parent):
        with pytest.raises(StorageError, match=rf"did you mean {re.escape(str(run.path))}\?"):
            Run.open(folder)


def test_damaged_json_says_what_writes_it_anew(run: Run) -> None:
    for file, verb in ((run.evaluation_file, "eval"), (run.diagnosis_file, "diagnose")):
        file.write_text('{"version":')
        with pytest.raises(StorageError, match=f"not valid JSON .* Delete it, and `preftune {verb} .* writes it anew"):
            run.read_json(file)
    run.check_file.write_text("")
    with pytest.raises(StorageError, match="Delete it, and go on without it"):
        run.read_json(run.check_file)


def test_metrics_keep_their_order_and_are_chosen_by_split(run: Run) -> None:
    rows = [{"step": 0, "split": "train", "loss": 0.7}, {"step": 0, "split": "eval"}, {"step": 1, "split": "train"}]
    for row in rows:
        run.log_metrics(row)
    assert run.metrics() == rows
    assert run.metrics(split="train") == [rows[0], rows[2]]
    assert run.metrics(split="eval") == [rows[1]]


def test_rewinding_forgets_later_rows_and_a_torn_line(run: Run) -> None:
    for step in range(4):
        run.log_metrics({"step": step, "split": "train"})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "spl')
    run.rewind_metrics(2)
    assert [row["step"] for row in run.metrics()] == [0, 1]
    run.log_metrics({"step": 2, "split": "train"})
    assert run.metrics_file.read_text().count("\n") == 3


def test_events_and_samples_go_on_after_a_torn_line(run: Run) -> None:
    run.log_event("format", "rows are read as hh")
    with run.events_file.open("a") as file:
        file.write('{"kind": "pa')
    run.log_event("path", "packed")
    assert [e["kind"] for e in run.events()] == ["format", "path"]
    run.log_samples([{"when": "before", "prompt": "a", "response": "b"}])
    run.log_samples([{"when": "after", "prompt": "a", "response": "c"}])
    assert [s["when"] for s in run.samples()] == ["before", "after"]


def test_json_files_read_back_equal_and_damage_is_named(run: Run) -> None:
    run.write_json(run.data_file, {"used": 3, "name": "é"})
    assert run.read_json(run.data_file) == {"used": 3, "name": "é"}
    run.data_file.write_bytes(b'{"used": \xff')
    with pytest.raises(StorageError, match=r"data\.json: not valid JSON"):
        run.read_json(run.data_file)


def test_importing_it_needs_no_torch(run: Run) -> None:
    import subprocess
    import sys

    code = f"import sys; from preftune.run import Run; Run({str(run.path)!r}).metrics(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
