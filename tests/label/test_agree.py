"""Agreement against formulas written out by hand, on PandaLM's three annotators, and where there is no number to give."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.types import Judgment, Verdict
from preftune.label.agree import CATEGORIES, agreement, krippendorff

LABELS: dict[int, Verdict] = {0: "tie", 1: "i", 2: "j"}


def verdict(example: object, annotator: str, said: Verdict, *, i: int = 0, j: int = 1) -> Judgment:
    return Judgment(str(example), i, j, said, annotator, shown_order=(i, j))


@pytest.fixture(scope="module")
def pandalm(shared_data: Path) -> list[Judgment]:
    (file,) = (shared_data / "pandalm").glob("*.jsonl.gz")
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    return [verdict(row["idx"], str(k), LABELS[int(row[f"annotator{k}"])]) for row in rows for k in (1, 2, 3)]


def test_three_annotators_of_pandalm(pandalm: list[Judgment], shared_data: Path) -> None:
    figures: dict[str, Any] = json.loads((shared_data / "expected.json").read_text())["pandalm"]
    found = agreement(pandalm)
    assert found.n_units == found.n_shared == figures["n"]
    for between in found.pairs:
        name = "-".join(between.annotators)
        assert between.kappa.value == pytest.approx(figures["cohen_kappa"][name], abs=1e-12)
        assert between.percent.value == pytest.approx(figures["percent_agreement"][name], abs=1e-12)
    assert found.fleiss.value == pytest.approx(figures["fleiss_kappa"], abs=1e-12)
    assert found.alpha.value == pytest.approx(figures["krippendorff_alpha_nominal"], abs=1e-12)
    assert found.alpha_interval.value == pytest.approx(figures["krippendorff_alpha_interval (0->1.5)"], abs=1e-12)
    for annotator in found.annotators:
        counts = figures["label_counts"][f"annotator{annotator.name}"]
        assert {str(label): annotator.verdicts[said] for label, said in LABELS.items()} == counts
    ours = sum(a.with_others.value or 0 for a in found.annotators) / 3
    assert ours == pytest.approx(figures["leave_one_out_vs_rest_majority (tie between the two others = mean)"], abs=1e-12)


def test_pandalm_with_a_fifth_of_each_annotator_missing(pandalm: list[Judgment], shared_data: Path) -> None:
    figures = json.loads((shared_data / "expected.json").read_text())["pandalm"]
    (name,) = (key for key in figures if "with_missing" in key)
    kept = [row for row in pandalm if int(row.example) % 5 != int(row.annotator) - 1]
    found = agreement(kept)
    assert found.alpha.value == pytest.approx(figures[name], abs=1e-12)
    assert found.alpha.low is not None and found.alpha.high is not None
    assert found.alpha.low < found.alpha.value < found.alpha.high
    marked = [row if int(row.example) % 5 != int(row.annotator) - 1 else replace(row, verdict="unscored") for row in pandalm]
    assert agreement(marked).alpha == found.alpha, "unscored is missing"
    assert agreement(marked).n_unscored == len(pandalm) - len(kept)


def slow_alpha(units: list[list[int]], distance: Callable[[int, int], Fraction]) -> Fraction | None:
    """1 - observed / expected disagreement, over every pair of values within units and over all values, in exact fractions."""
    values = [v for unit in units for v in unit]
    n = len(values)
    within = sum(
        (Fraction(1, len(unit) - 1) * distance(a, b) for unit in units for a, b in itertools.permutations(unit, 2)), Fraction(0)
    )
    between = sum((distance(a, b) for a, b in itertools.permutations(values, 2)), Fraction(0))
    return None if between == 0 else 1 - Fraction(n - 1) * within / between


units_of_verdicts = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=4), min_size=1, max_size=12)


@given(units_of_verdicts)
def test_alpha_is_what_its_definition_gives(units: list[list[int]]) -> None:
    counts = Counter(v for unit in units for v in unit)

    def ordinal(a: int, b: int) -> Fraction:
        low, high = min(a, b), max(a, b)
        return (sum((Fraction(counts[g]) for g in range(low, high + 1)), Fraction(0)) - Fraction(counts[a] + counts[b], 2)) ** 2

    metrics = {
        "nominal": lambda a, b: Fraction(a != b),
        "interval": lambda a, b: Fraction(a - b, 2) ** 2,
        "ordinal": ordinal,
    }
    for level, metric in metrics.items():
        found, expected = krippendorff(units, 4, level), slow_alpha(units, metric)  # type: ignore[arg-type]
        if expected is None:
            assert found.value is None and "every verdict is the same" in found.why
        else:
            assert found.value == pytest.approx(float(expected), abs=1e-9)


@given(st.lists(st.tuples(*[st.sampled_from(CATEGORIES)] * 3), min_size=1, max_size=15))
def test_kappas_are_what_their_definitions_give(rows: list[tuple[Verdict, Verdict, Verdict]]) -> None:
    judgments = [verdict(at, name, said) for at, row in enumerate(rows) for name, said in zip("abc", row, strict=True)]
    random.Random(0).shuffle(judgments)
    found = agreement(judgments)
    n = len(rows)
    for between, (x, y) in zip(found.pairs, ((0, 1), (0, 2), (1, 2)), strict=True):
        observed = Fraction(sum(row[x] == row[y] for row in rows), n)
        chance = sum(
            (Fraction(sum(r[x] == c for r in rows) * sum(r[y] == c for r in rows), n * n) for c in CATEGORIES), Fraction(0)
        )
        assert between.kappa.value == (None if chance == 1 else pytest.approx(float((observed - chance) / (1 - chance))))
    agreed = Fraction(sum(a == b for row in rows for a, b in itertools.permutations(row, 2)), 6 * n)
    shares = [Fraction(sum(row.count(c) for row in rows), 3 * n) for c in CATEGORIES]
    chance = sum((s * s for s in shares), Fraction(0))
    assert found.fleiss.value == (None if chance == 1 else pytest.approx(float((agreed - chance) / (1 - chance))))
    assert found.percent.value == pytest.approx(float(agreed))


def test_the_order_of_the_two_responses_does_not_matter() -> None:
    rows = [verdict(0, "a", "i"), verdict(0, "b", "j"), verdict(1, "a", "tie"), verdict(1, "b", "tie")]
    turned = [replace(r, i=1, j=0, verdict={"i": "j", "j": "i"}.get(r.verdict, r.verdict)) for r in rows if r.annotator == "b"]
    assert agreement([r for r in rows if r.annotator == "a"] + turned).alpha == agreement(rows).alpha


def test_a_judge_that_changes_its_mind_with_the_order_has_tied() -> None:
    both = [Judgment("0", 0, 1, "i", "judge", (0, 1)), Judgment("0", 0, 1, "j", "judge", (1, 0))]
    steady = [Judgment("1", 0, 1, "i", "judge", (0, 1)), Judgment("1", 0, 1, "i", "judge", (1, 0))]
    (found,) = agreement(both + steady).annotators
    assert found.verdicts == {"i": 1, "tie": 1, "j": 0, "both_bad": 0}
    assert (found.first_wins.value, found.consistent.value, found.n_units, found.n_judgments) == (0.75, 0.5, 2, 4)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "0 annotator"),
        ([verdict(0, "a", "i")], "1 annotator: agreement needs two"),
        ([verdict(0, "a", "i"), verdict(1, "b", "j")], "no comparison was judged by two"),
        ([verdict(0, "a", "unscored"), verdict(0, "b", "j")], "no comparison was judged by two"),
        ([verdict(0, "a", "i"), verdict(0, "b", "i")], "every verdict is the same"),
    ],
)
def test_where_there_is_no_number_the_reason_is_given(rows: list[Judgment], why: str) -> None:
    found = agreement(rows)
    assert found.alpha.value is None and why in found.alpha.why
    assert found.fleiss.value is None and found.fleiss.why
    assert all(b.kappa.value is None and b.kappa.why for b in found.pairs)
    json.dumps(found.as_dict(), allow_nan=False)


def test_fleiss_needs_units_that_everybody_judged_and_alpha_does_not() -> None:
    rows = [verdict(0, "a", "i"), verdict(0, "b", "i"), verdict(1, "b", "j"), verdict(1, "c", "i"), verdict(2, "a", "j"),
            verdict(2, "c", "j")]  # fmt: skip
    found = agreement(rows)
    assert found.fleiss.value is None and "by every annotator" in found.fleiss.why
    assert found.alpha.value is not None and found.alpha.n == 3


def test_a_slight_preference_lies_between_a_win_and_a_tie() -> None:
    def alpha(*said: tuple[Verdict, Any]) -> float | None:
        rows = [replace(verdict(n, by, v), strength=s) for n in range(4) for by, (v, s) in zip("ab", said, strict=True)]
        rows += [verdict("x", by, "j") for by in "ab"]
        return agreement(rows).alpha_interval.value

    far, near, same = alpha(("i", ""), ("j", "")), alpha(("i", ""), ("i", "slight")), alpha(("i", "clear"), ("i", ""))
    assert far is not None and near is not None and far < near < 1 == same
    positions = [(0, 1)] * 4 + [(4, 4)]
    expected = slow_alpha([list(p) for p in positions], lambda a, b: Fraction(a - b) ** 2)
    assert expected is not None and near == pytest.approx(float(expected))
