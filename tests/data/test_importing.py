"""Sets that rate several responses: scores averaged or chosen, pairs of each kind, margins kept, rows accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.data.importing import import_file
from preftune.data.read import read_examples
from preftune.data.types import Example, Pair
from preftune.errors import DataError


def completion(text: str, *, help: Any, honesty: Any, overall: float = 0.0) -> dict[str, Any]:
    return {
        "model": "some-model",
        "response": text,
        "annotations": {"helpfulness": {"Rating": help, "Rationale": "since"}, "honesty": {"Rating": honesty}},
        "overall_score": overall,
    }


def ultrafeedback(prompt: str) -> dict[str, Any]:
    answers = [
        completion("worst", help="1", honesty="2", overall=9.0),
        completion("best", help="5", honesty="4", overall=1.0),
        completion("middle", help="N/A", honesty="3", overall=5.0),
        completion("honest", help="1", honesty="5", overall=6.0),
    ]
    return {"source": "there", "instruction": prompt, "models": ["a"] * 4, "completions": answers}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[list[Example], dict[str, int]]:
    out = tmp_path / "out.jsonl"
    counts = import_file(write(tmp_path / "in.jsonl", rows), out, **settings)
    return read_examples(out).examples, counts


def texts(example: Example, pair: Pair) -> tuple[Any, Any, float]:
    return example.responses[pair.winner], example.responses[pair.loser], pair.margin


def test_ultrafeedback_all_pairs_by_the_mean_of_the_aspects(tmp_path: Path) -> None:
    [example], counts = imported(tmp_path, [ultrafeedback("Why?")])
    assert example.scores == (1.5, 4.5, 3.0, 3.0)
    assert {texts(example, p) for p in example.pairs} == {
        ("best", "worst", 3.0), ("best", "middle", 1.5), ("best", "honest", 1.5), ("middle", "worst", 1.5),
        ("honest", "worst", 1.5),
    }  # fmt: skip
    assert counts == {
        "rows": 1, "quarantined": 0, "examples": 1, "joined": 0, "pairs": 5, "pairs_not_chosen": 0, "without_pairs": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("aspects", "pair"),
    [((), ("best", "worst", 3.0)), (("honesty",), ("honest", "worst", 3.0)), (("overall_score",), ("worst", "best", 8.0))],
)
def test_best_against_worst_by_the_aspects_that_are_chosen(tmp_path: Path, aspects: tuple[str, ...], pair: Any) -> None:
    [example], counts = imported(tmp_path, [ultrafeedback("Why?")], aspects=aspects, choice="best_worst")
    assert [texts(example, p) for p in example.pairs] == [pair]
    assert counts["pairs"] == 1


def test_best_against_random_follows_from_the_seed(tmp_path: Path) -> None:
    rows = [ultrafeedback(f"Why {n}?") for n in range(40)]
    first, counts = imported(tmp_path, rows, choice="best_random", seed=1)
    assert counts["pairs"] == 40 and counts["pairs_not_chosen"] == 160
    assert {texts(e, p)[0] for e in first for p in e.pairs} == {"best"}
    assert {texts(e, p)[1] for e in first for p in e.pairs} == {"worst", "middle", "honest"}
    assert imported(tmp_path, rows, choice="best_random", seed=1)[0] == first != imported(
        tmp_path, rows, choice="best_random", seed=2)[0]  # fmt: skip


def test_rows_of_helpsteer_come_together_by_prompt(tmp_path: Path) -> None:
    def row(prompt: str, response: str, *scores: int) -> dict[str, Any]:
        names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
        return {"prompt": prompt, "response": response, **dict(zip(names, scores, strict=True))}

    rows = [row("a?", "long", 1, 1, 1, 4, 4), row("b?", "only", 3, 3, 3, 0, 0), row("a?", "good", 4, 3, 2, 0, 0)]
    [first, second], counts = imported(tmp_path, rows)
    assert [texts(first, p) for p in first.pairs] == [("good", "long", 2.0)] and not second.pairs
    assert (counts["rows"], counts["examples"], counts["joined"], counts["without_pairs"]) == (3, 2, 1, 1)
    [first, _], _ = imported(tmp_path, rows, aspects=("verbosity",))
    assert [texts(first, p) for p in first.pairs] == [("long", "good", 4.0)]


def test_a_response_rated_twice_has_the_mean(tmp_path: Path) -> None:
    rows = [{"prompt": "a?", "response": r, "helpfulness": s} for r, s in (("x", 1), ("y", 2), ("x", 4))]
    [example], counts = imported(tmp_path, rows)
    assert example.scores == (2.5, 2.0) and counts["joined"] == 2


@pytest.mark.parametrize(("strength", "pairs"), [(-2, [("one", "two", 2.0)]), (3, [("two", "one", 3.0)]), (0, [])])
def test_a_stated_strength_is_the_margin(tmp_path: Path, strength: int, pairs: list[Any]) -> None:
    row = {"prompt": "a?", "response_1": "one", "response_2": "two", "preference_strength": strength}
    [example], _ = imported(tmp_path, [row])
    assert [texts(example, p) for p in example.pairs] == pairs


def test_what_cannot_be_rated_is_a_bad_row_with_its_place(tmp_path: Path) -> None:
    rows = [ultrafeedback("Why?"), {"instruction": "Why?", "completions": [completion("x", help="N/A", honesty="")]}]
    with pytest.raises(DataError, match=r"in.jsonl:2: completions\[0\] has no rating that is a number"):
        imported(tmp_path, rows)
    with pytest.raises(DataError, match=r"has no rating of humour; it has overall_score, helpfulness, honesty"):
        imported(tmp_path, [ultrafeedback("Why?")], aspects=("humour",))


def test_the_source_is_never_written_over(tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [ultrafeedback("Why?")])
    before = file.read_bytes()
    with pytest.raises(DataError, match="the data itself"):
        import_file(file, file)
    assert file.read_bytes() == before
