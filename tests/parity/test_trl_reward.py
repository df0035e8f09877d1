"""Reward models: the same steps by TRL's RewardTrainer on real rows, from the same head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trl_for_tests import (
    Row,
    check_steps,
    check_weights,
    hh_rows,
    in_order,
    learned,
    make_model,
    our_trees,
    run_ours,
    same_settings,
    saved_weights,
)

from preftune.data.types import Tree
from preftune.model.load import load_model, load_tokenizer
from preftune.model.reward import set_padding, with_scalar_head

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
N_STEPS = 10


def reward_model(folder: Path) -> Path:
    """A reward model whose head has been drawn, as both sides load it."""
    base = make_model(folder / "base")
    model, tokenizer = with_scalar_head(load_model(base), seed=1), load_tokenizer(base)
    set_padding(model, tokenizer, never=tokenizer.eos_token_id)
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    return folder / "start"


def trainer_of(model: Path, trees: list[Tree], folder: Path, centering: float) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    def ids(tree: Tree, k: int) -> list[int]:
        return np.concatenate([tree.prompt, tree.branches[k].ids]).tolist()

    rows = [{"chosen_ids": ids(t, t.pairs[0].winner), "rejected_ids": ids(t, t.pairs[0].loser)} for t in trees]
    given: Row = same_settings(folder, accumulate=2, n_steps=N_STEPS) | {"center_rewards_coefficient": centering or None}
    return RewardTrainer(model=str(model), args=RewardConfig(**given), train_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_the_same_steps(centering: float, shared_data: Path, tmp_path: Path) -> None:
    """Losses to 1e-4, gradient norms and weights; TRL reads chosen and rejected by themselves, ours the prompt once."""
    model, rows = reward_model(tmp_path), hh_rows(shared_data, tmp_path, 4 * N_STEPS)
    given = {"loss.name": "bradley_terry", "loss.centering": centering, "steps": N_STEPS}
    ours = run_ours(model, rows, tmp_path, **given)
    trees = our_trees(model, in_order(rows, N_STEPS), tmp_path)
    trainer = trainer_of(model, trees, tmp_path, centering)
    trainer.train()
    check_steps(ours, trainer, ("loss", "grad_norm"), n_steps=N_STEPS)
    start = saved_weights(model)
    check_weights(ours.weights, learned(trainer, start), start)
