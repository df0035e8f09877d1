"""An evaluation is read back as it was written, and what is none is refused with its place."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from preftune.errors import StorageError
from preftune.evaluate.estimate import Estimate, mean
from preftune.evaluate.record import Answers, Evaluation, Figure, Perplexity, Samples

SURE = Estimate(0.5, 0.4, 0.6, 12)
ONE = Estimate(1.0, -math.inf, math.inf, 1)  # of one prompt there is no interval


def evaluation(**parts: Any) -> Evaluation:
    return Evaluation(
        policy="runs/a", against="base", beta=0.1, objective="dpo", at="2026", verdict="fine", worked=True, **parts
    )


def test_it_is_read_back_as_it_was_written() -> None:
    answers = Answers(SURE, SURE, SURE, SURE, 0.1, 0.2, 1.0)
    found = evaluation(
        samples=Samples(12, 2, 64, 0, SURE, SURE, None, answers, None),
        perplexity=(Perplexity("held-out.txt", 100, 12.5, 12.0, SURE),),
        figures=(Figure("true reward", SURE, SURE),),
        benchmarks={"task": {"acc": 0.5}},
    )
    assert Evaluation.of(json.loads(json.dumps(found.as_dict(), allow_nan=False))) == found


def test_ends_that_json_cannot_say_are_null_and_infinite_again() -> None:
    written = evaluation(figures=(Figure("one", ONE), Figure("none", mean([]))))
    assert written.as_dict()["figures"][0]["value"] == {"value": 1.0, "low": None, "high": None, "n": 1}
    one, none = (figure.value for figure in Evaluation.of(written.as_dict()).figures)
    assert one == ONE
    assert none.n == 0 and all(math.isnan(part) for part in none[:3])


@pytest.mark.parametrize("content", [None, [], {}, {"policy": 3}, {**evaluation().as_dict(), "version": 2}])
def test_what_is_no_evaluation_is_refused(content: Any) -> None:
    with pytest.raises(StorageError, match=r"evaluation\.json.*preftune eval"):
        Evaluation.of(content)
