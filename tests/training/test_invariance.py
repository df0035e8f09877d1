"""Every objective gives the same step however it is cut into micro-batches and ranks: values, metrics and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from steps_for_tests import ON, SUMS, Found, apart, as_rank, finite, scored_by_a_policy, setting, step
from worlds import finish, free_port, spawn

from preftune.registry import MODIFIERS

CASES = [*scored_by_a_policy(), *SUMS]


def test_every_modifier_is_among_the_cases() -> None:
    assert set(ON) == set(MODIFIERS)


@pytest.mark.parametrize("case", CASES)
def test_the_same_for_micro_batches_of_one_two_and_all(case: str) -> None:
    at = setting(case, torch.float32)
    n = len(at.data.trees)
    whole = step(at, [range(n)])
    assert finite(whole)
    assert max(float(g.abs().max()) for g in whole.gradient.values()) > 0
    for cuts in ([[i] for i in range(n)], [list(range(n))[i : i + 2] for i in range(0, n, 2)]):
        assert apart(step(at, cuts, idle=len(cuts) > 5), whole) < 1e-6


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes found for every case."""
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    assert finish(*(spawn(as_rank, rank, port, CASES, str(folder)) for rank in (0, 1))) == [0, 0]
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_the_same_on_two_ranks(of_two_ranks: list[dict[str, Any]], case: str) -> None:
    at = setting(case, torch.float32)
    whole = step(at, [range(len(at.data.trees))])
    for rank in of_two_ranks:
        assert apart(Found(*rank[case]), whole) < 1e-6


def test_a_mean_over_micro_batches_would_be_noticed() -> None:
    """The same comparison sees what an objective over the step would be if it were taken over each micro-batch by itself."""
    at = setting("aot", torch.float64)
    n = len(at.data.trees)
    with tiny.Float64():
        whole = step(at, [range(n)])
        parts = [step(at, [[i]]) for i in range(n)]
    summed = {name: sum(p.gradient[name] for p in parts) for name in whole.gradient}
    assert tiny.relative(summed, whole.gradient) > 1e-3
