"""What is refused before any work: folders that a run would write over, held-out examples of no use."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from worlds import World, cli, read_jsonl, write_jsonl

import preftune
from preftune.data.read import read_examples
from preftune.data.split import split_by_prompt
from preftune.engine.policy import Path as ScoringPath
from preftune.engine.policy import Policy
from preftune.errors import ConfigError, DataError
from preftune.training.checks import is_precise


@pytest.mark.parametrize("name", ["model", "reference"])
def test_out_must_not_be_a_model_that_is_used(world: World, tmp_path: Path, name: str) -> None:
    folder = world.base if name == "model" else world.other
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ConfigError, match=f"out: .* is the {name} itself"):
        preftune.train(world.settings(folder / ".." / folder.name, **{name: str(folder)}), quiet=True)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_held_out_examples_of_no_use_are_said_to_be_those(world: World, tmp_path: Path) -> None:
    rows = [row | {"confidence": 1.0} for row in read_jsonl(world.file("pairs"))[:12]]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    _, held_out = split_by_prompt(read_examples(str(data)).examples, 0.05, seed=0)
    assert len(held_out) == 1
    write_jsonl(data, [row | {"confidence": 0.5 if row["prompt"] == held_out[0].prompt else 1.0} for row in rows])
    settings = world.settings(tmp_path / "out", data=str(data), eval__fraction=0.05)
    with pytest.raises(DataError, match=r"eval\.fraction: 0\.05 .* 1 examples.*a tie.*eval\.fraction=0"):
        preftune.train(settings, quiet=True)
    assert not (tmp_path / "out").exists()
    ties = write_jsonl(tmp_path / "ties.jsonl", [row | {"confidence": 0.5} for row in read_jsonl(world.file("held_out"))])
    with pytest.raises(DataError, match=r"^eval\.data: .*a tie"):
        preftune.train(settings | {"eval.data": str(ties)}, quiet=True)


def test_a_seed_that_no_generator_takes_is_refused(world: World, tmp_path: Path) -> None:
    left = cli("train", *world.words(tmp_path / "out", seed=2**63))
    assert left.code == 2 and "seed: expected less than" in left.err


@pytest.mark.parametrize(
    ("weights", "autocast", "precise"),
    [(torch.float32, None, True), (torch.float32, torch.bfloat16, False), (torch.bfloat16, None, False)],
)
def test_bf16_products_are_not_held_to_float32_at_step_0(
    weights: torch.dtype, autocast: torch.dtype | None, precise: bool
) -> None:
    model = tiny.model("llama").to(weights)
    assert is_precise(Policy(model, ScoringPath("forest", "own"), autocast=autocast)) is precise
