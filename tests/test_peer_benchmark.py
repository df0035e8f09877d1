"""The benchmark against TRL runs, its two sides take the same steps, and it says so. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peer.py"


SHAPE = {"size": "50M", "vocabulary": 50_000, "max_length": 512, "threads": 2, "precision": "fp32"}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The script in this process, for what measures nothing: its exit code and what it prints."""
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")  # the script sets these when it is imported
    import peer

    def run(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["peer.py", *map(str, words)])
        try:
            code = peer.main()
        except SystemExit as left:
            code = int(left.code or 0)
        return code, "".join(capsys.readouterr())

    return run


@pytest.mark.parity
@pytest.mark.slow
def test_quick(shared_data: Path, tmp_path: Path) -> None:
    """Both sides: equal losses to 1e-4, nearly equal weights, a ratio in the table and in the file."""
    file = tmp_path / "quick.json"
    words = ["--quick", "--data", shared_data, "--json", file, "--plot", tmp_path / "quick.svg"]
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert {"date", "commands", "versions", "machine"} <= content["about"].keys()
    cells = content["cells"]
    assert [(c["data"], c["tuning"], c["peer"]) for c in cells] == [("hh", "full", "default"), ("hh", "lora", "lean")]
    for cell in cells:
        assert cell["loss_difference"] <= 1e-4
        assert cell["weight_drift"] <= 1e-2
        assert f"**{cell['ratio_cpu']:.2f}**" in done.stdout
        assert cell["ratio_cpu"] > 0
        assert len(cell["steps"]) == 3
        assert cell["tokens_read"]["preftune"] < cell["tokens_read"]["trl"], "no padding, and the prompt once"
    assert "<svg" in (tmp_path / "quick.svg").read_text()


def test_slower_than_before_is_said(call: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """The ratio to TRL is compared, case by case; a fall by more than a tenth is named, and is an error to whoever asks."""
    now, before = tmp_path / "now.json", tmp_path / "before.json"
    now.write_text(json.dumps({"about": {}, "memory": [], "cells": [cell("full", 8.8), cell("lora", 9.8)]}))
    before.write_text(json.dumps({"about": {}, "memory": [], "cells": [cell("full", 10.0), cell("lora", 10.0)]}))
    code, slower = call("--table", now, "--compare", before)
    assert code == 1
    assert "slower: hh, full, threads 2, default: 8.80 times TRL's speed, 10.00 before" in slower
    assert "hh, lora, threads 2, default:" not in slower
    assert call("--table", now, "--compare", now)[0] == 0


def cell(tuning: str, ratio: float) -> dict[str, Any]:
    both = {"trl": ratio, "preftune": 1.0}
    return {
        "data": "hh", "tuning": tuning, "peer": "default", "shape": SHAPE, "n_steps": 5, "n_weights": 10, "tokens_read": both,
        "cpu": both, "wall": both, "ratio_cpu": ratio, "ratio_wall": ratio, "loss_difference": 0.0, "weight_drift": 0.0,
        "reference_cpu": both,
    }  # fmt: skip


def test_an_unknown_case_is_refused(call: Callable[..., tuple[int, str]], shared_data: Path) -> None:
    code, said = call("--data", shared_data, "--case", "hh:full:fastest")
    assert code == 2
    assert "hh:full:lean" in said
