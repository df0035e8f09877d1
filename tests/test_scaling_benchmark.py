"""The benchmark of scaling runs on a small input and fills its tables. No speed is asserted."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scaling


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures of data and start are taken here, where everything is imported already, and the collector is put back."""
    measures = {"data": scaling.child_data, "start": scaling.child_start}

    def measured(name: str, *arguments: object) -> Any:
        return measures[name](*map(str, arguments))

    monkeypatch.setattr(scaling, "in_process", measured)
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.enable()


@pytest.mark.usefixtures("in_this_process")
def test_data_and_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path), "--pairs", "40", "--part", "data", "--part", "plan", "--part", "start"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    scaling.main()
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(r["pairs"], r["start"]) for r in found["data"]] == [(40, "first"), (40, "again")]
    assert all(r["peak"] >= r["read"] >= r["before"] > 0 and r["steps"] == 2 for r in found["data"])
    assert [(r["pairs"], r["steps"]) for r in found["plan"]] == [(40, 2)]
    assert [r["run"] for r in found["start"]] == ["first", "β", "seed", "loss", "LoRA"]
    assert all(r["to the first step"] > r["torch"] > 0 for r in found["start"])
    assert "| first | 40 |" in capsys.readouterr().out


def test_a_measure_is_a_process_of_its_own_and_its_failure_is_said() -> None:
    with pytest.raises(SystemExit, match="--child nothing\n(.*\n)*KeyError: 'nothing'"):
        scaling.in_process("nothing")
