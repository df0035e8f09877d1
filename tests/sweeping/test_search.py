"""A search by Optuna: within what is given, the same from the same seed, also after an interruption."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from preftune.errors import ConfigError
from preftune.sweeping.grid import Axis, Range, Settings
from preftune.sweeping.search import Grid, OptunaSearch

AXES: dict[str, Axis] = {
    "optim.lr": Range(1e-5, 1e-2),
    "lora.r": Range(4, 64),
    "loss.beta": (0.1, 0.5),
    "data": (["a", "b"], ["c"]),
}


def search(file: Path, *, seed: int = 0) -> OptunaSearch:
    return OptunaSearch(AXES, file, trials=14, seed=seed, direction=1)


def value_of(settings: Settings) -> float:
    return -abs(math.log10(settings["optim.lr"]) + 3) - settings["loss.beta"]


def go_on(found: OptunaSearch, n: int = 100) -> list[Settings]:
    asked: list[Settings] = []
    while len(asked) < n and (settings := found.ask()) is not None:
        asked.append(settings)
        found.tell(settings, None if len(asked) == 3 else value_of(settings))
    return asked


def test_draws_stay_within_what_is_given_and_an_interruption_changes_none(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    whole = go_on(search(tmp_path / "whole.db"))
    assert len(whole) == 14
    for settings in whole:
        assert 1e-5 <= settings["optim.lr"] <= 1e-2 and 4 <= settings["lora.r"] <= 64 and isinstance(settings["lora.r"], int)
        assert settings["loss.beta"] in (0.1, 0.5) and settings["data"] in (["a", "b"], ["c"])
    assert len({s["optim.lr"] for s in whole}) > 7, "it does not draw the same again and again"

    first = search(tmp_path / "parts.db")
    begun = go_on(first, 5)
    under_way = first.ask()  # and the process is gone
    second = search(tmp_path / "parts.db")
    again = second.ask()
    assert again == under_way, "what was under way goes on"
    assert again is not None
    second.tell(again, value_of(again))
    assert [*begun, again, *go_on(search(tmp_path / "parts.db"))][:3] == whole[:3]
    assert [*begun, again] == whole[:6]


def test_a_search_needs_optuna_and_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'preftune\[sweep\]'"):
        search(tmp_path / "x.db")


def test_a_grid_is_every_combination_once() -> None:
    grid = Grid({"a": (1, 2), "b": ("x",)})
    assert [grid.ask(), grid.ask(), grid.ask()] == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}, None]
