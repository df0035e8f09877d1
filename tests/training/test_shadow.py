"""A reference that moves, and averages of the policy: what they are, and that a resumed run has the same."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from crashes_for_tests import signalled_at
from worlds import World, cli, finish, same_weights, spawn, timeless, weights

import preftune
from preftune.config import Average
from preftune.engine.policy import Path as ScoringPath
from preftune.engine.policy import Policy
from preftune.errors import ConfigError
from preftune.run import Run
from preftune.training.shadow import Averaged, Shadow


def state(policy: Policy) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy().copy() for name, p in policy.named_parameters()}


def moved(policy: Policy, step: int) -> dict[str, np.ndarray]:
    """The weights after a made-up update."""
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return state(policy)


@pytest.mark.parametrize("settings", [Average(kind="ema", decay=0.7), Average(kind="bema", power=0.6, bias=0.3, lag=5.0)])
def test_averages_are_those_of_their_papers(settings: Average) -> None:
    policy = Policy(tiny.model("llama"), ScoringPath("forest", "own"))
    start = state(policy)
    averaged, mean = Averaged(policy, settings), start
    for step in range(1, 6):
        now = moved(policy, step)
        averaged.update(policy, step)
        share = 0.3 if settings.kind == "ema" else (5 + step) ** -0.6
        mean = {n: mean[n] + share * (now[n] - mean[n]) for n in now}
        correction = 0.0 if settings.kind == "ema" else (5 + step) ** -0.3
        expected = {n: mean[n] + correction * (now[n] - start[n]) for n in now}
        found = averaged.result(policy).weights
        assert max(float(np.abs(found[n].double().numpy() - expected[n]).max()) for n in now) < 1e-6


def test_a_shadow_takes_the_place_of_the_weights_and_leaves_it() -> None:
    policy = Policy(tiny.model("llama"), ScoringPath("forest", "own"))
    batch = policy.pack(tiny.forest(1, n=2))
    shadow, before = Shadow(policy), policy(batch).detach()
    moved(policy, 1)
    policy.train()
    after = policy(batch).detach()
    with shadow.in_place(policy):
        assert torch.equal(policy(batch), before) and not policy.training
    assert torch.equal(policy(batch), after) and policy.training
    with pytest.raises(KeyboardInterrupt), shadow.in_place(policy):
        raise KeyboardInterrupt
    assert torch.equal(policy(batch), after) and policy.training
    shadow.mix(policy, 1.0)
    with shadow.in_place(policy):
        assert torch.equal(policy(batch), after)


@pytest.mark.parametrize("more", [{}, {"lora__r": 4, "optim__lr": 1e-2}], ids=["full", "lora"])
def test_a_reference_that_is_the_policy_of_a_step_ago_is_never_left(world: World, tmp_path: Path, more: dict[str, Any]) -> None:
    settings = world.settings(tmp_path / "run", sync__every=1, batch__tokens_per_microbatch=300, **more)
    for row in preftune.train(settings, quiet=True).metrics():
        assert abs(row["loss"] - math.log(2)) < 1e-5 and row["kl"] < 1e-6


def test_the_reference_moves_when_it_is_said_to_and_by_how_much(world: World, tmp_path: Path) -> None:
    runs = {
        mix: preftune.train(world.settings(tmp_path / f"{mix}", sync__every=2, sync__mix=mix, eval__every=0), quiet=True)
        for mix in (0.5, 1.0)
    }
    frozen = preftune.train(world.settings(tmp_path / "frozen", eval__every=0), quiet=True).metrics()
    soft, hard = (runs[mix].metrics() for mix in (0.5, 1.0))
    assert [r["loss"] for r in soft[:2]] == pytest.approx([r["loss"] for r in frozen[:2]], abs=1e-6)
    assert hard[2]["kl"] < 1e-6 < soft[2]["kl"] < frozen[2]["kl"]
    assert hard[3]["kl"] > 1e-6


def test_the_average_is_what_is_saved_and_measured(world: World, tmp_path: Path) -> None:
    plain = preftune.train(world.settings(tmp_path / "plain"), quiet=True)
    last = preftune.train(world.settings(tmp_path / "last", average__kind="ema", average__decay=0.0), quiet=True)
    slow = preftune.train(world.settings(tmp_path / "slow", average__kind="ema", average__decay=0.9), quiet=True)
    assert same_weights(plain.model, last.model), "an average that keeps nothing is the policy"
    start, end, found = (weights(folder) for folder in (world.base, plain.model, slow.model))
    assert all((found[n] - start[n]).abs().sum() < (end[n] - start[n]).abs().sum() for n in end), "it lags behind"
    assert [r["loss"] for r in slow.metrics(split="train")] == [r["loss"] for r in plain.metrics(split="train")]
    assert slow.metrics(split="eval")[-1]["kl"] < plain.metrics(split="eval")[-1]["kl"]


STATES = {
    "full": {"sync__every": 3, "sync__mix": 0.6, "average__kind": "bema"},
    "lora": {"sync__every": 2, "average__kind": "ema", "lora__r": 2, "lora__dropout": 0.3, "eval__keep": "best"},
}


@pytest.mark.parametrize("kind", STATES)
def test_a_resumed_run_has_the_same_reference_and_average(world: World, tmp_path: Path, kind: str) -> None:
    more = {"steps": 8, "eval__every": 3, **STATES[kind]}
    whole = preftune.train(world.settings(tmp_path / "whole", **more), quiet=True)
    words = ["train", *world.words(tmp_path / "again", **more)]
    assert finish(spawn(signalled_at, words, str(tmp_path / "log"), "update", 5, signal.SIGTERM)) == [75]
    left = cli(*words, "--resume")
    assert left.code == 0, left.err
    again = Run.open(tmp_path / "again")
    assert same_weights(again.model, whole.model)
    assert list(timeless(again.metrics())) == list(timeless(whole.metrics()))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sync.mix": 0.5}, "sync: sync.mix is of no effect while sync.every is 0"),
        ({"average.decay": 0.5}, "average: average.decay is for average.kind=ema, but the kind is null"),
        ({"average.kind": "ema", "average.power": 0.3}, "average.power is for average.kind=bema, but the kind is ema"),
        ({"sync.every": 2, "loss": "sft"}, "sync.every: the objective sft has no reference; leave it out"),
        ({"sync.every": 2, "reference": "other"}, "reference: it has to be the model as it starts, since sync.every moves it"),
    ],
)
def test_what_would_be_of_no_effect_is_refused(world: World, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preftune.train(world.settings(tmp_path / "run") | more, quiet=True)
    assert said in str(caught.value)
