"""Training on the policy's own replies: a step against a hand-written one, a run from settings to model, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import World, cli, write_jsonl

import preftune
from preftune.config import Config
from preftune.data.types import Tree
from preftune.engine.policy import Path as Way
from preftune.engine.policy import Policy
from preftune.errors import ConfigError, DataError, TrainingError
from preftune.losses.objective import objective
from preftune.rollout_settings import Reward, Rollout
from preftune.run import Run
from preftune.training import rollouts
from preftune.training.assemble import Known
from preftune.training.rewards import Rewards, Tie
from preftune.training.rollouts import Schedule
from preftune.training.step import Micro, backward
from preftune.training.written import Written, load

RULE = """
def e(prompt, response):
    return -float(response.count("e"))


def nan(prompt, response):
    return float("nan")
"""
OWN = {
    "rollout__prompts": 8, "rollout__max_tokens": 6, "rollout__epochs": 2, "batch__pairs_per_step": 4, "steps": 6,
    "eval__every": 6, "eval__fraction": 0.1, "samples__n": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rule") / "rule.py"
    file.write_text(RULE)
    return f"{file}:e"


def own(world: World, out: Path, rule: str, **more: Any) -> dict[str, Any]:
    """Settings of a short run on own replies."""
    return world.settings(out, **{"loss": "ppo", "reward__rule": rule, **OWN, **more})


# The step


def known_of(trees: list[Tree], seed: int) -> tuple[Known, Tensor]:
    """Made-up old log-probs and advantages, and the reference's log-probs; of a reply all tokens have one advantage."""
    rng = np.random.default_rng(seed)
    sizes = [len(b.ids) for t in trees for b in t.branches]
    n = sum(sizes)
    advantage = np.repeat(rng.normal(size=len(sizes)), sizes)
    parts = [rng.normal(-4, 0.5, n), advantage, rng.normal(size=n), rng.normal(size=n)]
    return Known(*(torch.from_numpy(p) for p in parts)), torch.from_numpy(rng.normal(-4, 0.5, n))


def by_hand(name: str, logps: Tensor, known: Known, ref: Tensor, sizes: list[int]) -> Tensor:
    """The step's loss, written out reply by reply and token by token."""
    parts = [x.split(sizes) for x in (logps, known.old_logp, known.advantage, ref)]
    replies = []
    for logp, old, advantage, theirs in zip(*parts, strict=True):
        apart = (logp - old).sum()[None] if name == "rloo" else logp - old
        a = advantage[: len(apart)]
        surrogate = torch.min(apart.exp() * a, apart.exp().clamp(0.8, 1.2) * a)
        if name == "grpo":
            ratio = (theirs - logp).exp()
            surrogate = (surrogate - 0.04 * (ratio - ratio.log() - 1)).mean()[None]
        replies.append(-surrogate)
    return torch.cat(replies).mean()  # over all tokens, or over all replies


@pytest.mark.parametrize("cuts", [[[0, 1, 2, 3]], [[2], [0, 3], [1]]], ids=["whole", "in three"])
@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo"])
def test_the_gradient_of_a_step_is_that_of_the_loss_written_by_hand(name: str, cuts: list[list[int]]) -> None:
    trees = tiny.forest(3, n=4, k=2)
    model = tiny.model()
    policy = Policy(model, Way("forest", "own"))
    known, ref = known_of(trees, 0)
    sizes = [len(b.ids) for t in trees for b in t.branches]
    edges = np.cumsum([0, *(sum(len(b.ids) for b in t.branches) for t in trees)])
    with tiny.Float64():
        by_hand(name, tiny.textbook(tiny.oracle(model), trees), known, ref, sizes)
        twin = tiny.oracle(model)
        by_hand(name, tiny.textbook(twin, trees), known, ref, sizes).backward()
        wanted = tiny.gradients(twin)
        micros = []
        for group in cuts:
            at = torch.from_numpy(np.concatenate([np.arange(edges[i], edges[i + 1]) for i in group]))
            batch = policy.pack([trees[i] for i in group])
            micros.append(Micro(batch, ref[at], known=Known(*(x[at] for x in known))))
        n_units = sum(sizes) if name == "ppo" else len(sizes)
        backward(policy, micros, [objective(name, {})], n_units=[n_units])
    assert tiny.relative(tiny.gradients(model), wanted) < 1e-9


# Which replies make which update


@given(
    n=st.integers(1, 40), prompts=st.integers(1, 16), per_step=st.integers(1, 20), epochs=st.integers(1, 3),
    passes=st.sampled_from([0.3, 1.0, 2.5]),
)  # fmt: skip
@settings(max_examples=30)
def test_every_reply_is_learnt_from_once_in_each_pass(n: int, prompts: int, per_step: int, epochs: int, passes: float) -> None:
    settings = {"loss": "ppo", "rollout.prompts": prompts, "rollout.epochs": epochs, "batch.pairs_per_step": per_step}
    schedule = Schedule(Config.of({**settings, "epochs": passes}), n)
    seen: dict[int, list[int]] = {}
    for step in range(schedule.n_steps):
        taken = schedule.taken(step)
        assert 0 < len(taken) <= per_step
        seen.setdefault(schedule.place(step).iteration, []).extend(taken.tolist())
    assert len(seen) == schedule.n_iterations == math.ceil(-(-n // prompts) * passes - 1e-9)
    for iteration, members in seen.items():
        assert sorted(members) == sorted(list(range(len(schedule.prompts(iteration)))) * epochs)
    first = [i for k in range(min(schedule.n_iterations, -(-n // prompts))) for i in schedule.prompts(k)]
    assert len(set(first)) == len(first), "no prompt is asked twice before all were asked"


def test_steps_may_end_in_the_middle_of_an_iteration() -> None:
    config = Config.of({"loss": "ppo", "rollout.prompts": 4, "rollout.epochs": 2, "batch.pairs_per_step": 2, "steps": 6})
    schedule = Schedule(config, 100)
    assert (schedule.n_steps, schedule.n_iterations) == (6, 2)
    assert [schedule.place(s) for s in (0, 3, 4, 5)] == [(0, 0), (0, 3), (1, 0), (1, 1)]
    assert schedule.epochs(3) == pytest.approx(4 / 100, abs=0.001)


# Rewards


@given(batches=st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=5), min_size=1, max_size=5))
def test_the_running_scale_is_that_of_all_scores_so_far(batches: list[list[float]]) -> None:
    rewards = Rewards(Reward(normalize=True, no_end=0.5), lambda examples: [])
    for batch in batches:
        rewards.take_in(torch.tensor(batch, dtype=torch.float64))
    everything = np.concatenate(batches)
    deviation = max(float(everything.std()), 1e-8)
    scores = torch.tensor(batches[-1], dtype=torch.float64)
    found = rewards.earned(scores, torch.tensor([True] * len(scores)))
    if deviation > 1e-6:
        assert found.tolist() == pytest.approx((scores.numpy() - everything.mean()) / deviation, rel=1e-6, abs=1e-6)


def test_a_reply_without_an_end_pays_and_scores_are_cut() -> None:
    rewards = Rewards(Reward(clip=2.0, no_end=1.5), lambda examples: [])
    found = rewards.earned(torch.tensor([5.0, -9.0, 1.0], dtype=torch.float64), torch.tensor([True, False, False]))
    assert found.tolist() == [2.0, -3.5, -0.5]


def test_the_tie_follows_the_kl_and_never_leaps() -> None:
    """Ziegler et al., §2.2, with K = 0.1: at most 2 % an iteration."""
    tie = Tie(Rollout(beta=0.1, kl_target=6.0))
    for kl, wanted in ((6.0, 0.1), (6.6, 0.1 * 1.01), (600.0, 0.1 * 1.01 * 1.02), (0.0, 0.1 * 1.01 * 1.02 * 0.98)):
        tie.follow(kl)
        assert tie.beta == pytest.approx(wanted, rel=1e-12)
    fixed = Tie(Rollout(beta=0.1))
    fixed.follow(100.0)
    assert fixed.beta == 0.1


# The run


@pytest.mark.parametrize(
    "more",
    [
        {"rollout__kl_target": 2.0},
        {"rollout__estimator": "rloo", "rollout__n": 2},
        {"loss": "rloo", "rollout__n": 2, "lora__r": 2},
        {"loss": "grpo", "rollout__n": 3, "reward__normalize": True},
    ],
    ids=["ppo", "ppo without a critic", "rloo with lora", "grpo"],
)
def test_each_trains(world: World, tmp_path: Path, rule: str, more: dict[str, Any]) -> None:
    run = preftune.train(own(world, tmp_path / "run", rule, **more), quiet=True)
    rows = run.metrics(split="train")
    assert len(rows) == 6 and all(math.isfinite(v) for r in run.metrics() for v in r.values() if isinstance(v, float))
    begins = [r for r in rows if "objective/kl" in r]
    assert [r["step"] for r in begins] == [0, 4]
    for row in begins:  # what wrote the replies is what learns from them
        assert row["val/ratio"] == pytest.approx(1, abs=1e-4) and row["policy/approxkl_avg"] < 1e-8
    assert abs(begins[0]["objective/kl"]) < 1e-3 and rows[-1]["weights_moved"] > 0.5
    assert ("loss/value_avg" in rows[0]) == (run.config().rollout.estimator == "gae")  # type: ignore[attr-defined]
    first, last = run.metrics(split="eval")
    assert (first["step"], last["step"]) == (0, 6) and first["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert {r["when"] for r in run.samples()} == {"before", "step 0", "step 6", "after"}
    assert not any("critic" in p.name for p in run.model.iterdir())


def test_a_reward_model_gives_the_rewards_and_starts_the_critic(world: World, tmp_path: Path) -> None:
    short = {"steps": 2, "eval.every": 0, "samples.n": 0}
    reward = preftune.train(world.settings(tmp_path / "reward", loss="bradley_terry") | short, quiet=True)
    settings = own(world, tmp_path / "run", "", reward__model=str(reward.path))
    del settings["reward.rule"]
    run = preftune.train(settings, quiet=True)
    said = [e["message"] for e in run.events()]
    assert "starts as the reward model, which reads the same tokens" in said
    kept = load(run.rollouts_file)
    assert kept is not None and bool(kept.value.any()), "its head says something from the start"
    assert run.config().reward.model == str(reward.path.resolve())


def test_prompts_come_from_any_data_and_what_does_not_fit_is_said(world: World, tmp_path: Path, rule: str) -> None:
    rows = [{"prompt": f"What is {i}?"} for i in range(12)] + [{"prompt": "long " * 400}]
    one, two = write_jsonl(tmp_path / "prompts.jsonl", rows), write_jsonl(tmp_path / "more.jsonl", rows[:3])
    data = json.dumps([str(one), str(two)])
    left = cli("train", *(f"{k}={v}" for k, v in own(world, tmp_path / "run", rule, data=data, steps=2).items()))
    assert left.code == 0, left.err
    assert "3 prompts stand in several sources" in left.err
    assert "1 prompts are not asked:" in left.err and "are more than 256 (batch.max_length" in left.err
    counts = Run.open(tmp_path / "run").read_json(tmp_path / "run" / "data.json")
    assert (counts["prompts"], counts["used"], counts["dropped"]) == (13, 12, 1)


@pytest.mark.parametrize(
    ("shifted", "said"),
    [
        (("logp", "ref_logp"), "the first update of an iteration: .* differs by 0.02 nats"),
        (("ref_logp",), "step 0: .* 0.02 nats"),
    ],
    ids=["not the writer", "not the reference"],
)
def test_log_probs_that_are_not_what_they_should_be_stop_the_run(
    world: World, tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch, shifted: tuple[str, ...], said: str
) -> None:
    judged = rollouts.Rollouts._judged

    def wrong(*given: Any, **named: Any) -> Written:
        found = judged(*given, **named)
        return found._replace(**{name: getattr(found, name) - 0.02 for name in shifted})

    monkeypatch.setattr(rollouts.Rollouts, "_judged", wrong)
    with pytest.raises(TrainingError, match=said):
        preftune.train(own(world, tmp_path / "run", rule), quiet=True)


# What is refused

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no reward": ({"reward__rule": None}, "reward: say what a reply earns"),
    "two rewards": ({"reward__model": "x"}, "a model and a rule are given"),
    "tokens for replies": ({"loss": "rloo", "rollout__estimator": "gae"}, "judges tokens, rloo whole replies"),
    "one reply": ({"loss": "grpo", "rollout__n": 1}, "rollout.n=1: grpo compares replies"),
    "idle critic": ({"loss": "rloo", "critic__lr": 1e-4}, "critic.lr: for rollout.estimator=gae, but it is rloo"),
    "idle scale": ({"rollout__scale": False}, "rollout.scale: for rollout.estimator=grpo, but it is gae"),
    "idle gain": ({"rollout__kl_gain": 0.2}, "rollout.kl_gain: of no effect while β is fixed"),
    "no tie to steer": ({"rollout__beta": 0.0, "rollout__kl_target": 3.0}, "rollout.kl_target: β is 0"),
    "two ties": ({"loss": "grpo", "rollout__beta": 0.1}, "both tie to the reference"),
    "dropout": ({"lora__r": 2, "lora__dropout": 0.1}, "lora.dropout"),
    "another objective": ({"loss": "dpo"}, "reward.rule: for objectives that learn from the policy's own replies"),
    "another reference": ({"reference": "x"}, "reference: it has to be the model as it starts"),
    "several": ({"loss": ["ppo", "sft"]}, "an objective on the policy's own replies stands by itself"),
    "no such rule": ({"reward__rule": "gone.py:f"}, "gone.py: no such file; a rule of your own"),
    "no such metric": ({"eval__metric": "rewards/accuracies"}, "'rewards/accuracies' is not measured by ppo"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_contradicts_itself_is_refused_before_any_work(world: World, tmp_path: Path, rule: str, case: str) -> None:
    more, said = WRONG[case]
    with pytest.raises(ConfigError) as error:
        preftune.train(own(world, tmp_path / "run", rule, **more), quiet=True)
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_rule_that_gives_no_number_is_named(world: World, tmp_path: Path, rule: str) -> None:
    settings = own(world, tmp_path / "run", rule.replace(":e", ":nan"))
    with pytest.raises(DataError, match="the score nan: expected a finite number"):
        preftune.train(settings, quiet=True)


def test_a_plan_is_refused_clearly(world: World, tmp_path: Path, rule: str) -> None:
    left = cli("plan", *(f"{k}={v}" for k, v in own(world, tmp_path / "run", rule).items()))
    assert left.code == 2 and "a run on the policy's own replies cannot be planned yet" in left.err
