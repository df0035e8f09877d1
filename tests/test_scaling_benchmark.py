"""The benchmark of scaling runs on a small input and fills its tables. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scaling.py"


@pytest.mark.slow
def test_data_and_start(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), "--pairs", "40", "--part", "data", "--part", "start"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(r["pairs"], r["start"]) for r in found["data"]] == [(40, "first"), (40, "again")]
    assert all(r["peak"] >= r["read"] >= r["before"] > 0 and r["steps"] == 2 for r in found["data"])
    assert [r["run"] for r in found["start"]] == ["first", "β", "seed", "loss", "LoRA"]
    assert all(r["to the first step"] > r["torch"] > 0 for r in found["start"])
    assert "| first | 40 |" in done.stdout
