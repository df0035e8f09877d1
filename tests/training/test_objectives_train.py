"""`preftune train` with each objective, from the settings to the saved model, on the data that it is for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from worlds import World, cli, read_jsonl, same_curve, weights, write_jsonl

import preftune
from preftune.errors import DataError
from preftune.loss_settings import first_record
from preftune.losses.objective import objective
from preftune.losses.records import Labels, PairLoss, Ranked, RefPairs, ResponseLoss
from preftune.registry import LOSSES
from preftune.run import Run

SHORT = {"steps": 2, "eval__every": 0, "samples__n": 0, "eval__fraction": 0.0}


def data_for(world: World, folder: Path, loss: str) -> Path:
    """Pairs, and for ranked lists three responses with scores."""
    if first_record(LOSSES[loss]) is not Ranked:
        return world.file("pairs")
    rows = [
        {"prompt": p["prompt"], "responses": [p["chosen"], p["rejected"], " What?"], "scores": [2.0, 1.0, 0.0]}
        for p in read_jsonl(world.file("pairs"))[:16]
    ]
    return write_jsonl(folder / "ranked.jsonl", rows)


@pytest.mark.parametrize("loss", sorted(name for name in LOSSES if not objective(name, {}).needs_rollouts))
def test_every_objective_trains(world: World, tmp_path: Path, loss: str) -> None:
    words = world.words(tmp_path / "run", loss=loss, data=str(data_for(world, tmp_path, loss)), **SHORT)
    left = cli("train", *words)
    assert left.code == 0, left.err
    run = Run.open(tmp_path / "run")
    first, last = run.metrics()
    assert all(math.isfinite(v) for row in (first, last) for v in row.values() if isinstance(v, float))
    assert last["weights_moved"] > 0.5
    wanted = objective(loss, {})
    assert ("kl" in first) == wanted.needs_reference
    if wanted.returns in (PairLoss, ResponseLoss):
        assert first["rewards/margins"] == pytest.approx(first["rewards/chosen"] - first["rewards/rejected"], abs=1e-5)
    if wanted.record is RefPairs:
        assert first["rewards/accuracies"] == 0.5, "an untrained policy prefers nothing"
    assert any((run.model / name).exists() for name in ("model.safetensors", "adapter_model.safetensors"))


SUM = [{"name": "dpo", "weight": 1.0, "beta": 0.3}, {"name": "sft", "weight": 0.2}]


def test_a_sum_of_objectives_logs_each_and_is_their_weighted_sum(world: World, tmp_path: Path) -> None:
    run = preftune.train(world.settings(tmp_path / "run", loss=SUM), quiet=True)
    for row in run.metrics():
        assert row["loss"] == pytest.approx(row["loss/dpo"] + 0.2 * row["loss/sft"], abs=1e-9)
    assert run.metrics()[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    sft = preftune.train(world.settings(tmp_path / "sft", loss="sft"), quiet=True)
    assert run.metrics()[0]["loss/sft"] == pytest.approx(sft.metrics()[0]["loss"], abs=1e-6), "it reads the chosen alone"


def test_a_sum_is_cut_like_any_other(world: World, tmp_path: Path) -> None:
    whole, small = (
        preftune.train(world.settings(tmp_path / str(n), loss=SUM, batch__tokens_per_microbatch=n), quiet=True)
        for n in (8192, 200)
    )
    same_curve(whole, small)


def test_of_one_objective_a_weight_is_only_a_factor(world: World, tmp_path: Path) -> None:
    plain = preftune.train(world.settings(tmp_path / "plain", **SHORT), quiet=True)
    listed = preftune.train(world.settings(tmp_path / "listed", loss=["dpo"], **SHORT), quiet=True)
    assert [r["loss"] for r in plain.metrics()] == [r["loss"] for r in listed.metrics()]
    left, right = weights(plain.model), weights(listed.model)
    assert all(bool((left[n] == right[n]).all()) for n in left)


def labelled(world: World, folder: Path) -> Path:
    rows = read_jsonl(world.file("pairs"))
    return write_jsonl(
        folder / "labelled.jsonl",
        [
            {"prompt": p["prompt"], "completion": p["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
            for i, p in enumerate(rows)
        ],
    )


def test_labelled_rows_train_what_takes_labels_and_are_counted(world: World, tmp_path: Path) -> None:
    left = cli("train", *world.words(tmp_path / "run", loss="kto", data=str(labelled(world, tmp_path)), **SHORT))
    assert left.code == 0, left.err
    assert "32 desirable and 16 undesirable responses" in left.err
    assert "32 desirable and 16" in " ".join(e["message"] for e in Run.open(tmp_path / "run").events())


def test_pairs_make_labels_and_it_is_said(world: World, tmp_path: Path) -> None:
    left = cli("train", *world.words(tmp_path / "run", loss="kto", **SHORT))
    assert "48 desirable and 48 undesirable responses, from preferences" in left.err


def test_an_objective_on_pairs_refuses_labels_and_names_what_fits(world: World, tmp_path: Path) -> None:
    takes_labels = " or ".join(sorted(n for n in LOSSES if first_record(LOSSES[n]) is Labels))
    with pytest.raises(DataError, match=f"no preference .*labelled responses are for loss.name={takes_labels}"):
        preftune.train(world.settings(tmp_path / "run", loss="dpo", data=str(labelled(world, tmp_path)), **SHORT), quiet=True)


@pytest.mark.parametrize(("loss", "said"), [("dpo", True), ("dpo_soft", False)])
def test_confidences_that_nobody_reads_are_said(world: World, tmp_path: Path, loss: str, said: bool) -> None:
    rows = [p | {"confidence": 0.7 if i % 4 else 1.0} for i, p in enumerate(read_jsonl(world.file("pairs")))]
    data = write_jsonl(tmp_path / "sure.jsonl", rows)
    left = cli("train", *world.words(tmp_path / "run", loss=loss, data=str(data), **SHORT))
    assert left.code == 0, left.err
    assert ("36 of 48 preferences are less than certain; dpo counts each as certain" in left.err) == said
