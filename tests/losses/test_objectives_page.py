"""The page of objectives speaks of all of them, with the defaults that they have."""

from __future__ import annotations

import re
from pathlib import Path

from objectives_for_tests import CASES, defaults

from preftune.registry import LOSSES, MODIFIERS

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
ROWS = {row[1]: row[0] for row in re.finditer(r"^\| `(\w+)` \|.*$", PAGE, re.M)}


def test_every_objective_has_a_row() -> None:
    assert set(ROWS) >= set(LOSSES)
    assert set(ROWS) == {*CASES, "sft", "ppo", "rloo", "grpo"}, "and nothing else has"


def test_every_modifier_is_named_by_its_setting() -> None:
    for name in MODIFIERS:
        for parameter in defaults(MODIFIERS[name]):
            assert f"`loss.{parameter}=" in PAGE


def test_beta_is_the_default() -> None:
    stated = {name: re.search(r"\| β ([\d.]+)", row) for name, row in ROWS.items()}
    betas = {name: defaults(case.function)["beta"] for name, case in CASES.items() if "beta" in defaults(case.function)}
    assert {name: float(found[1]) for name, found in stated.items() if found} == betas
