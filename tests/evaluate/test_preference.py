"""Held-out pairs against arithmetic in plain float64 on log-probs by the models' own forward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import World, read_jsonl

import preftune
from preftune.data.read import read_examples
from preftune.data.template import build_trees
from preftune.data.types import Branch, Pair, Tree
from preftune.evaluate.models import Models
from preftune.evaluate.preference import Scores, calibration, preferences, score_pairs
from preftune.losses.objective import objective
from preftune.training.material import material


def tree(name: str, prompt: list[int], lengths: list[int], pairs: list[tuple[int, int]]) -> Tree:
    branches = tuple(Branch(np.ones(n, np.int32), np.ones(n, np.bool_)) for n in lengths)
    return Tree(name, np.array(prompt, np.int32), branches, tuple(Pair(*p) for p in pairs))


def scores(*rows: tuple[float, ...]) -> Scores:
    """tree, reward of chosen and rejected, tokens of both; log-ratios are ten times the rewards."""
    t, a, b, n, m = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    return Scores(t.astype(np.int64), a, b, 10 * a, 10 * b, n, m)


def test_figures_of_a_table_that_can_be_counted_by_hand() -> None:
    trees = [tree("a", [1], [4, 4], [(0, 1)]), tree("b", [1], [9, 10], [(0, 1)]), tree("c", [2], [8, 2], [(0, 1)])]
    found = preferences(
        scores((0, 1.0, 0.0, 4, 4), (1, 0.0, 2.0, 9, 10), (2, 0.5, 0.5, 8, 2)),
        trees,
        {"category": {"a": "x", "b": "x", "c": ""}, "source": {"a": "f", "b": "f", "c": "f"}},
        loss=0.7,
    )
    assert (found.n_pairs, found.n_ties, found.loss) == (3, 1, 0.7)
    assert found.accuracy.value == pytest.approx(1.5 / 3) and found.accuracy.n == 3
    assert found.length_only.value == pytest.approx((0.5 + 0 + 1) / 3)
    assert found.length_matched is not None and (found.length_matched.value, found.length_matched.n) == (0.5, 2)
    # a and b are of one prompt: margins 1 and -2 have the mean -0.5, that of the other prompt is 0
    assert (found.margin.value, found.margin.n) == (pytest.approx(-0.25), 2)
    assert found.chosen_log_ratio_per_token is not None
    assert found.chosen_log_ratio_per_token.value == pytest.approx(((10 / 4 + 0) / 2 + 5 / 8) / 2)
    assert {name: (e.value, e.n) for name, e in found.by["category"].items()} == {"x": (0.5, 2), "(none)": (0.5, 1)}
    assert set(found.by["length"]) == {"about as long", "chosen longer"} and "source" not in found.by
    assert found.margins is not None and sum(found.margins.counts) == 3


def test_calibration_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    margin = rng.normal(scale=3, size=1000)
    bins, error = calibration(margin)
    stated = 1 / (1 + np.exp(-abs(margin)))
    assert sum(b.observed.n for b in bins) == 1000
    expected = 0.0
    for b in bins:
        inside = (stated >= b.low) & ((stated < b.high) | (b.high == 1.0))
        assert b.observed.n == inside.sum()
        assert b.observed.value == pytest.approx((margin[inside] > 0).mean())
        assert b.predicted == pytest.approx(stated[inside].mean())
        expected += abs((margin[inside] > 0).sum() - stated[inside].sum()) / 1000
    assert error == pytest.approx(expected)
    assert calibration(np.zeros(0)) == ((), None)


def test_a_policy_that_is_as_sure_as_it_is_right_is_calibrated() -> None:
    rng = np.random.default_rng(1)
    size = abs(rng.normal(scale=2, size=20_000))
    sign = np.where(rng.random(20_000) < 1 / (1 + np.exp(-size)), 1, -1)
    _, error = calibration(size * sign)
    assert error is not None and error < 0.015


@pytest.mark.parametrize("budget", [60, 100_000])
def test_pairs_are_those_of_score_whatever_the_batch(world: World, budget: int) -> None:
    """The same log-probs as `preftune score` gives (which has its own oracle), and DPO's loss from them."""
    models = Models.open(str(world.base), against=str(world.other), beta=0.3, budget=budget)
    trees = build_trees(read_examples(str(world.file("held_out"))).examples, models.renderer)
    goal = (objective("dpo", {"beta": 0.3}),)
    data = material(trees, goal)
    found = score_pairs(models.policy(trees), data, goal, models.reference_logps(trees, lambda *_: None), budget=budget)
    rows = list(preftune.score(world.base, world.file("held_out"), reference=world.other, beta=0.3))
    rewards = np.array([r["reward"] for r in rows]).reshape(-1, 2)
    lengths = np.array([r["n_tokens"] for r in rows]).reshape(-1, 2)
    assert found.pairs.tree.tolist() == list(range(10))
    assert np.allclose(found.pairs.chosen_reward, rewards[:, 0], atol=1e-4)
    assert np.allclose(found.pairs.rejected_reward, rewards[:, 1], atol=1e-4)
    assert np.allclose(found.pairs.chosen_log_ratio * 0.3, rewards[:, 0], atol=1e-4)
    assert found.pairs.chosen_tokens.tolist() == lengths[:, 0].tolist()
    losses = [math.log1p(math.exp(b - a)) for a, b in rewards]
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("name", ["simpo", "kto", "plackett_luce", "tdpo2", "bradley_terry"])
def test_every_kind_of_objective_agrees_with_what_training_logged(world: World, tmp_path: Path, name: str) -> None:
    """Loss, accuracy and margin of the last evaluation during training are those of the same model afterwards."""
    from preftune.evaluate.job import Settings, evaluate
    from preftune.run import Run

    settings: dict[str, Any] = world.settings(tmp_path / "run", loss__name=name, steps=2, eval__every=2, samples__n=0)
    run = preftune.train(settings, quiet=True)
    found = evaluate(Models.open(str(run.path)), Settings(prompts=0)).held_out
    logged = Run(run.path).metrics(split="eval")[-1]
    assert found is not None and found.loss == pytest.approx(logged["loss"], abs=2e-4)
    if name != "kto":  # whose rewards are of single responses
        assert found.accuracy.value == pytest.approx(logged["rewards/accuracies"])
    assert found.margin.value == pytest.approx(logged["rewards/margins"], abs=2e-4)
    assert found.n_pairs == sum(1 for _ in read_jsonl(world.file("pairs"))) - run.read_json(run.data_file)["train_examples"]
