"""Curves: spikes stay visible, bands cover, and a plot can be read as a table."""

from __future__ import annotations

import json
import math

import numpy as np

from preftune.evaluate.best_of import kl_at_most
from preftune.evaluate.estimate import Estimate
from preftune.report.curves import Course, curves, running, series
from preftune.report.frontier import Point, frontier
from preftune.report.plots import Line, Plot


def test_a_series_skips_what_is_no_finite_number() -> None:
    rows = [
        {"step": 2, "split": "train", "loss": 0.5},
        {"step": 0, "split": "train", "loss": 0.7},
        {"split": "train", "loss": 1.0},
    ]
    rows += [{"step": 1, "split": "train", "loss": value} for value in (None, "x", float("nan"))]
    assert series(rows, "loss", "train") == [(0, 0.7), (2, 0.5)]
    assert series(rows, "loss", "eval") == []


def test_a_spike_of_one_step_among_ten_thousand_is_drawn() -> None:
    odd = {6543: 4.5, 17: 0.1}
    rows = [{"step": k, "split": "train", "loss": odd.get(k, 0.5)} for k in range(10_000)]
    [plot] = curves([Course("first", rows)])
    faint, mean = plot.lines
    points = dict(zip(faint.x, faint.y, strict=True))
    assert points[6543] == 4.5 and points[17] == 0.1 and len(points) <= 800
    assert mean.draw == "line" and len(mean.x) <= 240 and len(plot.block()) < 30_000


def test_short_runs_are_drawn_value_by_value() -> None:
    rows = [{"step": k, "split": "train", "loss": 1.0 / (k + 1)} for k in range(19)]
    [plot] = curves([Course("first", rows)])
    [line] = plot.lines
    assert list(line.y) == [1.0 / (k + 1) for k in range(19)] and not line.low


def test_the_band_covers_the_mean_of_what_is_drawn_about_as_often_as_it_says() -> None:
    """A line with noise, and the mean of the same window without it."""
    draw, hits, total = np.random.default_rng(0), 0, 0
    for _ in range(30):
        trend = np.linspace(0, 3, 480)
        points = list(enumerate((trend + draw.normal(0, 1, 480)).tolist()))
        line = running(points)
        window = 480 // 12
        for x, low, high in list(zip(line.x, line.low, line.high, strict=True))[::60]:
            truth = trend[int(x) - window // 2 : int(x) - window // 2 + window].mean()
            assert low is not None and high is not None
            hits, total = hits + (low <= truth <= high), total + 1
    assert 0.9 <= hits / total <= 0.98


def test_a_run_alone_shows_training_held_out_and_the_evaluation_and_several_show_one_line_each() -> None:
    rows = [{"step": k, "split": split, "rewards/accuracies": 0.6} for k in range(0, 40) for split in ("train", "eval")]
    one = Course("first", rows, {"rewards/accuracies": Estimate(0.7, 0.66, 0.74, 500)})
    [alone] = curves([one])
    assert [(line.name, line.draw) for line in alone.lines] == [
        ("each step", "faint"), ("training", "line"), ("held out", "dots"), ("evaluated", "points"),
    ]  # fmt: skip
    [together] = curves([one, one._replace(name="second")])
    assert [(line.name, line.colour) for line in together.lines] == [("first", 0), ("second", 1)]


def test_a_run_on_own_replies_shows_its_score_and_no_note_on_data() -> None:
    rows = [{"step": step, "split": side, "loss": 0.1, "kl": 0.0, "objective/scores": 1.0 + step, "objective/kl": 0.5 * step}
            for step in range(3) for side in ("train", "eval")]  # fmt: skip
    drawn = {plot.title: plot for plot in curves([Course("ppo", rows)])}
    assert list(drawn) == ["Score", "KL of own replies", "Loss", "KL from the reference"]
    assert [list(line.y) for line in drawn["Score"].lines] == [[1.0, 2.0, 3.0]] * 2
    assert "ln 2" not in drawn["Loss"].note and "data" not in drawn["KL from the reference"].note
    assert "ln 2" in curves([Course("dpo", [{"step": 0, "split": "train", "loss": 0.7}])])[0].note


def test_a_plot_reads_as_a_table() -> None:
    held_out = Line("held out", (0, 50, 100), (0.7, 0.6, None), low=(0.6, 0.5, None), high=(0.8, 0.7, None))
    head, rows = Plot("Loss", "step", "nats", [held_out, Line("training", (0, 100), (0.71, 0.5))]).table()
    assert head == ["step", "held out", "training"]
    assert rows == [["0", "0.7 [0.6, 0.8]", "0.71"], ["50", "0.6 [0.5, 0.7]", ""], ["100", "", "0.5"]]
    _, long = Plot("", "", "", [Line("", range(10_000), [0.0] * 10_000)]).table()
    assert len(long) == 12 and long[0][0] == "0" and long[-1][0] == "9,999"


def test_the_block_of_a_plot_ends_no_script_and_holds_no_infinity() -> None:
    block = Plot("</script><!--", "&", "y", [Line("a", (0, 1), (math.inf, 1 / 3))]).block()
    assert not set("<>&") & set(block)
    assert json.loads(block)["title"] == "</script><!--" and json.loads(block)["lines"][0]["y"] == [None, 0.333333]


def test_the_frontier_joins_a_group_and_stands_beside_best_of_n() -> None:
    def at(value: float) -> Estimate:
        return Estimate(value, value - 1, value + 1, 9)

    points = [
        Point("far", at(9.0), at(80.0), "dpo"),
        Point("near", at(2.0), at(70.0), "dpo"),
        Point("lost", at(math.nan), at(1.0)),
    ]
    plot = frontier(points, gain="win rate, %", best_of_wins=True)
    dpo, best = plot.lines
    assert dpo.labels == ["near", "far"] and dpo.draw == "dots" and dpo.x_low == [1.0, 8.0]
    drawn = dict(zip(best.x, best.y, strict=True))
    assert drawn[kl_at_most(4)] == 80.0 and math.isclose(kl_at_most(4), math.log(4) - 0.75)
    assert len(frontier(points, gain="reward").lines) == 1


def test_best_of_n_wins_and_costs_what_is_drawn() -> None:
    """Simulated: ten million numbers, of which the best of n are kept."""
    draw = np.random.default_rng(0)
    for n in (2, 4, 16):
        best, one = draw.random((20_000, n)).max(1), draw.random(20_000)
        assert abs((best > one).mean() - n / (n + 1)) < 0.01
        # density of the best of n uniform numbers is n u^(n-1); its KL from the uniform one is the mean of the log of that
        assert abs(np.log(n * best ** (n - 1)).mean() - kl_at_most(n)) < 0.02
