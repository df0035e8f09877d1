"""Preferences derived from judgments: majority, ties, order, and what does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.pairs import preferences
from preftune.data.types import Example, Judgment, Pair
from preftune.errors import DataError

EXAMPLE = Example("a", "prompt", ("zero", "one", "two"), source="file.jsonl:1")


def judged(i: int, j: int, verdict: str, *, example: str = "a", by: str = "ann") -> Judgment:
    return Judgment(example, i, j, verdict, by, shown_order=(i, j))  # type: ignore[arg-type]


def test_one_verdict_makes_one_sure_pair() -> None:
    [found] = preferences([EXAMPLE], [judged(0, 2, "j")])
    assert found.pairs == (Pair(winner=2, loser=0, confidence=1.0),)
    assert (found.id, found.responses, found.source) == (EXAMPLE.id, EXAMPLE.responses, EXAMPLE.source)


def test_the_majority_wins_whatever_order_the_two_are_named_in() -> None:
    votes = [judged(0, 1, "i"), judged(1, 0, "j", by="bob"), judged(1, 0, "i", by="cid")]
    [found] = preferences([EXAMPLE], votes)
    assert found.pairs == (Pair(winner=0, loser=1, confidence=pytest.approx(2 / 3)),)


def test_a_tie_is_half_a_vote_each_and_unscored_is_none() -> None:
    [found] = preferences([EXAMPLE], [judged(0, 1, "i"), judged(0, 1, "tie"), judged(0, 1, "unscored")])
    assert found.pairs == (Pair(winner=0, loser=1, confidence=0.75),)


@pytest.mark.parametrize("votes", [["tie"], ["both_bad"], ["unscored"], ["i", "j"], []])
def test_an_example_without_a_decision_is_left_out(votes: list[str]) -> None:
    assert preferences([EXAMPLE], [judged(0, 1, verdict) for verdict in votes]) == []


def test_pairs_of_the_file_are_replaced_and_the_order_of_examples_is_kept() -> None:
    stated = [Example(name, "p", ("x", "y"), pairs=(Pair(0, 1),)) for name in "cab"]
    found = preferences(stated, [judged(0, 1, "j", example=name) for name in "abc"])
    assert [e.id for e in found] == ["c", "a", "b"]
    assert all(e.pairs == (Pair(1, 0),) for e in found)


def test_every_judgment_that_does_not_fit_is_listed_at_once() -> None:
    unknown = judged(0, 1, "i")
    object.__setattr__(unknown, "verdict", "maybe")  # as a file could hold it
    wrong = [judged(0, 1, "i", example="nobody"), judged(0, 3, "i"), judged(1, 1, "i"), unknown, judged(-1, 0, "i")]
    with pytest.raises(DataError) as error:
        preferences([EXAMPLE], wrong)
    message = str(error.value)
    assert message.startswith("5 judgments do not fit")
    for part in ("'nobody'", "response 3 does not exist", "with itself", "'maybe'", "response -1"):
        assert part in message


def test_an_id_that_two_examples_share_is_refused() -> None:
    with pytest.raises(DataError, match=r"file.jsonl:1: id 'a'"):
        preferences([EXAMPLE, Example("a", "other", ("x", "y"))], [])


@given(st.lists(st.tuples(st.sampled_from([(0, 1), (1, 0), (0, 2), (2, 1)]), st.sampled_from(["i", "j", "tie"]))), st.randoms())
def test_the_order_of_judgments_never_matters(votes: list[tuple[tuple[int, int], str]], random: object) -> None:
    judgments = [judged(i, j, verdict) for (i, j), verdict in votes]
    mixed = list(judgments)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert preferences([EXAMPLE], mixed) == preferences([EXAMPLE], judgments)
    swapped = {"i": "j", "j": "i", "tie": "tie"}
    turned = [judged(judgment.j, judgment.i, swapped[judgment.verdict]) for judgment in judgments]
    assert preferences([EXAMPLE], turned) == preferences([EXAMPLE], judgments)
