"""Preferences derived from judgments: majority, ties, order, and what does not fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.judgments import mirrored
from preftune.data.pairs import choose, labels, preferences
from preftune.data.types import Example, Judgment, Pair
from preftune.errors import ConfigError, DataError

EXAMPLE = Example("a", "prompt", ("zero", "one", "two"), source="file.jsonl:1")


def judged(i: int, j: int, verdict: str, *, example: str = "a", by: str = "ann") -> Judgment:
    return Judgment(example, i, j, verdict, by, shown_order=(i, j))  # type: ignore[arg-type]


def test_one_verdict_makes_one_sure_pair() -> None:
    [found] = preferences([EXAMPLE], [judged(0, 2, "j")]).examples
    assert found.pairs == (Pair(winner=2, loser=0, confidence=1.0),)
    assert (found.id, found.responses, found.source) == (EXAMPLE.id, EXAMPLE.responses, EXAMPLE.source)


def test_the_majority_wins_whatever_order_the_two_are_named_in() -> None:
    votes = [judged(0, 1, "i"), judged(1, 0, "j", by="bob"), judged(1, 0, "i", by="cid")]
    [found] = preferences([EXAMPLE], votes).examples
    assert found.pairs == (Pair(winner=0, loser=1, confidence=pytest.approx(2 / 3)),)


def test_a_tie_is_half_a_vote_each_and_unscored_is_none() -> None:
    votes = [judged(0, 1, verdict, by=verdict) for verdict in ("i", "tie", "unscored")]
    [found] = preferences([EXAMPLE], votes).examples
    assert found.pairs == (Pair(winner=0, loser=1, confidence=0.75),)


@pytest.mark.parametrize("votes", [["tie"], ["both_bad"], ["unscored"], ["i", "j"], []])
def test_an_example_without_a_decision_is_left_out(votes: list[str]) -> None:
    assert preferences([EXAMPLE], [judged(0, 1, verdict, by=verdict) for verdict in votes]).examples == []


def test_pairs_of_the_file_are_replaced_and_the_order_of_examples_is_kept() -> None:
    stated = [Example(name, "p", ("x", "y"), pairs=(Pair(0, 1),)) for name in "cab"]
    found = preferences(stated, [judged(0, 1, "j", example=name) for name in "abc"]).examples
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
    judgments = [judged(i, j, verdict, by=f"annotator {at}") for at, ((i, j), verdict) in enumerate(votes)]
    mixed = list(judgments)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert preferences([EXAMPLE], mixed) == preferences([EXAMPLE], judgments)
    swapped = {"i": "j", "j": "i", "tie": "tie"}
    turned = [judged(one.j, one.i, swapped[one.verdict], by=one.annotator) for one in judgments]
    assert preferences([EXAMPLE], turned) == preferences([EXAMPLE], judgments)


def test_an_annotator_has_one_vote_however_often_it_judged() -> None:
    judge = [Judgment("a", 0, 1, "i", "llm", (0, 1)), Judgment("a", 0, 1, "j", "llm", (1, 0))]  # each time the first: a tie
    [found] = preferences([EXAMPLE], [*judge, judged(0, 1, "i", by="anna")]).examples
    assert found.pairs == (Pair(0, 1, confidence=0.75),)


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 2), st.sampled_from(["i", "j", "tie", "both_bad", "unscored"]))),
    st.sampled_from(["drop", "soft"]),
    st.sampled_from([0.5, 0.6, 1.0]),
    st.integers(1, 3),
    st.sampled_from(["all", "best_worst", "best_random"]),
)
def test_every_comparison_is_kept_or_left_out_for_a_reason(
    votes: list[tuple[str, int, str]], ties: Any, agreement: float, annotators: int, choice: Any
) -> None:
    examples = [EXAMPLE, replace(EXAMPLE, id="b", responses=("same", "same", "other"))]
    compared = [(0, 1), (0, 2), (1, 2)]
    judgments = [judged(*compared[at], verdict, by=by, example="ab"[len(by + verdict) % 2]) for by, at, verdict in votes]
    found = preferences(
        examples, judgments, ties=ties, min_agreement=agreement, min_annotators=annotators, choice=choice, seed=3
    )
    counts = Counter(found.counts)
    apart = {"judgments", "unscored", "comparisons", "examples without a pair"}
    assert counts["comparisons"] == len({(j.example, j.i, j.j) for j in judgments})
    assert counts["comparisons"] == sum(n for name, n in counts.items() if name not in apart)
    assert counts["kept"] == sum(len(e.pairs) for e in found.examples)
    assert counts["examples without a pair"] == len(examples) - len(found.examples)
    assert all(
        p.confidence >= agreement and e.responses[p.winner] != e.responses[p.loser] for e in found.examples for p in e.pairs
    )
    assert choice == "all" or all(len(e.pairs) == 1 for e in found.examples)


def test_reasons_have_names() -> None:
    many = [replace(EXAMPLE, id=name) for name in "abcde"]
    said = {"a": ["i", "j"], "b": ["both_bad"], "c": ["i", "i", "j"], "d": ["unscored"], "e": ["i"]}
    votes = [judged(0, 1, verdict, by=f"{n}", example=e) for e, verdicts in said.items() for n, verdict in enumerate(verdicts)]
    counts = preferences(many, votes, min_agreement=0.7).counts
    assert {k: counts[k] for k in ("kept", "tie", "both bad", "too little agreement", "no verdict", "comparisons")} == {
        "kept": 1, "tie": 1, "both bad": 1, "too little agreement": 1, "no verdict": 1, "comparisons": 5
    }  # fmt: skip


def test_soft_ties_stay_as_pairs_of_confidence_one_half() -> None:
    votes = [judged(0, 1, "i"), judged(0, 1, "j", by="bob"), judged(1, 2, "tie")]
    [found] = preferences([EXAMPLE], votes, ties="soft").examples
    assert found.pairs == (Pair(0, 1, 0.5), Pair(1, 2, 0.5))


def test_a_stated_probability_weighs_more_than_a_verdict() -> None:
    votes = [replace(judged(0, 1, "i"), p=0.55), replace(judged(0, 1, "j", by="bob"), p=0.1)]
    [found] = preferences([EXAMPLE], votes, weigh="confidence").examples
    assert found.pairs == (Pair(1, 0, confidence=pytest.approx(1 - (0.55 + 0.1) / 2)),)
    assert preferences([EXAMPLE], votes).examples == []
    turned = [mirrored(v) for v in votes]
    assert preferences([EXAMPLE], turned, weigh="confidence").examples == [found]


def test_the_margin_of_the_file_is_kept_where_the_judges_agree_with_it() -> None:
    stated = replace(EXAMPLE, pairs=(Pair(0, 1, margin=2.5), Pair(2, 1, margin=1.0)))
    [found] = preferences([stated], [judged(0, 1, "i"), judged(1, 2, "i")]).examples
    assert found.pairs == (Pair(0, 1, margin=2.5), Pair(1, 2, margin=0.0))


def test_best_against_worst_and_best_against_one_at_random() -> None:
    scored = Example("s", "p", ("a", "b", "c", "d"), scores=(3.0, 9.0, 1.0, 9.0),
                     pairs=tuple(Pair(i, j) for i, j in [(1, 0), (0, 2), (1, 2), (3, 0), (3, 2)]))  # fmt: skip
    assert choose(scored, "best_worst").pairs == (Pair(1, 2),)
    drawn = {choose(replace(scored, id=f"{n}"), "best_random").pairs for n in range(60)}
    assert drawn == {(Pair(1, 0),), (Pair(1, 2),)}
    assert choose(scored, "best_random", seed=1) == choose(scored, "best_random", seed=1)
    judged_only = replace(scored, scores=(), pairs=(Pair(0, 1, 0.9), Pair(1, 2, 0.6), Pair(0, 2, 1.0)))
    assert choose(judged_only, "best_worst").pairs == (Pair(0, 2, 1.0),)


def test_labels_for_unpaired_objectives_and_their_balance() -> None:
    examples = [replace(EXAMPLE, id=f"{n}", scores=(1.0, 2.0, 3.0)) for n in range(40)]
    votes = [judged(0, 1, "i", example=f"{n}") for n in range(40)] + [judged(0, 2, "i", example=f"{n}") for n in range(40)]
    found = labels(examples, votes)
    assert all(e.labels == (True, False, False) and not e.pairs and not e.scores for e in found.examples)
    assert (found.counts["good"], found.counts["bad"]) == (40, 80)
    even = labels(examples, votes, balance=True)
    assert (even.counts["good"], even.counts["bad"], even.counts["balanced away"]) == (40, 40, 40)
    assert even == labels(examples, votes, balance=True) != labels(examples, votes, balance=True, seed=1)


def test_both_bad_makes_both_responses_bad_and_a_tie_none() -> None:
    found = labels([EXAMPLE], [judged(0, 1, "both_bad")])
    assert found.examples[0].labels == (False, False, None)
    assert (found.counts["not judged"], found.counts["kept"]) == (1, 2)
    assert labels([EXAMPLE], [judged(0, 1, "tie")]).examples == []


@pytest.mark.parametrize("settings", [{"min_agreement": 0.4}, {"min_agreement": 1.5}, {"min_annotators": 0}])
def test_a_setting_out_of_range_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        preferences([EXAMPLE], [judged(0, 1, "i")], **settings)
