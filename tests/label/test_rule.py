"""Labelling by a rule: exact at temperature 0, Bradley-Terry above, the same whatever else is labelled."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.types import Example
from preftune.errors import ConfigError, DataError
from preftune.label.rule import label_by_rule


def value(prompt: object, response: object) -> float:
    return float(str(response))


def example(name: str, *scores: float) -> Example:
    return Example(name, "prompt", tuple(str(s) for s in scores), source=f"file:{name}")


def test_without_noise_the_higher_score_wins_and_equal_scores_tie() -> None:
    found = label_by_rule([example("a", 1.0, 2.5, 1)], value)
    assert [(f.i, f.j, f.verdict) for f in found] == [(0, 1, "j"), (0, 2, "tie"), (1, 2, "i")]
    assert {(f.example, f.annotator) for f in found} == {("a", "rule:value")}
    assert found[0].why == "1 against 2.5" and found[0].shown_order == (0, 1)


def test_the_annotator_can_be_named() -> None:
    assert label_by_rule([example("a", 1, 2)], value, annotator="rule:rubric")[0].annotator == "rule:rubric"


@pytest.mark.parametrize(
    ("scores", "expected"), [((3, 9, 1, 9), (1, 2, "i")), ((1, 5), (0, 1, "j")), ((4, 4.0, 4.00), (0, 1, "tie"))]
)
def test_best_and_worst(scores: tuple[float, ...], expected: tuple[int, int, str]) -> None:
    [found] = label_by_rule([example("a", *scores)], value, pairs="best_worst")
    assert (found.i, found.j, found.verdict) == expected


def test_fewer_than_two_responses_have_nothing_to_compare() -> None:
    assert label_by_rule([example("a"), example("b", 1)], value) == []


@pytest.mark.parametrize(("difference", "temperature"), [(0.0, 1.0), (1.0, 1.0), (-2.0, 1.0), (1.0, 4.0), (0.25, 0.25)])
def test_noise_follows_bradley_terry(difference: float, temperature: float) -> None:
    n = 1500
    found = label_by_rule([example(str(at), difference, "0.0") for at in range(n)], value, temperature=temperature, seed=3)  # type: ignore[arg-type]
    share = sum(f.verdict == "i" for f in found if f.i == 0) / n
    expected = 1 / (1 + math.exp(-difference / temperature)) if difference else 0.0  # "0.0" twice is the same text: a tie
    assert abs(share - expected) < 4 * 0.5 / math.sqrt(n)


def test_the_same_text_twice_always_ties() -> None:
    found = label_by_rule([example(str(at), 1, 1) for at in range(50)], value, temperature=1.0)
    assert {f.verdict for f in found} == {"tie"}


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.integers(0, 9), st.sampled_from([0.0, 0.5, 2.0]))
def test_a_verdict_depends_on_its_own_example_only(scores: list[float], seed: int, temperature: float) -> None:
    mine = example("mine", *scores)
    others = [example(f"other{at}", 1, 2, 3) for at in range(3)]
    random.Random(seed).shuffle(others)
    alone = label_by_rule([mine], value, temperature=temperature, seed=seed)
    among = label_by_rule([*others, mine], value, temperature=temperature, seed=seed)
    assert [f for f in among if f.example == "mine"] == alone


def test_the_seed_changes_noisy_verdicts_and_no_exact_ones() -> None:
    examples = [example(str(at), 0.0, 0.1) for at in range(100)]
    assert label_by_rule(examples, value, temperature=1.0, seed=0) != label_by_rule(examples, value, temperature=1.0, seed=1)
    assert label_by_rule(examples, value, seed=0) == label_by_rule(examples, value, seed=1)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature: must be 0 or a positive number"):
        label_by_rule([], value, temperature=temperature)


def test_a_score_that_is_no_number_names_the_row() -> None:
    with pytest.raises(DataError, match=r"file:a: .*response 1 .* nan"):
        label_by_rule([example("a", 1, float("nan"))], value)


def test_huge_differences_do_not_overflow() -> None:
    [found] = label_by_rule([example("a", -1e6, 1e6)], value, temperature=1e-3)
    assert found.verdict == "j"
