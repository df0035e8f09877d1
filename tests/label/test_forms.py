"""The form of a verdict: log-probs, else JSON, else text; found out once, and the same in every run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tape_server import TapeServer, serving
from typer.testing import CliRunner
from worlds import save_model

from preftune.asking.records import Answer, Ledger
from preftune.asking.replies import Replies
from preftune.asking.server import Server
from preftune.cli import app
from preftune.data.judgments import read_judgments
from preftune.errors import ConfigError, ServerError
from preftune.label.forms import best_form
from preftune.label.template import own_template
from preftune.label.verdict import read_pair, read_score

LOGPROBS = {"top_logprobs": "Unsupported parameter: 'logprobs'"}
SCHEMA = {"response_format": "response_format is not supported by this model"}
ROWS = [{"prompt": f"question {k}", "responses": [f"good {k}", f"poor {k}"], "pairs": [[0, 1]]} for k in range(4)]


def code_in(messages: list[dict[str, str]]) -> str:
    found = re.search(r"\[conversation (\w+)\]", messages[1]["content"])
    assert found is not None
    return found[1]


def better(messages: list[dict[str, str]]) -> str:
    first = messages[1]["content"].partition("[end of answer A")[0]
    return "A" if "good" in first or "Four." in first else "B"


def choice(text: str, *, logprobs: bool) -> dict[str, Any]:
    content = [{"token": text[0], "logprob": -0.2, "bytes": None, "top_logprobs": []}]
    said = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choice": said | {"logprobs": {"content": content} if logprobs else None}}


def model(*, logprobs: bool, json_too: bool) -> Callable[[list[dict[str, str]]], dict[str, Any]]:
    """A model that follows instructions; one that cannot write JSON writes a letter whatever it is asked."""

    def reply(messages: list[dict[str, str]]) -> dict[str, Any]:
        letter, code = better(messages), code_in(messages)
        if json_too and "JSON object" in messages[1]["content"]:
            found = {"reason": "it is right", "verdict": letter, "score": 9, "code": code}
            return choice(json.dumps(found), logprobs=logprobs)
        number = "Reply with one line and nothing else: a whole number" in messages[1]["content"]
        return choice(f"{9 if number else letter} {code}", logprobs=logprobs)

    return reply


@pytest.fixture
def form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """What best_form picks for a server."""
    monkeypatch.setattr("preftune.asking.server._FIRST_PAUSE", 0.01)
    with Replies(tmp_path / "forms.sqlite") as replies:

        def found(url: str, kind: Any = "pair", **more: Any) -> str:
            with Server(url, retries=1) as server:
                return best_form(server, "m", kind, rubric="honesty", replies=replies, ledger=Ledger(), **more).name

        yield found


@pytest.mark.parametrize(
    ("reply", "refuses", "expected", "n_asked"),
    [
        (model(logprobs=True, json_too=True), {}, "honesty-pair-letter", 1),
        (model(logprobs=False, json_too=True), {}, "honesty-pair-json", 2),  # log-probs were asked for and ignored
        (model(logprobs=False, json_too=True), LOGPROBS, "honesty-pair-json", 3),  # the refused one is asked again without
        (model(logprobs=False, json_too=True), LOGPROBS | SCHEMA, "honesty-pair-json", 4),  # JSON all the same
        (model(logprobs=False, json_too=False), {}, "honesty-pair-letter", 2),  # the schema was ignored
        (model(logprobs=False, json_too=False), LOGPROBS | SCHEMA, "honesty-pair-letter", 4),
    ],
)
def test_the_first_form_that_works_is_taken_and_remembered(
    form: Callable[..., str], reply: Any, refuses: dict[str, str], expected: str, n_asked: int
) -> None:
    with serving(TapeServer(reply=reply, refuses=refuses)) as state:
        assert form(state.url) == expected
        assert state.n_requests == n_asked
        assert form(state.url) == expected and state.n_requests == n_asked, "another run asks nothing for it"


def test_a_score_is_asked_for_as_json_else_as_a_number(form: Callable[..., str]) -> None:
    for json_too, expected in ((True, "honesty-score-json"), (False, "honesty-score-letter")):
        with serving(TapeServer(reply=model(logprobs=True, json_too=json_too))) as state:
            assert form(state.url, "score") == expected


def test_a_refusal_in_words_that_nobody_knows_leads_to_the_next_form(form: Callable[..., str]) -> None:
    strange = {"top_logprobs": "extra inputs are not permitted"}
    with serving(TapeServer(reply=model(logprobs=True, json_too=True), refuses=strange)) as state:
        assert form(state.url) == "honesty-pair-json"
    with serving(TapeServer(reply=model(logprobs=False, json_too=False), refuses={"response_format": "no"})) as state:
        assert form(state.url) == "honesty-pair-letter"
    with serving(TapeServer()) as state, pytest.raises(ServerError, match="does not answer a first question.*HTTP 400"):
        form(state.url)


def test_without_money_or_leave_nothing_is_asked(form: Callable[..., str]) -> None:
    with serving(TapeServer(reply=model(logprobs=False, json_too=True))) as state:
        assert form(state.url, asks=False) == "honesty-pair-letter" and state.n_requests == 0
        form(state.url)
        assert form(state.url, asks=False) == "honesty-pair-json", "what is known from before counts"


@pytest.mark.parametrize(
    ("logprobs", "json_too", "refuses"),
    [(True, True, {}), (False, True, LOGPROBS), (False, True, LOGPROBS | SCHEMA), (False, False, LOGPROBS | SCHEMA)],
)
def test_whatever_a_server_can_give_the_verdicts_are_the_same(
    tmp_path: Path, logprobs: bool, json_too: bool, refuses: dict[str, str]
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    with serving(TapeServer(reply=model(logprobs=logprobs, json_too=json_too), refuses=refuses)) as state:
        words = ["judge", "--data", data, "--base-url", state.url, "--judge-model", "m", "--out", tmp_path / "j.jsonl",
                 "--cache", tmp_path / "r.sqlite", "--json"]  # fmt: skip
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, (done.output, done.exception)
        again = CliRunner().invoke(app, list(map(str, words)))
    [one] = json.loads(done.stdout)["annotators"]
    assert (one["verdicts"], one["order_consistency"], one["agreement"]) == ({"i": 4}, 1.0, 1.0)
    judged = read_judgments(tmp_path / "j.jsonl")
    assert all((j.p is not None) == logprobs for j in judged)
    for name in refuses:
        assert sum(name in body for body in state.bodies) == 1, "what was refused once is sent no more"
    assert state.n_requests == len(state.bodies) == 8 + len(refuses) + (1 if logprobs else 2)
    assert json.loads(again.stdout)["known_before"] == 8


def test_a_template_of_somebody_else_keeps_its_own_way(tmp_path: Path) -> None:
    theirs = tmp_path / "t.txt"
    theirs.write_text(
        "<|im_start|>user\n{instruction} Output (a): {output_1} Output (b): {output_2}\n<|im_end|>", encoding="utf-8"
    )
    (tmp_path / "d.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    words = ["judge", "--data", tmp_path / "d.jsonl", "--judge-model", "m", "--out", tmp_path / "j.jsonl",
             "--cache", tmp_path / "r.sqlite", "--template", theirs]  # fmt: skip
    with serving(TapeServer(reply=lambda messages: "Output (a)")) as state:
        done = CliRunner().invoke(app, [*map(str, words), "--base-url", state.url])
        assert done.exit_code == 0 and state.n_requests == 2
        assert all("top_logprobs" not in body and "response_format" not in body for body in state.bodies)
    refused = CliRunner().invoke(app, [*map(str, words), "--reply", "json"])
    assert isinstance(refused.exception, ConfigError) and "says itself" in str(refused.exception)


def test_a_model_on_this_machine_gives_probabilities_by_our_own_template(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", positions=2048)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    words = ["judge", "--data", tmp_path / "d.jsonl", "--judge-model", folder, "--out", tmp_path / "j.jsonl",
             "--cache", tmp_path / "r.sqlite", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, (done.output, done.exception)
    judged = read_judgments(tmp_path / "j.jsonl")
    assert len(judged) == 8 and all(j.p is not None and 0 < j.p < 1 for j in judged)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reason": "he said "no" to it", "verdict": "B", "code": "3f9c01ab"}', 0.0),
        ('{"verdict": "A", "code": "3f9c01ab"} no, "verdict" : "B",\n "code": "3f9c01ab"', 1.0),  # valid JSON goes first
        ('"verdict": "A", "code": "3f9c01ab" -- "verdict": "B", "code": "3f9c01ab"', 0.0),  # the last match
        ('"verdict": "A", "code": "00000000"', None),
        ("the verdict is A", None),
    ],
)
def test_json_that_is_no_json_is_read_by_the_last_match(text: str, expected: float | None) -> None:
    rule = next(iter(own_template("pair", reply="json").variants.values())).rule
    assert read_pair(Answer(text), rule, code="3f9c01ab").value == expected
    rule = next(iter(own_template("score", reply="json").variants.values())).rule
    rated = text.replace("verdict", "score").replace('"A"', "10").replace('"B"', "3")
    scores = {None: None, 0.0: 3.0, 1.0: 10.0}
    assert read_score(Answer(rated), rule, code="3f9c01ab").value == scores[expected]
