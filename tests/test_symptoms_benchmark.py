"""The benchmark of `preftune diagnose` plants, trains, measures and counts, at a size where it takes seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import symptom_rates
from symptom_faults import FAULTS, SOUND

from preftune.registry import SYMPTOMS


def test_every_fault_has_its_finding_and_its_named_strength() -> None:
    for name, fault in FAULTS.items():
        assert fault.finding in SYMPTOMS and fault.named in fault.strengths, name
    assert len(SOUND) == 20


def test_three_faults_are_planted_and_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = ("lr_low", "lost_in_bf16", "wrong_base")
    asked = ["--out", tmp_path, "--quick", "--seeds", "2", "--json", tmp_path / "rates.json"]
    words = [*asked, *(word for name in faults for word in ("--fault", name))]
    monkeypatch.setattr(sys, "argv", ["symptom_rates.py", *map(str, words)])
    symptom_rates.main()
    first = capsys.readouterr().out
    rows = json.loads((tmp_path / "rates.json").read_text())["faults"]
    assert [(row["fault"], row["n_found"], row["n"]) for row in rows] == [(name, 2, 2) for name in faults], first
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only-there"])
    symptom_rates.main()
    again = json.loads((tmp_path / "rates.json").read_text())
    assert again["faults"] == rows, "what was trained is read again"
    assert "| wrong_base | base | reference_mismatch | **2/2** |" in capsys.readouterr().out
