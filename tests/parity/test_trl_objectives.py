"""Each objective that TRL has too: the same steps on real rows, so the same losses, gradient norms and final weights.

Where the two define something differently, the settings are those with which both coincide, and the second half of the file
pins what TRL does without them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from trl_for_tests import (
    PER_STEP,
    Row,
    check_steps,
    check_weights,
    hh_rows,
    in_order,
    learned,
    make_model,
    run_ours,
    same_settings,
    saved_weights,
)

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
N_STEPS = 10


SCALARS = ("loss", "grad_norm")
REWARDS = (*SCALARS, "rewards/chosen", "rewards/rejected", "rewards/margins")


class Case(NamedTuple):
    """Our settings and those of TRL's trainer that mean the same."""

    ours: Row
    theirs: Row
    accumulate: int = 1


DPO: dict[str, Case] = {
    "dpo": Case({}, {"loss_type": "sigmoid"}, accumulate=2),
    "ipo": Case({}, {"loss_type": "ipo"}, accumulate=2),
    "hinge": Case({}, {"loss_type": "hinge"}, accumulate=2),
    "robust": Case({}, {"loss_type": "robust", "label_smoothing": 0.1}, accumulate=2),
    "exo": Case({}, {"loss_type": "exo_pair", "label_smoothing": 1e-3}),
    "nca": Case({}, {"loss_type": "nca_pair", "beta": 0.01}),
    "sppo": Case({}, {"loss_type": "sppo_hard"}),
    "apo_zero": Case({}, {"loss_type": "apo_zero"}),
    "apo_down": Case({}, {"loss_type": "apo_down"}),
    "discopop": Case({}, {"loss_type": "discopop", "beta": 0.05}),
    "dpo_norm": Case({}, {"loss_type": "sigmoid_norm", "beta": 5.0}),
    "bco_pair": Case({"loss.shift": False}, {"loss_type": "bco_pair"}),
    "aot": Case({}, {"loss_type": "aot"}),
    "aot_unpaired": Case({}, {"loss_type": "aot_unpaired"}),
}
MODIFIED: dict[str, Case] = {
    "forward KL": Case(  # e^10 after a few steps at the usual rate: too wild to compare
        {"loss.divergence": "forward_kl", "optim.lr": 3e-5}, {"f_divergence_type": "forward_kl", "learning_rate": 3e-5}
    ),
    "JS": Case({"loss.divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    "alpha": Case({"loss.divergence": 0.3}, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}),
    "LD-DPO": Case({"loss.ld_alpha": 0.5}, {"ld_alpha": 0.5}, accumulate=2),
    "WPO": Case({"loss.wpo": True}, {"use_weighting": True}, accumulate=2),
}


@pytest.fixture(scope="module")
def rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Real pairs as plain text whose boundary is that of two tokens, whoever tokenizes."""

    def one(row: Row) -> Row:
        turns = "".join(f"{m['role']}: {m['content']}\n\n" for m in row["prompt"])
        sides = {side: f" {row[side][0]['content'].strip()}" for side in ("chosen", "rejected")}
        return {"prompt": f"{turns}assistant:", **sides}

    return [one(r) for r in hh_rows(shared_data, tmp_path_factory.mktemp("rows"), N_STEPS * PER_STEP)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base")


def unpaired(rows: list[Row]) -> list[Row]:
    """Every other pair's chosen as a good response, the rejected of the others as bad ones."""
    return [
        {"prompt": r["prompt"], "completion": r["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, r in enumerate(rows)
    ]


def compare(
    model: Path, rows: list[Row], folder: Path, ours: Row, trainer_of: Callable[..., Any], names: tuple[str, ...] = SCALARS
) -> None:
    settings: Row = {"steps": N_STEPS, "batch.tokens_per_microbatch": 400} | ours
    mine = run_ours(model, rows, folder, **settings)
    trainer = trainer_of(model, in_order(rows, N_STEPS), folder)
    start = saved_weights(model)
    trainer.train()
    check_steps(mine, trainer, names, n_steps=N_STEPS)
    losses = [s.loss for s in mine.steps]
    assert max(losses) - min(losses) > 1e-3 * max(map(abs, losses)), "nothing was learnt that could differ"
    check_weights(mine.weights, learned(trainer, start), start)


def trainer_with(config: Any, trainer: Any, theirs: Row, accumulate: int) -> Callable[..., Any]:
    """Makes TRL's trainer over rows in their order."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(model: Path, rows: list[Row], folder: Path) -> Any:
        settings = same_settings(folder, accumulate=accumulate, n_steps=len(rows) // PER_STEP) | theirs
        return trainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=config(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
        )

    return make


def dpo_trainer(theirs: Row, accumulate: int = 1) -> Callable[..., Any]:
    from trl import DPOConfig, DPOTrainer

    return trainer_with(DPOConfig, DPOTrainer, {"beta": 0.1} | theirs, accumulate)


MEANS = ("ipo", "dpo_norm")  # TRL's rewards are β·sums there too


@pytest.mark.parametrize("name", DPO)
def test_pairs_with_a_reference(name: str, model: Path, rows: list[Row], tmp_path: Path) -> None:
    case = DPO[name]
    names = SCALARS if name in MEANS else REWARDS
    theirs = dpo_trainer(case.theirs, case.accumulate)
    compare(model, rows, tmp_path, {"loss.name": name} | case.ours, theirs, names)


@pytest.mark.parametrize("name", MODIFIED)
def test_modifiers(name: str, model: Path, rows: list[Row], tmp_path: Path) -> None:
    case = MODIFIED[name]
    theirs = dpo_trainer(case.theirs, case.accumulate)
    compare(model, rows, tmp_path, {"loss.name": "dpo"} | case.ours, theirs)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_unpaired(name: str, model: Path, rows: list[Row], tmp_path: Path) -> None:
    """KTO's mismatched responses: TRL's come from the micro-batch, ours from the data; TRL gets ours here."""
    from trl import KTOConfig, KTOTrainer

    rows = unpaired(rows)
    assert len({r["prompt"] for r in rows}) == len(rows), "else the next row is not the next prompt"
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    make = trainer_with(KTOConfig, KTOTrainer, {"loss_type": name, "beta": 0.1} | weights, 1)

    def theirs(model: Path, ordered: list[Row], folder: Path) -> Any:
        trainer = make(model, ordered, folder)
        if name == "kto":
            place = {r["prompt"]: i for i, r in enumerate(rows)}
            column = {place[r["prompt"]]: t["completion_ids"] for r, t in zip(ordered, trainer.train_dataset, strict=True)}
            longest = max(len(t["prompt_ids"]) + len(t["completion_ids"]) for t in trainer.train_dataset)

            def next_one(row: Row, i: int) -> Row:
                other = column[(place[ordered[i]["prompt"]] + 1) % len(rows)]
                return {"KL_completion_ids": other[: longest - len(row["prompt_ids"])]}

            trainer.train_dataset = trainer.train_dataset.map(next_one, with_indices=True)
        return trainer

    ours = {"loss.name": name} | {f"loss.{k}": v for k, v in weights.items()}
    compare(model, rows, tmp_path, ours, theirs)


@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_cpo_and_simpo(name: str, model: Path, rows: list[Row], tmp_path: Path) -> None:
    """With one pair in each of TRL's micro-batches its mean over their tokens is that of the response."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "beta": 2.0}
    theirs = simpo if name == "simpo" else {"loss_type": "sigmoid", "cpo_alpha": 1.0, "beta": 0.1}
    make = trainer_with(CPOConfig, CPOTrainer, theirs, PER_STEP)
    compare(model, rows, tmp_path, {"loss.name": name}, make)


def test_orpo(model: Path, rows: list[Row], tmp_path: Path) -> None:
    """TRL's likelihood counts the prompt, but for its first token: a prompt of one token makes both the same."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = [r | {"prompt": ":"} for r in rows]
    make = trainer_with(ORPOConfig, ORPOTrainer, {"beta": 0.1}, PER_STEP)
    compare(model, rows, tmp_path, {"loss.name": "orpo"}, make)


def test_rpo(model: Path, rows: list[Row], tmp_path: Path) -> None:
    """The sum of dpo and the likelihood of the chosen; one pair in each of TRL's micro-batches, as above."""
    ours = {"loss": ["dpo", {"name": "preferred_ft", "weight": 0.5}]}
    theirs = dpo_trainer({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, PER_STEP)
    compare(model, rows, tmp_path, ours, theirs)
