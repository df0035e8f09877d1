"""Splitting by prompt: complete, disjoint, deterministic, and stable when rows come and go."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.split import leaked_prompts, split_by_prompt
from preftune.data.types import Example, Message
from preftune.errors import ConfigError


def examples(prompts: list[int]) -> list[Example]:
    return [Example(f"e{i}", f"p{p}", (f"r{i}",)) for i, p in enumerate(prompts)]


PROMPTS = st.lists(st.integers(0, 30), max_size=60)
FRACTIONS = st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.5, 0.99])


@given(PROMPTS, FRACTIONS, st.integers(0, 5))
def test_every_example_is_on_one_side_with_its_prompt(prompts: list[int], fraction: float, seed: int) -> None:
    rows = examples(prompts)
    train, held_out = split_by_prompt(rows, fraction, seed)
    order = {e.id: i for i, e in enumerate(rows)}
    for side, name in ((train, "train"), (held_out, "eval")):
        assert [e.split for e in side] == [name] * len(side)
        assert [order[e.id] for e in side] == sorted(order[e.id] for e in side)
    assert sorted(e.id for e in train + held_out) == sorted(order)
    assert not leaked_prompts(train, held_out)
    n = len(set(prompts))
    assert bool(held_out) == (fraction > 0 and n > 1)
    assert bool(train) == bool(rows)
    assert split_by_prompt(rows, fraction, seed) == (train, held_out)


@given(PROMPTS, PROMPTS, st.integers(0, 5))
def test_a_prompt_keeps_its_side_when_rows_are_added(prompts: list[int], more: list[int], seed: int) -> None:
    always = [100, 101, 102, 103, 104, 105, 106, 107]  # of these some fall on each side for every seed tried
    sides = {}
    for rows in (examples(always + prompts), examples(more + prompts[::-1] + always)):
        train, held_out = split_by_prompt(rows, 0.5, seed)
        assert train
        assert held_out
        for e in train + held_out:
            assert sides.setdefault(e.prompt, e.split) == e.split


@pytest.mark.parametrize("seed", range(4))
def test_the_share_is_met(seed: int) -> None:
    n, fraction = 5000, 0.1
    held_out = split_by_prompt(examples(list(range(n))), fraction, seed)[1]
    assert abs(len(held_out) - n * fraction) < 4 * math.sqrt(n * fraction * (1 - fraction))


def test_seeds_differ() -> None:
    rows = examples(list(range(100)))
    assert split_by_prompt(rows, 0.5, 0) != split_by_prompt(rows, 0.5, 1)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"eval\.fraction is .*, expected a fraction from 0 up to"):
        split_by_prompt(examples([1, 2]), fraction, 0)


def test_leaked_prompts() -> None:
    asked = (Message("user", "p1"),)
    train = [*examples([1, 2, 2]), Example("c", asked, ("x",))]
    held_out = [*examples([3, 2, 2]), Example("d", asked, ("y",))]
    assert [e.id for e in leaked_prompts(train, held_out)] == ["e1", "e2", "d"]
    assert leaked_prompts([], held_out) == []
