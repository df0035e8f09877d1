"""The best of several runs: figures by name, ties and noise said, seeds put together, and the frontier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.errors import ConfigError
from preftune.evaluate.best_of import best_of
from preftune.evaluate.estimate import Estimate
from preftune.evaluate.record import Evaluation, Wins
from preftune.sweeping.grid import Range
from preftune.sweeping.job import read_sweep
from preftune.sweeping.measure import KL, WIN_RATE, check_metric, direction_of, figure, is_comparable, within_noise
from preftune.sweeping.record import Folder, Plan, Row, best_of_json, write_table
from preftune.sweeping.verdict import candidates, frontier, shown, verdict

ACC = "held_out.accuracy"


def evaluation() -> dict[str, Any]:
    wins = Wins("rule:reward", "sft", 80, 60, 20, 0, 0, Estimate(75.0, 65.0, 84.0, 80), 4.8, None, 31.0, 30.0)
    return Evaluation(
        "a", "b", 0.1, "dpo", "2026-01-01", "It worked.", True, wins=(wins,), benchmarks={"arc": {"acc": 0.5}}
    ).as_dict()


def row(
    name: str, value: float, half: float = math.nan, *, status: str = "done", kl: float | None = None, **settings: Any
) -> Row:
    figures = {ACC: Estimate(value, value - half, value + half, 10)} if status == "done" else {}
    if kl is not None:
        figures[KL] = Estimate(kl, kl, kl, 10)
    return Row(name, settings or {"loss.beta": float(name)}, status, figures=figures)  # type: ignore[arg-type]


def test_figures_are_found_by_path_number_and_name() -> None:
    found = evaluation()
    assert figure("wins.0.win_rate", found, {}) == Estimate(75.0, 65.0, 84.0, 80)
    assert figure("wins.rule:reward.win_rate", found, {}) == figure("wins.0.win_rate", found, {})
    assert figure("wins.0.n_total", found, {})[0] == 80  # type: ignore[index]
    assert figure("benchmarks.arc.acc", found, {})[0] == 0.5  # type: ignore[index]
    assert figure("loss", found, {"loss": 0.6})[0] == 0.6  # type: ignore[index]
    for absent in ("wins.1.win_rate", "samples.kl_per_response", "held_out.accuracy", "worked", "wins.0.length_controlled"):
        assert figure(absent, found, {}) is None
    assert figure("held_out.accuracy", None, {}) is None


NAMES = (
    "loss", "held_out.accuracy", "wins.3.win_rate", "samples.kl_per_token", "samples.policy.tokens.low",
    "figures.true reward.value", "benchmarks.arc.acc", "held_out.by.category.maths", "perplexity.a.policy",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_figures_are_known_before_anything_is_measured(name: str) -> None:
    check_metric(name, ["loss"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("held_out.acuracy", "did you mean held_out.accuracy"),
        ("samples.policy", "is no figure"),
        ("verdict", "is no figure"),
        ("held_out.accuracy.mean", "is one figure and has no parts"),
    ],
)
def test_a_name_that_is_nothing_is_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_metric(name, ["loss"])


def test_what_is_better_is_known_or_asked_for() -> None:
    assert (direction_of("wins.2.win_rate", None), direction_of(KL, None), direction_of("rewards/margins", None)) == (1, -1, 1)
    assert direction_of("loss", "higher") == 1 and direction_of("samples.policy.tokens", "lower") == -1
    with pytest.raises(ConfigError, match="direction higher or lower"):
        direction_of("samples.policy.tokens", None)


def test_a_loss_is_no_common_measure_where_its_settings_vary() -> None:
    assert not is_comparable("loss", ["loss.beta"]) and not is_comparable("held_out.margin", ["optim.lr", "loss.name"])
    assert is_comparable("loss", ["optim.lr"]) and is_comparable("held_out.accuracy", ["loss.beta"])


def test_noise_is_the_interval_of_the_difference() -> None:
    a = Estimate(0.70, 0.66, 0.74, 100)
    assert within_noise(a, Estimate(0.75, 0.71, 0.79, 100)) is True  # 0.05 against √(0.04² + 0.04²) = 0.0566
    assert within_noise(a, Estimate(0.76, 0.72, 0.80, 100)) is False
    assert within_noise(a, Estimate(0.70, math.nan, math.nan, 0)) is None


def test_the_best_is_named_with_who_cannot_be_told_from_it() -> None:
    found = verdict([row("0.1", 0.70, 0.04), row("0.2", 0.75, 0.04), row("0.5", 0.60, 0.04)], ACC, 1)
    assert found.best is not None and found.best.runs == ["0.2"]
    assert [c.runs for c in found.near] == [["0.1"]] and not found.tied
    assert found.sentence == (
        "Best by held_out.accuracy (higher is better): loss.beta=0.2, 0.750 ± 0.040. Within noise of it: loss.beta=0.1 (0.7)."
    )
    assert "worse by more than" in verdict([row("0.1", 0.70, 0.01), row("0.2", 0.75, 0.01)], ACC, 1).sentence


def test_ties_are_said_and_the_earlier_one_is_named_first() -> None:
    found = verdict([row("0.1", 0.7, 0.1), row("0.2", 0.7, 0.1), row("0.5", 0.2)], ACC, 1)
    assert found.best is not None and found.best.runs == ["0.1"] and [c.runs for c in found.tied] == [["0.2"]]
    assert "Exactly as good: loss.beta=0.2." in found.sentence and "several seeds" in found.sentence
    assert verdict([row("0.1", 0.7), row("0.2", 0.6)], ACC, -1).best.runs == ["0.2"]  # type: ignore[union-attr]


def test_nothing_measured_has_no_best() -> None:
    assert verdict([row("0.1", 0, status="failed")], ACC, 1).sentence == "All runs failed."
    assert verdict([row("0.1", 0, status="waiting")], ACC, 1).best is None
    assert verdict([row("0.1", math.nan)], ACC, 1).best is None


def test_seeds_are_repetitions_with_an_interval_over_them() -> None:
    rows = [
        row(f"{b}-{s}", v, 0.3, **{"loss.beta": b, "seed": s})
        for b, s, v in [(0.1, 0, 0.6), (0.1, 1, 0.7), (0.1, 2, 0.8), (0.5, 0, 0.9)]
    ]
    several, one = candidates(rows)
    assert several.settings == {"loss.beta": 0.1} and len(several.runs) == 3
    # Student's t at 2 degrees of freedom: 4.303 · 0.1 / √3
    assert several.figures[ACC].value == pytest.approx(0.7) and several.figures[ACC].high - 0.7 == pytest.approx(
        0.248, rel=0.05
    )
    assert one.figures[ACC] == rows[3].figures[ACC], "one run has its own interval"


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_frontier_is_who_nobody_beats(points: list[tuple[int, int]]) -> None:
    found = candidates([row(str(k), v, kl=float(d), **{"loss.beta": k}) for k, (d, v) in enumerate(points)])
    names = {c.runs[0] for c in frontier(found, ACC, 1)}
    for k, (kl, gain) in enumerate(points):
        beaten = any((d <= kl and v >= gain) and (d, v) != (kl, gain) for d, v in points)
        assert (str(k) in names) == (not beaten)


def test_a_plan_is_read_back_equal(tmp_path: Any) -> None:
    folder = Folder(tmp_path)
    plan = Plan(
        {"loss": {"name": "dpo"}},
        {"loss.beta": (0.1, None, [1]), "optim.lr": Range(1e-5, 1e-3)},
        WIN_RATE,
        1,
        5,
        3,
        {"by": "rule"},
    )
    folder.plan_file.write_text(plan.to_yaml())
    assert Plan.read(folder) == plan


@pytest.mark.parametrize(
    ("e", "text"),
    [
        (Estimate(0.9123, 0.89, 0.93, 9), "0.912 ± 0.020"),
        (Estimate(63.21, 60.0, 66.4, 9), "63.2 ± 3.2"),
        (Estimate(281.13, 274.0, 288.0, 9), "281.1 ± 7.0"),
        (Estimate(0.5, math.nan, math.nan, 0), "0.5"),
        (Estimate(0.5, -math.inf, math.inf, 1), "0.5"),
        (None, ""),
    ],
)
def test_estimates_are_shown_with_half_their_interval(e: Estimate | None, text: str) -> None:
    assert shown(e) == text


def test_prompts_that_best_of_n_does_without_are_said(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.plan_file.write_text(Plan({}, {"loss.beta": (0.1,)}, ACC, 1, None, 0, {}).to_yaml())
    one = Row("0.1", {"loss.beta": 0.1}, "done", figures={KL: Estimate(1.0, 0.9, 1.1, 3)})
    write_table(folder, {"runs": [one.as_dict()]})
    for n_scored, said in ((2, "2 of 3 prompts"), (3, "")):
        folder.best_of_file.write_text(best_of_json([best_of([[0.0, 1.0, 2.0, 3.0]] * n_scored, 2)]))
        notes = "".join(note for note in read_sweep(tmp_path).notes if note.startswith("Best of 2"))
        assert said in notes and bool(said) == bool(notes)
