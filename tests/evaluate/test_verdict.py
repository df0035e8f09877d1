"""The sentence says what the numbers say."""

from __future__ import annotations

from typing import Any

import pytest

from preftune.evaluate.estimate import Estimate
from preftune.evaluate.record import Answers, Evaluation, Preferences, Samples
from preftune.evaluate.verdict import verdict
from preftune.evaluate.wins import counted

NONE = Estimate(0.0, 0.0, 0.0, 1)


def pairs(low: float, high: float) -> Preferences:
    accuracy = Estimate((low + high) / 2, low, high, 100)
    return Preferences(100, 0, accuracy, NONE, None, 0.6, NONE, NONE, NONE, None, None, None, None)


def moved(kl: float) -> Samples:
    answers = Answers(NONE, NONE, NONE, NONE, 0.0, 0.0, 1.0)
    estimate = Estimate(kl, kl * 0.9, kl * 1.1, 9)
    return Samples(9, 1, 64, 0, estimate, estimate, None, answers, answers)


def said(**parts: Any) -> tuple[str, bool | None]:
    return verdict(Evaluation("runs/a", "base", 0.1, "dpo", "", "", None, **parts))


@pytest.mark.parametrize(
    ("parts", "worked", "words"),
    [
        ({"held_out": pairs(0.6, 0.8)}, True, "Alignment worked: it prefers as people do in 70.0%"),
        ({"held_out": pairs(0.2, 0.4)}, False, "Alignment did NOT work"),
        ({"held_out": pairs(0.45, 0.6), "samples": moved(3.0)}, None, "Not decided"),
        ({"held_out": pairs(0.45, 0.6), "samples": moved(0.001)}, False, "KL from the reference 0.00"),
        (
            {"held_out": pairs(0.6, 0.8), "wins": (counted([0.0] * 20, judge="j", against="base"),)},
            False,
            "0.0 % [0.0, 0.0] of 20",
        ),
        ({"held_out": pairs(0.2, 0.4), "wins": (counted([1.0] * 20, judge="j", against="base"),)}, True, "beat those of base"),
        ({"wins": (counted([1.0, 0.0] * 10, judge="j", against="base"),)}, None, "Not decided"),
        ({"held_out": pairs(0.6, 0.8), "wins": (counted([None] * 4, judge="j", against="base"),)}, True, "j gave no verdict"),
        ({}, None, "nothing was measured"),
    ],
)
def test_a_judge_counts_before_held_out_pairs_and_half_decides_nothing(parts: Any, worked: bool | None, words: str) -> None:
    sentence, found = said(**parts)
    assert found is worked and words in sentence
