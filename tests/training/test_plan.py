from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.training.plan import Plan, cut, epoch_order


def plan(n: int, per_step: int, *, epochs: float = 1.0, steps: int | None = None, seed: int = 0) -> Plan:
    return Plan.of(n, pairs_per_step=per_step, epochs=float(epochs), steps=steps, seed=seed)


@given(n=st.integers(1, 60), per_step=st.integers(1, 17), seed=st.integers(0, 5), epochs=st.integers(1, 3))
def test_each_example_once_an_epoch(n: int, per_step: int, seed: int, epochs: int) -> None:
    made = plan(n, per_step, epochs=epochs, seed=seed)
    assert made.n_steps == epochs * made.steps_per_epoch
    for epoch in range(epochs):
        first = epoch * made.steps_per_epoch
        steps = [made.examples(first + i).tolist() for i in range(made.steps_per_epoch)]
        assert sorted(i for step in steps for i in step) == list(range(n))
        assert all(len(step) == per_step for step in steps[:-1]) and 1 <= len(steps[-1]) <= per_step


def test_the_order_is_that_of_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    by_7, by_10 = plan(50, 7, epochs=2), plan(50, 10, epochs=2)
    joined = [np.concatenate([p.examples(i) for i in range(p.steps_per_epoch)]).tolist() for p in (by_7, by_10)]
    assert joined[0] == joined[1] == orders[0, 0], "the step's size cuts the order, it does not change it"
    np.random.seed(3)
    assert epoch_order(50, 0, 0).tolist() == orders[0, 0], "no global state"


def test_the_order_is_the_same_in_another_process() -> None:
    code = "from preftune.training.plan import epoch_order; print(epoch_order(20, 4, 2).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(epoch_order(20, 4, 2).tolist())


def test_any_step_can_be_asked_for_first() -> None:
    made = plan(50, 7, epochs=3)
    forward = [made.examples(i).tolist() for i in range(made.n_steps)]
    assert [made.examples(i).tolist() for i in reversed(range(made.n_steps))] == forward[::-1], "as a resumed run does"


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(1, None, 4), (0.5, None, 2), (0.26, None, 2), (0.01, None, 1), (2.75, None, 11), (1, 9, 9), (0.1 + 0.2, None, 2)],
)
def test_number_of_steps(epochs: float, steps: int | None, expected: int) -> None:
    assert plan(31, 8, epochs=epochs, steps=steps).n_steps == expected


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=40), budget=st.integers(1, 150), world=st.integers(1, 4),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_a_cut_keeps_the_budget_and_every_example(lengths: list[int], budget: int, world: int, seed: int) -> None:
    all_lengths = np.array([999] * 5 + lengths, np.int64)
    examples = 5 + np.random.default_rng(seed).permutation(len(lengths)).astype(np.int64)
    ranks = cut(examples, all_lengths, budget=budget, world=world)
    assert len(ranks) == world
    assert len({len(rank) for rank in ranks}) == 1, "every rank the same number of micro-batches"
    micros = [micro for rank in ranks for micro in rank]
    assert sorted(i for micro in micros for i in micro) == sorted(examples.tolist())
    assert all(len(micro) <= 1 or all_lengths[micro].sum() <= budget for micro in micros)
    assert cut(examples[::-1].copy(), all_lengths, budget=budget, world=world) == ranks, "what, not in which order"


@given(seed=st.integers(0, 99), world=st.sampled_from([1, 2, 4]))
def test_micro_batches_cost_about_the_same(seed: int, world: int) -> None:
    lengths = np.random.default_rng(seed).integers(20, 400, 128).astype(np.int64)
    ranks = cut(np.arange(128), lengths, budget=4096, world=world)
    costs = np.array([[lengths[micro].sum() for micro in rank] for rank in ranks])
    assert costs.max() <= costs.mean() * 1.15
    assert costs.sum(1).max() <= costs.sum(1).mean() * 1.1
    assert costs.size <= 1.5 * max(world, -(-lengths.sum() // 4096)) + world, "not more of them than needed"


def test_more_ranks_than_examples() -> None:
    ranks = cut(np.array([3]), np.array([1, 1, 1, 7]), budget=100, world=3)
    assert sorted(ranks) == [[[]], [[]], [[3]]]


def test_a_million_examples() -> None:
    lengths = np.random.default_rng(0).integers(50, 2000, 1_000_000).astype(np.int64)
    made = plan(1_000_000, 128)
    made.examples(0)
    started = time.process_time()
    for step in range(20):
        cut(made.examples(step), lengths, budget=8192, world=8)
    assert (time.process_time() - started) / 20 < 0.02, "seconds a step; a few ms on an idle machine"
