"""What a run writes down of where it ran."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import preftune
from preftune.training.dist import Ranks
from preftune.training.job import environment


def test_it_names_versions_machine_and_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = environment(Ranks(), torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__ and found["ranks"] == 1
    if (Path(preftune.__file__).parents[1] / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?", found["git"])
    monkeypatch.setattr(preftune, "__file__", str(tmp_path / "site-packages" / "preftune" / "__init__.py"))
    assert environment(Ranks(), torch.device("cpu"))["git"] is None
