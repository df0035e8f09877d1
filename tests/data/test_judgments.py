"""The file of judgments: reads back what was written, says what is wrong where, and settles the lines of one annotator."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.judgments import append_judgments, mirrored, read_judgments, settled
from preftune.data.types import Judgment
from preftune.errors import DataError
from preftune.run import Run

VERDICTS = ("i", "j", "tie", "both_bad", "unscored")


def verdict(what: str, order: tuple[int, int] = (0, 1), **others: Any) -> Judgment:
    values = {"example": "e", "i": 0, "j": 1, "annotator": "anna"} | others
    return Judgment(**values, verdict=what, shown_order=order)


LINES = st.lists(
    st.tuples(st.text(max_size=5), st.sampled_from(VERDICTS), st.booleans(), st.floats(0, 1) | st.none(), st.text(max_size=9))
)


@given(LINES)
def test_what_was_written_reads_back(tmp_path_factory: pytest.TempPathFactory, lines: list[Any]) -> None:
    file = tmp_path_factory.mktemp("j") / "judgments.jsonl"
    made = [Judgment(e, 0, 2, v, "a", (2, 0) if turned else (0, 2), 1.5, "", w, p) for e, v, turned, p, w in lines]
    append_judgments(file, made[:3])
    append_judgments(file, made[3:])
    assert read_judgments(file) == made


def test_a_torn_last_line_is_no_verdict_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    file = tmp_path / "judgments.jsonl"
    append_judgments(file, [verdict("i"), verdict("j")])
    file.write_bytes(file.read_bytes()[:-7])
    assert read_judgments(file) == [verdict("i")]
    append_judgments(file, [verdict("tie")])
    assert read_judgments(file) == [verdict("i"), verdict("tie")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"verdict": "left"}, "verdict is 'left', expected one of i, j, tie, both_bad, unscored"),
        ({"j": 0}, "i=0, j=0: expected the numbers of two different responses"),
        ({"i": True}, "i=True, j=1"),
        ({"shown_order": [0, 2]}, r"shown_order is \[0, 2\], expected \[0, 1\] or \[1, 0\]"),
        ({"p": 1.5}, "p is 1.5, expected a probability"),
        ({"seconds": -1}, "seconds is -1"),
        ({"annotator": 3}, "example, annotator, at and why are texts"),
        ({"colour": "red"}, "colour: a judgment has no such field"),
    ],
)
def test_every_bad_line_is_named_with_its_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    file = tmp_path / "judgments.jsonl"
    good = json.dumps(asdict(verdict("i")))
    bad = json.dumps(asdict(verdict("i")) | change)
    file.write_text(f"{good}\n{bad}\nno\n{{}}\n")
    with pytest.raises(DataError, match=rf"(?s)3 of 4 lines.*:2: {reason}.*:3: not JSON.*:4: example, i, j"):
        read_judgments(file)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_judgments(tmp_path / "none.jsonl")
    run = Run(tmp_path)
    assert run.judgments() == []
    run.log_judgments([verdict("i")])
    assert run.judgments() == [verdict("i")]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("i", "i", "i"), ("i", "j", "tie"), ("i", "tie", "tie"), ("tie", "tie", "tie"), ("both_bad", "both_bad", "both_bad"),
     ("both_bad", "i", "tie"), ("unscored", "i", "unscored"), ("unscored", "unscored", "unscored")],
)  # fmt: skip
def test_two_orders_settle_on_what_they_share(one: str, other: str, expected: str) -> None:
    [found] = settled([verdict(one), verdict(other, (1, 0))])
    assert (found.verdict, found.shown_order) == (expected, (0, 1))


def test_the_last_of_one_order_counts_and_annotators_stay_apart() -> None:
    lines = [verdict("unscored"), verdict("j", annotator="ben"), verdict("i", (1, 0)), verdict("i"), verdict("j", example="f")]
    found = settled(lines)
    assert [(f.example, f.annotator, f.verdict) for f in found] == [("e", "anna", "i"), ("e", "ben", "j"), ("f", "anna", "j")]


def test_the_names_of_the_two_do_not_matter() -> None:
    turned = mirrored(verdict("i", p=0.75))
    assert (turned.i, turned.j, turned.verdict, turned.p) == (1, 0, "j", 0.25)
    assert settled([turned, verdict("i", (1, 0), p=0.25)]) == [verdict("i", p=0.5)]
    assert settled([verdict("i", p=0.75), verdict("i", (1, 0))])[0].p is None


def test_a_hundred_thousand_judgments_are_read_and_settled_in_seconds(tmp_path: Path) -> None:
    file = tmp_path / "judgments.jsonl"
    append_judgments(file, [verdict(VERDICTS[k % 4], example=f"e{k // 2}", annotator=f"a{k % 2}") for k in range(100_000)])
    began = time.process_time()
    assert len(settled(read_judgments(file))) == 100_000
    assert time.process_time() - began < 5
