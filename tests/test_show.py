"""What a person sees while a job runs."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from preftune.run import Run
from preftune.show import Show, line
from preftune.training.job import Finished, Started
from preftune.training.loop import Evaluated, Saved, Step
from preftune.training.prepare import Progress, Said

METRICS = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.3, "kl": 1.25, "grad_norm": 2.0}


def events(path: Path, n_steps: int = 4) -> list[Any]:
    run = Run(path)
    steps = [Step(i, 0.5, 1e-3, 2.0, 1000, 0.5, METRICS) for i in range(n_steps)]
    return [
        Said("data", "[3] rows [bold]read[/]"), Said("warning", "one is odd"), Progress("reference", 10, 40),
        Progress("reference", 40, 40), Started(run, 0, n_steps), Evaluated(0, METRICS, True), *steps, Saved(n_steps),
        Finished(run),
    ]  # fmt: skip


def shown(tmp_path: Path, *, terminal: bool, quiet: bool = False, upto: int | None = None) -> str:
    """What is written for the events."""
    text = StringIO()
    show = Show(quiet=quiet)
    show.console = Console(file=text, force_terminal=terminal, width=200, highlight=False, soft_wrap=True, color_system=None)
    show.live = terminal and not quiet
    with show:
        for event in events(tmp_path)[:upto]:
            show(event)
        if show._bar is not None:
            show._bar.refresh()
    return text.getvalue()


def test_the_line_of_a_terminal_shows_all_that_is_followed(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True, upto=-3)
    assert "loss 0.5000 acc 0.750 margin 0.300 kl 1.25 2,000 tok/s" in text
    assert "3/4" in text
    assert re.search(r"(\d:\d\d|--:--) left", text), "time left"
    assert "reference" in text and "40/40" in text


def test_lines_of_a_log_have_no_control_characters(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=False)
    assert "\x1b" not in text and "\r" not in text
    assert "[3] rows [bold]read[/]" in text, "text of a user is not markup"
    assert "  warning one is odd" in text
    assert "step 4 loss 0.5000" in text and "(0 to go)" in text
    assert "held-out after     0 steps  loss 0.5000 acc 0.750 margin 0.300 kl 1.25  best" in text
    assert text.rstrip().endswith(f"done: the model is in {tmp_path / 'model'}")


def test_quiet_has_no_line_for_a_step(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True, quiet=True)
    assert "tok/s" not in text and "held-out after" in text and "training 4 steps" in re.sub(r"\x1b\[\d*m", "", text)


def test_only_rank_0_talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shown(tmp_path, terminal=False) == ""


def test_a_line_has_what_the_objective_measures() -> None:
    assert line({"loss": 1.5, "grad_norm": 3.0}) == "loss 1.5000"
    assert line(METRICS) == "loss 0.5000 acc 0.750 margin 0.300 kl 1.25"
