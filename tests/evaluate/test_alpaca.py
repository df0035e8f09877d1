"""AlpacaEval runs by `preftune winrate`: the recorded judge's figures, the files that are left, going on, what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tape_server import TapeServer, serving, tape
from typer.testing import CliRunner
from worlds import World

from preftune.cli import app
from preftune.errors import ConfigError, DataError, PreftuneError, ServerError
from preftune.label.judge import swapped

TEMPLATE = """<|im_start|>user
{instruction}
"model_identifier": "m" {output_1}
"model_identifier": "M" {output_2}
<|im_end|>
"""
TASKS = [f"question {k}" for k in range(20)] + ["question 3"]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.evaluate.length_control.RESAMPLES", 40)


def winrate(*words: object, fails: type[PreftuneError] | None = None) -> Any:
    done = CliRunner().invoke(app, ["winrate", "--json", *map(str, words)])
    if fails is not None:
        assert isinstance(done.exception, fails), (done.output, done.exception)
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def save(file: Path, rows: list[Any]) -> Path:
    file.write_text(json.dumps(rows))
    return file


def load(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Prompts, a baseline's outputs in another order, and a template."""
    save(tmp_path / "prompts.json", [{"dataset": "d", "instruction": text, "output": "unused"} for text in TASKS])
    theirs = [{"instruction": text, "output": f"base {text}", "generator": "base"} for text in TASKS[::-1]]
    save(tmp_path / "base.json", theirs)
    (tmp_path / "template.txt").write_text(TEMPLATE)
    return tmp_path


def words(files: Path, *more: object) -> list[object]:
    return ["--baseline", files / "base.json", "--judge-model", "judge", "--template", files / "template.txt",
            "--out", files / "out", "--cache", files / "r.sqlite", "--retries", 0, *more]  # fmt: skip


def judge_and_model(messages: list[dict[str, str]]) -> str | dict[str, Any]:
    """A model that answers in words of its own; a judge who prefers it with probability 0.75, whatever is shown first."""
    text = messages[0]["content"]
    if "model_identifier" not in text:
        return f"base {text}" if text == "question 7" else f"mine to {text}"
    first = text.index("mine to") < text.index("base question")
    likely = {"m": -0.28768207245178085, "M": -1.3862943611198906}  # 0.75 and 0.25
    token = likely if first else {"m": likely["M"], "M": likely["m"]}
    top = [{"token": name, "logprob": value, "bytes": None} for name, value in token.items()]
    content = [top[0] | {"top_logprobs": top}]
    message = {"role": "assistant", "content": "m"}
    return {"choice": {"message": message, "finish_reason": "length", "logprobs": {"content": content}}}


def test_the_recorded_judge_gives_the_published_win_rate(shared_data: Path, tmp_path: Path) -> None:
    folder, model = shared_data / "alpaca_eval", "claude-2.1_concise"
    expected = json.loads((shared_data / "expected.json").read_text())["alpaca_eval"][model]
    with gzip.open(folder / f"annotations/{model}.json.gz", "rt", encoding="utf-8") as file:
        recorded = json.load(file)

    def outputs(side: int) -> Path:
        rows = [{"instruction": r["instruction"], "output": r[f"output_{side}"], "generator": r[f"generator_{side}"]}
                for r in recorded]  # fmt: skip
        return save(tmp_path / f"{side}.json", rows)

    with serving(TapeServer(tape(folder / f"tapes/{model}.tape.jsonl.gz"))) as state:
        found = winrate(
            "--prompts", outputs(1), "--outputs", outputs(2), "--baseline", outputs(1), "--judge-model", "gpt4_turbo",
            "--template", folder / "judge_template_alpaca_eval_clf.txt", "--base-url", state.url, "--out", tmp_path / "out",
            "--cache", tmp_path / "r.sqlite", "--length-control", folder,
        )  # fmt: skip
    assert state.n_requests == expected["logprob_replay"]["rows_with_logprobs"]
    for name in (
        "win_rate",
        "standard_error",
        "discrete_win_rate",
        "n_total",
        "n_wins",
        "n_wins_base",
        "n_draws",
        "avg_length",
    ):
        assert found[name] == pytest.approx(expected["published"][name], abs=1e-6), name
    lc = expected["official_code_0_6_6_on_these_files"]["length_controlled_winrate"]
    assert found["length_controlled_winrate"] == pytest.approx(lc, abs=0.02)
    assert found["judge"]["p_first"] == pytest.approx(expected["logprob_replay"]["mean_P_first_shown_wins"], abs=1e-6)
    ours = load(tmp_path / "out/annotations.json")
    for row, want in zip(ours, recorded, strict=True):
        assert row["preference"] == pytest.approx(want["preference"], abs=1e-8)
        names = ("instruction", "output_1", "output_2", "generator_1", "generator_2")
        assert {name: row[name] for name in names} == {name: want[name] for name in names}


def test_a_run_asks_the_model_and_the_judge_once(files: Path) -> None:
    with serving(TapeServer(reply=judge_and_model)) as state:
        run = words(files, "--prompts", files / "prompts.json", "--model", "org/mine", "--model-url", state.url,
                    "--base-url", state.url)  # fmt: skip
        found = winrate(*run, "--own-prompts")
        n = state.n_requests
        again = winrate(*run)
        assert state.n_requests == n == 20 + 19, "each text once; two equal outputs are never judged"
        both = winrate(*run, "--order", "both", "--out", files / "both")
    assert (found["n_total"], found["n_wins"], found["n_draws"], found["model"]) == (21, 20, 1, "mine")
    assert found["win_rate"] == pytest.approx(100 * (20 * 0.75 + 0.5) / 21) == again["win_rate"] == both["win_rate"]
    assert found["ledger"]["judge"]["n_requests"] == 19 and again["ledger"]["judge"]["n_requests"] == 0
    assert both["judge"]["order_consistency"] == 1.0 and found["length_control"] == "own rows"


def test_the_files_are_alpaca_evals(files: Path) -> None:
    with serving(TapeServer(reply=judge_and_model)) as state:
        winrate(*words(files, "--prompts", files / "prompts.json", "--model", "mine", "--model-url", state.url,
                       "--base-url", state.url))  # fmt: skip
        shown = [
            body["messages"][0]["content"] for body in state.bodies if "model_identifier" in body["messages"][0]["content"]
        ]
        temperatures = {b["temperature"] for b in state.bodies}
    outputs, annotations = load(files / "out/model_outputs.json"), load(files / "out/annotations.json")
    assert [row["instruction"] for row in outputs] == TASKS == [row["instruction"] for row in annotations]
    assert outputs[0] == {"dataset": "d", "instruction": "question 0", "output": "mine to question 0", "generator": "mine"}
    first = annotations[0]
    assert set(first) == {"dataset", "instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator",
                          "preference", "time_per_example"}  # fmt: skip
    assert (first["output_1"], first["generator_1"], first["output_2"]) == ("base question 0", "base", "mine to question 0")
    assert first["preference"] == pytest.approx(1.75) and annotations[7]["preference"] == 1.5 and temperatures == {0.0}
    for text in shown:
        instruction = text.splitlines()[0]
        assert swapped(instruction, 0) == (text.index("mine to") < text.index("base question")), "the coin of each instruction"


def test_what_the_judge_does_not_say_is_null_and_asked_again(files: Path) -> None:
    mute = {"question 2", "question 5"}

    def reply(messages: list[dict[str, str]]) -> str | dict[str, Any]:
        said = judge_and_model(messages)
        silent = isinstance(said, dict) and messages[0]["content"].splitlines()[0] in mute
        return "I would rather not say" if silent else said

    with serving(TapeServer(reply=reply)) as state:
        run = words(files, "--prompts", files / "prompts.json", "--model", "mine", "--model-url", state.url,
                    "--base-url", state.url)  # fmt: skip
        said = winrate(*run, fails=ServerError)
        assert "2 of 21 judgments (9.5%) have no verdict" in said and "annotations.json" in said
        rows = load(files / "out/annotations.json")
        assert [k for k, row in enumerate(rows) if row["preference"] is None] == [2, 5]
        found = winrate(*run, "--max-unscored", 0.2)
        assert (found["n_total"], found["n_dropped"]) == (19, 2)
        mute.clear()
        n = state.n_requests
        assert winrate(*run)["n_total"] == 21 and state.n_requests == n + 2


def test_a_model_on_this_machine_answers(files: Path, world: World) -> None:
    save(files / "few.json", [{"instruction": text} for text in TASKS[:3]])
    with serving(TapeServer(reply=lambda m: "m" if "model_identifier" in m[0]["content"] else None)) as state:
        run = words(files, "--prompts", files / "few.json", "--model", world.base, "--name", "tiny", "--base-url", state.url,
                    "--max-tokens", 5, "--chat-template", "chatml")  # fmt: skip
        found = winrate(*run)
    assert (found["n_total"], found["model"]) == (3, "tiny")
    n_wins = sum(row["preference"] == 2 for row in load(files / "out/annotations.json"))
    assert found["win_rate"] == pytest.approx(100 * n_wins / 3)
    assert all(row["output"] and row["generator"] == "tiny" for row in load(files / "out/model_outputs.json"))


def test_a_model_that_does_not_answer_is_an_error_and_what_it_said_is_kept(files: Path) -> None:
    def reply(messages: list[dict[str, str]]) -> str | dict[str, Any] | None:
        return None if messages[0]["content"] == "question 4" else judge_and_model(messages)

    state = TapeServer(reply=reply)
    with serving(state):
        run = words(files, "--prompts", files / "prompts.json", "--model", "mine", "--model-url", state.url,
                    "--base-url", state.url)  # fmt: skip
        said = winrate(*run, fails=ServerError)
        assert "mine: 1 of 21 prompts have no answer (1 × HTTP 400" in said
        n = state.n_requests
        state.reply = judge_and_model
        assert winrate(*run)["n_total"] == 21 and state.n_requests == n + 1 + 19


def test_what_does_not_go_together_is_said_before_anybody_is_asked(files: Path) -> None:
    run = words(files, "--prompts", files / "prompts.json", "--base-url", "http://127.0.0.1:9/v1")
    assert "name the model with --model" in winrate(*run, fails=ConfigError)
    assert "--prompts: a run needs it" in winrate(*words(files), "--model", "m", fails=ConfigError)
    assert "--out: is for a run" in winrate("--annotations", files / "base.json", "--out", files, fails=ConfigError)
    save(files / "base.json", load(files / "base.json")[:5])
    said = winrate(*run, "--model", "m", "--model-url", "http://127.0.0.1:9/v1", fails=DataError)
    assert "has no output for 15 of 21 instructions" in said and "prompts.json:1: 'question 0'" in said
    save(files / "bad.json", [{"instruction": "a", "output": None}, {"instruction": " ", "output": "b"}, 3])
    said = winrate(*run, "--outputs", files / "bad.json", fails=DataError)
    assert "3 of 3 rows cannot be used" in said and "output is 'None', expected a text" in said
    two = [{"instruction": "a", "output": "b", "generator": name} for name in ("one", "two")]
    said = winrate(*run, "--outputs", save(files / "two.json", two), fails=ConfigError)
    assert "generator names 2 models (one, two)" in said
