"""The report: everything of a run on one page, nothing that runs or calls out, and no crash on a run that is incomplete."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from preftune.evaluate.estimate import Estimate
from preftune.evaluate.record import Evaluation, Figure
from preftune.evaluate.wins import counted
from preftune.report.curves import curves, series
from preftune.report.page import write_report
from preftune.report.text import number
from preftune.run import Run

ATTACK = "</title></pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>{{ 7 * 7 }}\"'"


class Parsed(HTMLParser):
    """What a browser would make of the page."""

    void = frozenset(("meta", "link", "img", "br", "hr", "input"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "first")
    run.path.mkdir()
    return run


def evaluation(words: str = "plain words") -> Evaluation:
    """What an evaluation says, with `words` in its texts."""
    wins = counted([0.9, 0.8, 1.0], judge=words, against=words)
    figure = Figure(f"Win rate {words}", Estimate(0.938, 0.927, 0.949, 9))
    return Evaluation(
        policy=words, against=words, beta=0.1, objective="dpo", at="", verdict=f"Alignment worked. {words}", worked=True,
        wins=(wins,), figures=(figure,),
    )  # fmt: skip


def fill(run: Run, words: str = "plain words") -> None:
    """A whole run, with `words` wherever a text can come from."""
    for step in range(6):
        row: dict[str, Any] = {"step": step, "split": "train", "loss": 0.6931 - step * 0.02, "kl": step * 0.5}
        row |= {
            "rewards/accuracies": 0.5 + 0.05 * step,
            "rewards/chosen": 0.1 * step,
            "rewards/rejected": -0.2 * step,
            words: 1.0,
        }
        run.log_metrics(row)
        if step in (0, 5):
            run.log_metrics(row | {"split": "eval"})
    run.config_file.write_text(f"model: base\nloss:\n  name: dpo\n# {words}\n")
    run.write_json(run.env_file, {"torch": "2.13.0", "machine": {"name": words, "cores": 2}, words: None})
    run.write_json(run.data_file, {"used": 4700, "files": ["pairs.jsonl", words], "rows": {words: words}})
    run.log_event(words, words)
    asked = [{"role": "user", "content": f"where is my kettle? {words}"}]
    run.log_samples([{"when": when, "prompt": asked, "response": f"{when}: {words}"} for when in ("before", "after")])
    run.write_json(run.evaluation_file, evaluation(words).as_dict())


def test_the_page_shows_what_the_run_holds(run: Run) -> None:
    fill(run)
    assert write_report(run) == run.report_file
    page = Parsed(run.report_file.read_text())
    for shown in (
        "Alignment worked.",
        "0.938",
        "0.927 to 0.949",
        "where is my kettle?",
        "before: plain words",
        "after: plain words",
    ):
        assert shown in page.text
    for shown in ("4,700", "machine.cores", "name: dpo", f"preftune train {run.config_file}", "Accuracy", "0.6931"):
        assert shown in page.text
    assert page.text.index("Alignment worked.") < page.text.index("Before and after") < page.text.index("Training")
    assert page.tags.count("svg") == 4, "loss, accuracy, rewards, KL"
    assert "is not in this run's folder" not in page.text
    assert page.open == []


def test_texts_are_escaped_and_nothing_runs_or_calls_out(run: Run) -> None:
    fill(run, ATTACK)
    html = write_report(run).read_text()
    page = Parsed(html)
    assert not {"script", "img", "iframe", "object", "link", "base", "form", "embed"} & set(page.tags)
    assert page.tags.count("title") == 1
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert value.startswith("#"), (tag, name, value)
        assert "url(#" in value or "url(" not in value, (tag, name, value)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in style and "url(" not in style
    assert page.text.count("<script>alert(1)</script>") >= 8, "shown as the text that it is"
    assert "{{ 7 * 7 }}" in page.text and "default-src 'none'" in html


def test_a_folder_name_is_escaped_too(tmp_path: Path) -> None:
    run = Run(tmp_path / "<b onclick=alert(1)>")
    run.path.mkdir()
    fill(run)
    page = Parsed(write_report(run).read_text())
    assert "b" not in page.tags and "<b onclick=alert(1)>" in page.text


def test_missing_files_are_stated(run: Run) -> None:
    page = Parsed(write_report(run).read_text())
    for name in ("evaluation.json", "samples.jsonl", "metrics.jsonl", "data.json", "events.jsonl", "config.yaml", "env.json"):
        assert f"{name} is not in this run's folder." in page.text
    assert "was not evaluated" in page.text and "svg" not in page.tags


@pytest.mark.parametrize(
    "name", ["evaluation.json", "samples.jsonl", "metrics.jsonl", "data.json", "events.jsonl", "config.yaml", "env.json"]
)
@pytest.mark.parametrize("content", [b"", b"{torn", b"[1, 2]\n", b"\xff\xfe\n", b"null\n", b'{"rows": 3, "step": "x"}\n'])
def test_a_damaged_file_never_stops_the_page(run: Run, name: str, content: bytes) -> None:
    (run.path / name).write_bytes(content)
    page = Parsed(write_report(run).read_text())
    assert page.open == [] and "Before and after" in page.text
    assert f"{name} is not in this run's folder" not in page.text
    if content == b"\xff\xfe\n":
        assert f"{name} could not be read" in page.text


def test_a_row_that_was_torn_leaves_the_others(run: Run) -> None:
    fill(run)
    with run.metrics_file.open("ab") as file:
        file.write(b'{"step": 6, "spl')
    assert Parsed(write_report(run).read_text()).tags.count("svg") == 4


def test_samples_of_one_prompt_stand_side_by_side(run: Run) -> None:
    answers = [
        ("before", "p", "one"),
        ("before", "p", "two"),
        ("before", "q", "lone"),
        ("after", "p", "uno"),
        ("after", "p", ""),
    ]
    run.log_samples([{"when": when, "prompt": prompt, "response": response} for when, prompt, response in answers])
    text = Parsed(write_report(run).read_text()).text
    assert "p one uno p two (an empty answer) q lone not recorded" in text


def test_answers_of_the_evaluation_stand_in_for_samples_of_the_run(run: Run) -> None:
    asked = [("p", "good", [{"text": "bad"}]), ("q", "new", [])]
    rows = [{"prompt": p, "policy": [{"text": after}], "reference": before} for p, after, before in asked]
    run.answers_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "p bad good q not recorded new" in Parsed(write_report(run).read_text()).text


def test_a_series_skips_what_is_no_finite_number() -> None:
    rows = [
        {"step": 2, "split": "train", "loss": 0.5},
        {"step": 0, "split": "train", "loss": 0.7},
        {"split": "train", "loss": 1.0},
    ]
    rows += [{"step": 1, "split": "train", "loss": value} for value in (None, "x", float("nan"))]
    assert series(rows, "loss", "train") == [(0, 0.7), (2, 0.5)]
    assert series(rows, "loss", "eval") == []


def test_a_curve_is_the_same_each_time_and_takes_its_colours_from_the_page() -> None:
    rows = [{"step": step, "split": "train", "loss": 1.0 / (1 + step)} for step in range(3)]
    [curve] = curves(rows)
    assert curve == curves(rows)[0]
    assert curve.svg.startswith("<svg viewBox=") and curve.svg.endswith("</svg>")
    assert "var(--series-1)" in curve.svg and "#0" not in curve.svg.replace('"#m', "").replace("(#p", "")
    assert "<metadata" not in curve.svg and "<style" not in curve.svg and "http" not in curve.svg


def test_one_step_is_drawn_as_a_point() -> None:
    assert len(curves([{"step": 0, "split": "train", "loss": 0.7}])) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.69314718, "0.6931"),
        (12, "12"),
        (4700.0, "4,700"),
        (1e-6, "1.00e-06"),
        (12345.678, "12,346"),
        (-0.5, "-0.5"),
        (float("inf"), "inf"),
        ("x", "x"),
    ],
)
def test_numbers_are_short(value: object, shown: str) -> None:
    assert number(value) == shown


def test_importing_the_report_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, preftune.report; sys.exit(bool({'torch', 'matplotlib', 'jinja2', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
