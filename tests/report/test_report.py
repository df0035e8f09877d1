"""The report: everything of a run on one page, nothing foreign that runs or calls out, no crash on a run that is incomplete."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs_for_tests import made_up

from preftune.errors import ConfigError, StorageError
from preftune.report.page import write_report
from preftune.report.text import number
from preftune.run import Run

ATTACK = "</title></pre></script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>{{ 7 * 7 }}\"'"
READ = [
    "evaluation.json", "answers.jsonl", "samples.jsonl", "metrics.jsonl", "diagnosis.json", "check.json", "data.json",
    "events.jsonl", "config.yaml", "env.json",
]  # fmt: skip


class Parsed(HTMLParser):
    """What a browser would make of the page: its tags, and the text outside of scripts and styles."""

    void = frozenset(("meta", "link", "img", "br", "hr", "input"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.void:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append(({name: value or "" for name, value in attrs}, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = kind, text + data
        elif not (self.open and self.open[-1] == "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def titles(self) -> list[str]:
        """Of the plots."""
        return [json.loads(text)["title"] for kind, text in self.scripts if kind.get("type") == "application/json"]


def page_of(*runs: Run, out: Path | None = None) -> Parsed:
    return Parsed(write_report(runs, out).read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made_up(tmp_path_factory.mktemp("runs") / "first", n_steps=60)


@pytest.fixture
def empty(tmp_path: Path) -> Run:
    run = Run(tmp_path / "first")
    run.path.mkdir()
    return run


def test_the_page_shows_what_the_run_holds_in_the_order_in_which_people_ask(run: Run) -> None:
    page = page_of(run)
    order = [
        "Alignment worked: answers beat those of sft in 70.6 %", "67.5 to 73.7 %", "length-controlled 68.6 %", "71.3 %",
        "Before and after", "where is the bell of the tower?", "is not here", "will be with you on Monday", "Moved most, nats",
        "Training", "Reward against KL", "Calibration", "Length against win", "Findings", "drifted too far",
        "a larger loss.beta", "About the data", "4,702", "pairs.jsonl:9", "Do it again",
        f"preftune train {run.config_file}", "name: dpo", "2.13.0",
    ]  # fmt: skip
    at = -1
    for words in order:
        at = page.text.find(words, at + 1)
        assert at >= 0, f"{words!r} is missing, or comes too early"
    assert page.titles == [
        "Loss", "Accuracy", "Margin", "Rewards", "Log-probabilities", "Log-ratios", "KL from the reference", "Response lengths",
        "Gradient norm", "Learning rate", "Speed", "Against sft, judged by rule:plain words",
        "Calibration of the implicit reward", "Margins of held-out pairs", "Accuracy by category", "By the ratio of lengths",
    ]  # fmt: skip
    assert "is not in this run's folder" not in page.text and page.open == []


def test_texts_are_escaped_and_nothing_foreign_runs_or_calls_out(tmp_path: Path) -> None:
    runs = [made_up(tmp_path / name, ATTACK, n_steps=30) for name in ("first", "<b onclick=alert(1)>")]
    for page in (page_of(runs[1]), page_of(*runs, out=tmp_path / "both.html")):
        assert not {"img", "iframe", "object", "link", "base", "form", "embed"} & set(page.tags)
        assert page.tags.count("title") == 1 and all(name != "onclick" for _, name, _ in page.attributes)
        for tag, name, value in page.attributes:
            assert not name.startswith("on") and name != "style", (tag, name)
            if name in ("src", "href", "action", "srcset", "data"):
                assert value.startswith("#"), (tag, name, value)
        assert page.text.count("<script>alert(1)</script>") >= 20, "shown as the text that it is"
        assert "{{ 7 * 7 }}" in page.text and "<b onclick=alert(1)>" in page.text


def test_only_our_own_script_and_style_may_run(run: Run) -> None:
    html = write_report([run]).read_text()
    [script] = [text for kind, text in Parsed(html).scripts if not kind]
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None

    def digest(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert policy[1].replace("&#39;", "'") == (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; base-uri 'none'; form-action 'none'"
    )
    assert "@import" not in style and "url(" not in style and "eval(" not in script and "new Function" not in script


def test_missing_files_are_stated_each_in_its_place(empty: Run) -> None:
    page = page_of(empty)
    for name in set(READ) - {"answers.jsonl", "check.json"}:  # samples.jsonl stands in for the one, the other is a luxury
        assert f"{name} is not in this run's folder." in page.text
    assert "was not evaluated" in page.text and f"preftune eval {empty.path}" in page.text and not page.titles


@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_never_stops_the_page(empty: Run, name: str) -> None:
    for content in (b"", b"{torn", b"[1, 2]\n", b"\xff\xfe\n", b"null\n", b'{"verdict": 3, "step": "x", "findings": 3}\n'):
        (empty.path / name).write_bytes(content)
        page = page_of(empty)
        assert page.open == [] and "Before and after" in page.text
        if name not in ("answers.jsonl", "check.json"):
            assert f"{name} is not in this run's folder" not in page.text
            assert content != b"\xff\xfe\n" or f"{name} could not be read" in page.text


def test_rows_that_make_no_sense_leave_the_others(tmp_path: Path) -> None:
    odd = [{"prompt": 3, "policy": "x"}, {"prompt": "p", "policy": [{"text": "a b", "pieces": ["a"], "log_ratios": ["x"]}]}, {}]
    empty = Run(tmp_path / "odd")
    empty.path.mkdir()
    empty.answers_file.write_text("".join(json.dumps(row) + "\n" for row in odd))
    empty.write_json(empty.diagnosis_file, {"findings": [{"severity": "<b>"}, 3, {"name": 1, "said": None, "examples": [1]}]})
    empty.metrics_file.write_text(
        '{"step": "x", "split": "train", "loss": 1}\n{"step": 1, "split": "train", "loss": 0.5}\n{"st'
    )
    page = page_of(empty)
    assert page.titles == ["Loss"] and "a b" in page.text and page.open == []


def test_an_evaluation_that_is_none_is_said_and_the_old_numbers_stand_in(empty: Run) -> None:
    for step, loss in ((0, 0.693), (50, 0.55)):
        empty.log_metrics({"step": step, "split": "eval", "loss": loss, "rewards/accuracies": 0.5 + step / 200})
    empty.write_json(empty.evaluation_file, {"verdict": "old", "rows": []})
    page = page_of(empty)
    assert "not an evaluation" in page.text
    assert "On held-out examples, over 50 steps, loss went from 0.693 to 0.55 and accuracy went from 0.5 to 0.75." in page.text


def test_samples_of_training_stand_in_for_those_of_an_evaluation(empty: Run) -> None:
    answers = [("before", "p", "one"), ("before", "q", "lone"), ("after", "p", ""), ("after", "r", "new")]
    empty.log_samples([{"when": when, "prompt": prompt, "response": response} for when, prompt, response in answers])
    text = page_of(empty).text
    assert "p Before one After (an empty answer) q Before lone After not recorded r Before not recorded After new" in text


def test_several_runs_stand_side_by_side_under_what_differs(run: Run, tmp_path: Path) -> None:
    others = [made_up(tmp_path / "sweep" / "runs" / name, beta=beta, n_steps=60) for name, beta in (("a", 0.3), ("b", 0.03))]
    with pytest.raises(ConfigError, match="--out"):
        write_report([run, *others])
    page = page_of(run, *others, run, out=tmp_path / "all.html")
    assert "Setting first a b loss.beta 0.1 0.3 0.03" in page.text, "and nothing else differs, nor is a run shown twice"
    assert page.text.index("loss.beta 0.1") < page.text.index("answers beat those of sft in 67.5 %")
    loss = json.loads(next(text for kind, text in page.scripts if kind and '"Loss"' in text))
    assert [line["name"] for line in loss["lines"]] == ["first", "a", "b"]
    assert [Run.all_in(tmp_path / "sweep")[k].path.name for k in (0, 1)] == ["a", "b"] and len(Run.all_in(run.path)) == 1
    [frontier] = [json.loads(text) for kind, text in page.scripts if kind and "Against sft" in text]
    assert frontier["lines"][0]["labels"] == ["a", "first", "b"], "by KL"


def test_the_evaluation_of_a_model_without_a_run_has_a_page_too(run: Run, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_bytes(run.evaluation_file.read_bytes())
    page = page_of(*Run.all_in(tmp_path))
    assert "Alignment worked" in page.text and "metrics.jsonl is not in this run's folder." in page.text
    with pytest.raises(StorageError, match="not a run folder"):
        Run.all_in(tmp_path / "nothing")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [made_up(tmp_path / seed / "dpo", n_steps=30) for seed in ("0", "1")]
    assert "0/dpo 1/dpo" in page_of(*runs, out=tmp_path / "both.html").text


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


def test_importing_the_report_loads_neither_torch_nor_templates() -> None:
    code = (
        "import sys, preftune.report.page; sys.exit(bool({'torch', 'matplotlib', 'jinja2', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
