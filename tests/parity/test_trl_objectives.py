"""Each objective that TRL has too: the same steps on real rows, so the same losses, gradient norms and final weights.

Where the two define something differently, the settings are those with which both coincide, and the second half of the file
pins what TRL does without them.
"""

from __future__ import annotations

import math
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

from preftune.losses.terms import log1mexp

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

    real = [one(r) for r in hh_rows(shared_data, tmp_path_factory.mktemp("rows"), 4 * N_STEPS * PER_STEP)]
    short = sorted(real, key=lambda r: sum(map(len, r.values())))[: N_STEPS * PER_STEP]
    return [r for r in real if r in short]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base", layers=1)


def unpaired(rows: list[Row]) -> list[Row]:
    """Every other pair's chosen as a good response, the rejected of the others as bad ones."""
    return [
        {"prompt": r["prompt"], "completion": r["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, r in enumerate(rows)
    ]


def compare(
    model: Path, rows: list[Row], folder: Path, ours: Row, trainer_of: Callable[..., Any], names: tuple[str, ...] = SCALARS
) -> None:
    settings: Row = {"steps": N_STEPS, "batch.tokens_per_microbatch": 250} | ours
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


# Where the two differ: what TRL does, on one batch, with a reference that is far from the policy


@pytest.fixture(scope="module")
def far(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer, whose log-probs are tens of nats away."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("far") / "model"
    moved = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        moved.lm_head.weight.mul_(20.0)
    moved.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def batch_losses(make: Callable[..., Any], model: Path, rows: list[Row], folder: Path, far: Path | None = None) -> list[float]:
    """The loss of each micro-batch of the rows, before any update."""
    trainer = make(model, rows, folder)
    if far is not None:
        trainer.ref_model.load_state_dict(saved_weights(far))
    return [float(trainer.compute_loss(trainer.model, batch)) for batch in trainer.get_train_dataloader()]


SIDES = ("chosen", "rejected")


def both_ways(rows: list[Row]) -> list[Row]:
    return [{"prompt": r["prompt"], "chosen": r[a], "rejected": r[b]} for r in rows for a, b in (SIDES, SIDES[::-1])]


def test_trl_ignores_label_smoothing_of_dpo(model: Path, far: Path, rows: list[Row], tmp_path: Path) -> None:
    plain, smooth = (
        batch_losses(dpo_trainer({"loss_type": "sigmoid", "label_smoothing": e}), model, rows[:4], tmp_path, far)
        for e in (0, 0.3)
    )
    assert plain == smooth


def test_trl_sorts_a_micro_batch_for_aot(model: Path, far: Path, rows: list[Row], tmp_path: Path) -> None:
    """So with one pair in each, nothing is sorted, and it is DPO."""
    alone, dpo, fours = (
        batch_losses(dpo_trainer({"loss_type": kind, "beta": 0.001}, n), model, rows[:16], tmp_path, far)
        for kind, n in (("aot_unpaired", 4), ("sigmoid", 4), ("aot_unpaired", 1))
    )
    assert alone == pytest.approx(dpo, rel=1e-5)
    assert sum(fours) / 4 != pytest.approx(sum(alone) / 16, rel=1e-4)


@pytest.mark.parametrize(
    "theirs", [{"loss_type": "sft"}, {"loss_type": ["sigmoid", "sft"]}], ids=["likelihood", "a sum with the likelihood"]
)
def test_trl_takes_the_likelihood_of_a_micro_batch(theirs: Row, model: Path, rows: list[Row], tmp_path: Path) -> None:
    """The mean over the tokens of a micro-batch: a step depends on how it is cut."""
    (whole,), parts = (batch_losses(dpo_trainer(theirs, n), model, rows[:4], tmp_path) for n in (1, 4))
    assert whole != pytest.approx(sum(parts) / 4, rel=1e-4)


def test_trl_trains_orpo_on_prompts(model: Path, rows: list[Row], tmp_path: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    make = trainer_with(ORPOConfig, ORPOTrainer, {"beta": 0.0}, PER_STEP)
    for row, loss in zip(rows[:4], batch_losses(make, model, rows[:4], tmp_path), strict=True):
        assert loss == pytest.approx(whole_text_nll(model, row["prompt"] + row["chosen"]), rel=1e-4)


def whole_text_nll(model: Path, text: str) -> float:
    """Mean negative log-prob of all tokens but the first, the end of text included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        return float(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids, labels=ids).loss)


def test_trl_takes_mismatched_responses_from_the_micro_batch(model: Path, rows: list[Row], tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    trained_on = trainer_with(KTOConfig, KTOTrainer, {}, 2)(model, unpaired(rows[:4]), tmp_path).train_dataset
    own, other = trained_on["completion_ids"], trained_on["KL_completion_ids"]
    assert [own.index(o) for o in other] == [1, 0, 3, 2], "pairs of rows, since a micro-batch has two"


@pytest.mark.parametrize(
    "theirs", [{"f_divergence_type": "forward_kl"}, {"loss_type": "discopop", "beta": 5.0}], ids=["forward_kl", "discopop"]
)
def test_trl_gives_nan_far_out(theirs: Row, model: Path, far: Path, rows: list[Row], tmp_path: Path) -> None:
    """The policy is the sharp model here: its log-ratios are below −88 nats."""
    (loss,) = batch_losses(dpo_trainer(theirs), far, both_ways(rows[:2]), tmp_path, model)
    assert math.isnan(loss)


def test_trl_gives_orpo_a_nan_gradient_near_certainty() -> None:
    from trl.experimental.orpo.orpo_trainer import log1mexp as theirs

    logp = torch.tensor([-1e-8], requires_grad=True)
    theirs(logp).sum().backward()
    assert logp.grad is not None and logp.grad.isnan()
    logp.grad = None
    log1mexp(logp).sum().backward()
    assert logp.grad.item() == pytest.approx(-1e8, rel=1e-6)
