"""One curve on any hardware: how a step is cut into micro-batches changes nothing but speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worlds import World, same_curve

import preftune


@pytest.mark.parametrize("more", [{}, {"lora__r": 4, "optim__lr": 1e-2}, {"loss": "sft"}], ids=["full", "lora", "sft"])
def test_the_same_for_any_micro_batch(world: World, tmp_path: Path, more: dict[str, Any]) -> None:
    step = {"batch__pairs_per_step": 16, "steps": 6, "eval__every": 2}
    runs = []
    for budget in (512, 2048, 8192) if not more else (512, 8192):
        settings = world.settings(tmp_path / str(budget), batch__tokens_per_microbatch=budget, **step, **more)
        runs.append(preftune.train(settings, quiet=True))
    for other in runs[1:]:
        same_curve(runs[0], other)


def test_a_micro_batch_of_one_example(world: World, tmp_path: Path) -> None:
    whole, single = (
        preftune.train(world.settings(tmp_path / str(n), batch__tokens_per_microbatch=n), quiet=True) for n in (8192, 1)
    )
    same_curve(whole, single)


def test_dropout_differs_from_step_to_step_but_not_from_run_to_run(world: World, tmp_path: Path) -> None:
    """One example, seen again and again at a rate of nearly nothing: only dropout moves the loss."""
    from worlds import read_jsonl, write_jsonl

    data = write_jsonl(tmp_path / "one.jsonl", read_jsonl(world.file("completions"))[:1])
    losses = []
    for name in ("a", "b"):
        settings = world.settings(
            tmp_path / name, data=str(data), loss="sft", lora__r=4, lora__dropout=0.5, optim__lr=0.1, eval__fraction=0.0, seed=1
        )
        losses.append([row["loss"] for row in preftune.train(settings, quiet=True).metrics()])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == len(losses[0])


def test_an_example_longer_than_the_budget_costs_one_micro_batch() -> None:
    import numpy as np

    from preftune.training.plan import cut

    lengths = np.array([10_000, 50, 60, 70, 80])
    assert sorted(cut(np.arange(5), lengths, budget=300)[0]) == [[0], [1, 2, 3, 4]]
    assert [len(rank) for rank in cut(np.arange(5), lengths, budget=1, world=2)] == [3, 3]
