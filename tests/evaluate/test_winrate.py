"""Win rate as AlpacaEval counts it, on every annotation file that is here; MT-Bench's dialogues and table."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.types import Judgment
from preftune.errors import DataError
from preftune.evaluate.mtbench import Question, dialogues, read_questions, table
from preftune.evaluate.winrate import preference, preferences_for, win_rate


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> dict[str, Any]:
    return dict(json.loads((shared_data / "expected.json").read_text()))


def coded(path: Path) -> list[float | None]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [preference(row["preference"]) for row in json.load(file)]


@pytest.mark.parametrize("model", ["alpaca-7b", "claude-2.1_concise", "FuseChat-Llama-3.1-8B-Instruct"])
def test_published_win_rates_come_out_to_a_millionth(shared_data: Path, expected: dict[str, Any], model: str) -> None:
    published = expected["alpaca_eval"][model]["published"]
    found = win_rate(coded(shared_data / f"alpaca_eval/annotations/{model}.json.gz"))
    for name in ("n_total", "n_wins", "n_wins_base", "n_draws", "win_rate", "standard_error", "discrete_win_rate"):
        assert getattr(found, name) == pytest.approx(published[name], abs=1e-6), name


def test_nulls_are_dropped_and_old_zeros_are_ties(shared_data: Path, expected: dict[str, Any]) -> None:
    [(name, published)] = expected["alpaca_eval_discrete_with_nulls_and_ties"].items()
    found = win_rate(coded(shared_data / f"alpaca_eval/annotations_discrete/{name}.json.gz"))
    assert (found.n_total, found.n_draws, found.n_dropped) == (804, 5, 1)
    assert found.win_rate == pytest.approx(published["published_win_rate"], abs=1e-6)
    assert found.standard_error == pytest.approx(published["published_standard_error"], abs=1e-6)


@given(st.lists(st.none() | st.floats(0, 1), max_size=30))
def test_the_figures_are_those_of_their_definitions(values: list[float | None]) -> None:
    found, kept = win_rate(values), [v for v in values if v is not None]
    assert found.n_total + found.n_dropped == len(values)
    assert found.n_wins + found.n_draws + found.n_wins_base == found.n_total == len(kept)
    if len(kept) > 1:
        mean = sum(kept) / len(kept)
        spread = sum((v - mean) ** 2 for v in kept) / (len(kept) - 1)
        assert found.win_rate == pytest.approx(100 * mean)
        assert found.standard_error == pytest.approx(100 * math.sqrt(spread / len(kept)), abs=1e-9)
    assert win_rate(values[::-1]).as_dict() == found.as_dict(), "the order does not matter, to the last digit"


@pytest.mark.parametrize(
    ("code", "expected"),
    [(1.0, 0.0), (2.0, 1.0), (1.25, 0.25), (0, 0.5), (1.5, 0.5), (None, None), (math.nan, None), (3, None)],
)
def test_the_code_of_a_preference(code: float | int | None, expected: float | None) -> None:
    assert preference(code) == expected


def test_judgments_become_preferences_for_a_response() -> None:
    lines = [
        Judgment("a", 0, 1, "i", "m", (0, 1), p=0.75), Judgment("a", 0, 1, "j", "m", (1, 0), p=0.25),
        Judgment("b", 0, 1, "j", "m", (0, 1)), Judgment("c", 0, 1, "unscored", "m", (0, 1)),
        Judgment("d", 1, 2, "i", "m", (1, 2)),
    ]  # fmt: skip
    assert preferences_for(lines) == [0.5, 1.0, None, 1.0]
    assert preferences_for(lines, response=0) == [0.5, 0.0, None]


# ---- MT-Bench ---------------------------------------------------------------------------------------------------------


def test_a_second_turn_is_judged_with_the_first(tmp_path: Path) -> None:
    questions = [Question("1", "math", ("2+2?", "twice that?"))]
    first, second = dialogues(questions, {"m": {"1": ("4", "8")}}, {"1": ("four", "eight")})
    assert (first.id, first.responses, first.reference) == ("1/1", ("4",), "four")
    assert [m.content for m in second.responses[0]] == ["4", "twice that?", "8"]  # type: ignore[union-attr]
    assert table(questions, [("1/1", 6.0), ("1/2", None)]) == (6.0, {1: 6.0}, {"math": 6.0}, 1, 1)
    with pytest.raises(DataError, match="m: question 1: 1 answers, expected 2"):
        dialogues(questions, {"m": {"1": ("4",)}})
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "turns": []}\n{"id": 2}\n')
    with pytest.raises(DataError, match=r"(?s)2 rows of .*:1: expected an object with question_id and turns"):
        read_questions(tmp_path / "q.jsonl")
