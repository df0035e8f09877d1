"""`preftune mtbench`: FastChat's judgments in figures, and runs that leave files as FastChat writes them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tape_server import TapeServer, serving, tape
from typer.testing import CliRunner
from worlds import World, read_jsonl, write_jsonl

from preftune.cli import app
from preftune.errors import ConfigError, DataError, ModelError, PreftuneError, ServerError
from preftune.evaluate.mtbench_run import file_name

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["write a line", "now shorter"]},
    {"question_id": 111, "category": "math", "turns": ["two and two?", "twice that?"]},
    {"question_id": "own-1", "category": "garden", "turns": ["one turn alone"]},
]
PROMPTS = """\
{"name": "single-v1", "type": "single", "system_prompt": "rate", "prompt_template": "Q: {question} A: {answer} [[rating]]", \
"output_format": "[[rating]]"}
{"name": "single-math-v1", "type": "single", "system_prompt": "rate", "prompt_template": \
"R: {ref_answer_1} Q: {question} A: {answer} [[rating]]", "output_format": "[[rating]]"}
{"name": "single-v1-multi-turn", "type": "single", "system_prompt": "rate [[rating]]", "prompt_template": \
"1: {question_1} {answer_1} 2: {question_2} {answer_2}", "output_format": "[[rating]]"}
{"name": "single-math-v1-multi-turn", "type": "single", "system_prompt": "rate [[rating]]", "prompt_template": \
"R: {ref_answer_1} {ref_answer_2} 1: {question_1} {answer_1} 2: {question_2} {answer_2}", "output_format": "[[rating]]"}
{"name": "pair-v2", "type": "pairwise", "system_prompt": "[[A]] [[B]] [[C]]", "prompt_template": \
"Q: {question} A: {answer_a} B: {answer_b}", "output_format": "[[A]]"}
{"name": "pair-v2-multi-turn", "type": "pairwise", "system_prompt": "[[A]] [[B]] [[C]]", "prompt_template": \
"Q: {question_1} {question_2} A: {answer_a_1} {answer_a_2} B: {answer_b_1} {answer_b_2}", "output_format": "[[A]]"}
"""


def mtbench(*words: object, fails: type[PreftuneError] | None = None) -> Any:
    done = CliRunner().invoke(app, ["mtbench", "--json", *map(str, words)])
    if fails is not None:
        assert isinstance(done.exception, fails), (done.output, done.exception)
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with questions, references for one of them, judge prompts and another model's answers."""
    write_jsonl(tmp_path / "question.jsonl", QUESTIONS)
    write_jsonl(tmp_path / "refs.jsonl", [{"question_id": 111, "choices": [{"turns": ["four", "eight"]}]}])
    (tmp_path / "judge_prompts.jsonl").write_text(PROMPTS)
    theirs = [{"question_id": q["question_id"], "choices": [{"turns": ["their text"] * len(q["turns"])}]} for q in QUESTIONS]
    write_jsonl(tmp_path / "other.jsonl", theirs)
    return tmp_path


# ---- files of FastChat's ----------------------------------------------------------------------------------------------


def test_the_published_scores_come_out(shared_data: Path) -> None:
    folder = shared_data / "mt_bench"
    want = json.loads((shared_data / "expected.json").read_text())["mt_bench_single"]["Stefanstud+FastChat"]["models"]
    words = ("--judgments", folder / "Stefanstud_FastChat/gpt-4_single.jsonl.gz")
    found = mtbench(*words, "--questions", folder / "question.jsonl")["models"]["phi-3-dpo"]
    for name in ("n", "turn1", "turn2", "average"):
        assert found[name] == want["phi-3-dpo"][name]
    assert found["by_category"] == pytest.approx(want["phi-3-dpo"]["by_category"])
    assert found["average_low"] < 8.2 < found["average_high"]
    assert mtbench(*words)["models"]["phi-3-dpo"] == found | {"by_category": {}}


def test_the_published_comparisons_come_out(shared_data: Path) -> None:
    folder = shared_data / "mt_bench"
    want = json.loads((shared_data / "expected.json").read_text())["mt_bench_pair"]["Stefanstud+FastChat"]
    found = mtbench("--judgments", folder / "Stefanstud_FastChat/gpt-4_pair.jsonl.gz")
    one = found["models"]["phi-3-dpo"]
    assert (one["win"], one["loss"], one["tie"]) == (want["wins_phi3dpo"], want["wins_phi3"], want["ties"]) == (20, 18, 35)
    assert one["win_rate_adjusted"] == pytest.approx(want["win_rate_adjusted_phi3dpo"], abs=1e-12)
    assert one["win_rate"] == pytest.approx(want["win_rate_phi3dpo"], abs=1e-12)
    assert (found["n_rows"], found["n_dropped"], found["n_same_in_both_orders"]) == (75, 2, 46)


def test_what_has_no_score_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "model": "m", "judge": ["j", "t"], "score": s, "turn": t} for s, t in ((9, 1), (-1, 2), (4, 1))]
    rows[2]["question_id"] = 2
    found = mtbench("--judgments", write_jsonl(tmp_path / "j.jsonl", rows))
    assert (found["n_rows"], found["n_dropped"], found["judges"]) == (3, 1, ["j"])
    one = found["models"]["m"]
    assert (one["n"], one["n_dropped"], one["turn1"], one["average"]) == (2, 1, 6.5, 6.5) and "turn2" not in one
    none = mtbench("--judgments", write_jsonl(tmp_path / "n.jsonl", rows[1:2]))["models"]["m"]
    assert (none["n"], none["average"], none["average_low"]) == (0, None, None)


def test_a_win_counts_where_both_orders_agree(tmp_path: Path) -> None:
    verdicts = [("model_1", "model_1"), ("model_2", "model_2"), ("tie", "tie"), ("model_1", "model_2"), ("model_1", "tie"),
                ("tie", "model_1"), ("error", "model_1"), ("model_1", "error")]  # fmt: skip
    rows = [
        {"question_id": k, "model_1": "a", "model_2": "b", "g1_winner": one, "g2_winner": other, "judge": ["j", "t"], "turn": 1}
        for k, (one, other) in enumerate(verdicts)
    ]
    found = mtbench("--judgments", write_jsonl(tmp_path / "p.jsonl", rows))
    assert [found["models"]["a"][name] for name in ("win", "loss", "tie", "n")] == [1, 1, 4, 6]
    assert found["models"]["a"]["win_rate_adjusted"] == 0.5 and (found["n_dropped"], found["n_same_in_both_orders"]) == (2, 3)


def test_what_is_no_judgment_names_its_lines(tmp_path: Path) -> None:
    good = {"question_id": 1, "model": "m", "judge": ["j", "t"], "score": 5, "turn": 1}
    bad = [good | {"score": None}, good | {"turn": "2"}, {"question_id": 1}, good | {"question_id": 1.5}]
    said = mtbench("--judgments", write_jsonl(tmp_path / "j.jsonl", [good, *bad]), fails=DataError)
    assert "4 of 5 rows are no scores" in said and "j.jsonl:2: score is None" in said and "j.jsonl:3: turn is '2'" in said
    assert "j.jsonl:4: no model" in said and "j.jsonl:5: question_id is 1.5" in said
    pair = {"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "a", "g2_winner": "tie"}
    said = mtbench("--judgments", write_jsonl(tmp_path / "p.jsonl", [pair]), fails=DataError)
    assert "p.jsonl:1: g1_winner and g2_winner are 'a' and 'tie', expected one of model_1" in said
    said = mtbench("--judgments", tmp_path / "none.jsonl", fails=DataError)
    assert "no such file" in said
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    said = mtbench(
        "--judgments", write_jsonl(tmp_path / "j.jsonl", [good]), "--questions", tmp_path / "q.jsonl", fails=DataError
    )
    assert "j.jsonl:1: question 1" in said


# ---- runs ---------------------------------------------------------------------------------------------------------------


def test_recorded_judges_give_the_published_figures_and_rows(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "mt_bench"
    answers = folder / "Stefanstud_FastChat/model_answer/phi-3-dpo.jsonl.gz"
    words = ["--questions", folder / "question.jsonl", "--references", folder / "reference_answer_gpt-4.jsonl",
             "--template", folder / "judge_prompts.jsonl", "--judge-model", "gpt-4", "--out", tmp_path / "out",
             "--answers", answers, "--cache", tmp_path / "r.sqlite"]  # fmt: skip
    with serving(TapeServer(tape(folder / "tapes/phi-3-dpo.single.tape.jsonl.gz"))) as state:
        found = mtbench(*words, "--base-url", state.url)
        again = mtbench(*words, "--base-url", state.url)
    assert state.n_requests == 160 and again["models"] == found["models"]
    one = found["models"]["phi-3-dpo"]
    assert (one["turn1"], one["turn2"], one["average"]) == (8.3625, 8.0375, 8.2)
    ours = read_jsonl(tmp_path / "out/model_judgment/gpt-4_single.jsonl")
    with gzip.open(folder / "Stefanstud_FastChat/gpt-4_single.jsonl.gz", "rt", encoding="utf-8") as file:
        theirs = {(row["question_id"], row["turn"]): row for row in map(json.loads, file)}
    assert len(ours) == len(theirs) == 160
    for row in ours:
        recorded = theirs[row["question_id"], row["turn"]]
        assert set(row) == set(recorded)
        assert {k: v for k, v in row.items() if k != "tstamp"} == {k: v for k, v in recorded.items() if k != "tstamp"}


def test_recorded_comparisons_give_the_published_rows(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "mt_bench"
    stored = folder / "Stefanstud_FastChat/model_answer"
    with serving(TapeServer(tape(folder / "tapes/phi-3_vs_phi-3-dpo.pair.tape.jsonl.gz"))) as state:
        mtbench("--questions", folder / "question.jsonl", "--references", folder / "reference_answer_gpt-4.jsonl",
                "--template", folder / "judge_prompts.jsonl", "--judge-model", "gpt-4", "--out", tmp_path,
                "--answers", stored / "phi-3.jsonl.gz", "--against", stored / "phi-3-dpo.jsonl.gz", "--base-url", state.url,
                "--cache", tmp_path / "r.sqlite", "--retries", 0, fails=ServerError)  # fmt: skip
    ours = {(row["question_id"], row["turn"]): row for row in read_jsonl(tmp_path / "model_judgment/gpt-4_pair.jsonl")}
    with gzip.open(folder / "Stefanstud_FastChat/gpt-4_pair.jsonl.gz", "rt", encoding="utf-8") as file:
        theirs = list(map(json.loads, file))
    for recorded in theirs:
        row = ours[recorded["question_id"], recorded["turn"]]
        assert set(row) == set(recorded)
        assert {k: v for k, v in row.items() if k != "tstamp"} == {k: v for k, v in recorded.items() if k != "tstamp"}
    assert len(ours) == 160 and sum("error" in (r["g1_winner"], r["g2_winner"]) for r in ours.values()) >= 80


def spoken(messages: list[dict[str, str]]) -> str:
    """A model that says how much it has seen, and a judge that rates by what it is shown."""
    if messages[0]["role"] == "system":
        text = messages[1]["content"]
        return "nothing" if "one turn" in text else f"good [[{7 if 'R: four' in text else 5}]]"
    return f"seen {len(messages)}: {messages[-1]['content']}"


def test_the_second_turn_sees_the_first_answer_and_temperatures_go_by_category(files: Path) -> None:
    words = ["--questions", files / "question.jsonl", "--references", files / "refs.jsonl", "--template",
             files / "judge_prompts.jsonl", "--judge-model", "org/judge", "--out", files / "out", "--cache", files / "r.sqlite",
             "--model", "org/mine", "--max-unscored", 0.5]  # fmt: skip
    with serving(TapeServer(reply=spoken)) as state:
        found = mtbench(*words, "--model-url", state.url, "--base-url", state.url)
        bodies = [body for body in state.bodies if body["messages"][0]["role"] == "user"]
        n_first = state.n_requests
        again = mtbench(*words, "--model-url", state.url, "--base-url", state.url)
        n_again = state.n_requests - n_first
    second = next(body for body in bodies if body["messages"][-1]["content"] == "twice that?")
    assert [m["content"] for m in second["messages"]] == ["two and two?", "seen 1: two and two?", "twice that?"]
    assert {b["messages"][0]["content"]: b["temperature"] for b in bodies} == {
        "write a line": 0.7, "two and two?": 0.0, "one turn alone": 0.7
    }  # fmt: skip
    [file] = (files / "out/model_answer").iterdir()
    rows = read_jsonl(file)
    assert file.name == "mine.jsonl" and [row["question_id"] for row in rows] == [81, 111, "own-1"]
    assert rows[1]["choices"] == [{"index": 0, "turns": ["seen 1: two and two?", "seen 3: twice that?"]}]
    assert set(rows[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} and rows[0]["model_id"] == "mine"
    judged = {(r["question_id"], r["turn"]): r for r in read_jsonl(files / "out/model_judgment/judge_single.jsonl")}
    assert {key: (r["score"], r["judge"][1]) for key, r in judged.items()} == {
        (81, 1): (5, "single-v1"), (81, 2): (5, "single-v1-multi-turn"), (111, 1): (7, "single-math-v1"),
        (111, 2): (7, "single-math-v1-multi-turn"), ("own-1", 1): (-1, "single-v1"),
    }  # fmt: skip
    assert found["models"]["mine"]["average"] == 6.0 and found["n_dropped"] == 1
    assert again["models"] == found["models"] and n_again == 1, "what could not be read is asked again, and nothing else"


def test_compared_in_both_orders_equal_answers_are_a_tie_nobody_judges(files: Path) -> None:
    mine = [{"question_id": q["question_id"], "choices": [{"turns": ["my text"] * len(q["turns"])}]} for q in QUESTIONS[:2]]
    same = {"question_id": "own-1", "choices": [{"turns": ["their text"]}]}
    words = ["--questions", files / "question.jsonl", "--template", files / "judge_prompts.jsonl", "--judge-model", "judge",
             "--answers", write_jsonl(files / "mine.jsonl", [*mine, same]), "--against", files / "other.jsonl",
             "--out", files / "out", "--cache", files / "r.sqlite"]  # fmt: skip

    def judge(messages: list[dict[str, str]]) -> str:
        """Prefers `my text`; of the first turn of 81 only where it is shown first."""
        text = messages[1]["content"]
        if "write a line" in text and "now shorter" not in text:
            return "[[A]]"
        return "[[A]]" if text.index("my text") < text.index("their text") else "[[B]]"

    with serving(TapeServer(reply=judge)) as state:
        found = mtbench(*words, "--base-url", state.url)
    one = found["models"]["mine"]
    assert (one["win"], one["loss"], one["tie"]) == (3, 0, 2) and state.n_requests == 8
    rows = {(r["question_id"], r["turn"]): r for r in read_jsonl(files / "out/model_judgment/judge_pair.jsonl")}
    assert (rows[81, 1]["g1_winner"], rows[81, 1]["g2_winner"]) == ("model_1", "model_2")
    assert rows["own-1", 1]["g1_winner"] == "tie" and rows["own-1", 1]["g1_judgment"] == "identical responses"
    assert {file.name for file in (files / "out/model_answer").iterdir()} == {"mine.jsonl", "other.jsonl"}
    assert rows[111, 2]["judge"] == ["judge", "pair-v2-multi-turn"] and rows[111, 2]["g2_winner"] == "model_1"


def test_another_models_rows_stay_in_the_file(files: Path) -> None:
    def words(name: str) -> list[Any]:
        return ["--questions", files / "question.jsonl", "--template", files / "judge_prompts.jsonl", "--judge-model", "judge",
                "--answers", files / "other.jsonl", "--name", name, "--out", files / "out",
                "--cache", files / "r.sqlite"]  # fmt: skip

    with serving(TapeServer(reply=lambda messages: "[[8]]")) as state:
        mtbench(*words("first"), "--base-url", state.url)
        found = mtbench(*words("second"), "--base-url", state.url)
        again = mtbench(*words("second"), "--base-url", state.url)
    assert set(found["models"]) == {"first", "second"} and found["n_rows"] == again["n_rows"] == 10 and state.n_requests == 5


def test_a_model_on_this_machine_answers_two_turns(files: Path, world: World) -> None:
    words = ["--questions", files / "question.jsonl", "--judge-model", "judge", "--template", files / "judge_prompts.jsonl",
             "--out", files / "out", "--cache", files / "r.sqlite", "--model", world.base, "--name", "tiny", "--max-tokens", 6,
             "--chat-template", "chatml"]  # fmt: skip
    with serving(TapeServer(reply=lambda messages: "[[3]]")) as state:
        found = mtbench(*words, "--base-url", state.url)
    assert found["models"]["tiny"]["average"] == 3.0 and found["models"]["tiny"]["n"] == 5
    rows = read_jsonl(files / "out/model_answer/tiny.jsonl")
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 2, 1]


def test_what_does_not_go_together_is_said(files: Path) -> None:
    run = ["--questions", files / "question.jsonl", "--judge-model", "j", "--out", files / "o", "--cache", files / "r.sqlite"]
    assert "name the model with --model" in mtbench(*run, fails=ConfigError)
    assert "--out: a run needs it" in mtbench(*run[:4], "--answers", files / "other.jsonl", fails=ConfigError)
    assert "--model: is for a run" in mtbench("--judgments", files / "x.jsonl", "--model", "m", fails=ConfigError)
    assert "--temperature: is for a run" in mtbench("--judgments", files / "x.jsonl", "--temperature", 0.5, fails=ConfigError)
    stored = ["--answers", files / "other.jsonl"]
    assert "--model-url: is for a model that answers now" in mtbench(
        *run, *stored, "--model-url", "http://a/v1", fails=ConfigError
    )
    assert "--template-name: says how" in mtbench(*run, *stored, "--template-name", "pair-v2", fails=ConfigError)
    prompts = ["--template", files / "judge_prompts.jsonl", "--base-url", "http://127.0.0.1:9/v1"]
    said = mtbench(*run, *prompts, "--model", "nowhere", fails=ModelError)
    assert "nowhere" in said and "a model behind a server is named with --model-url" in said
    said = mtbench(*run, *prompts, "--answers", files / "other.jsonl", "--template-name", "pair-v2", fails=ConfigError)
    assert "pair-v2 compares two answers" in said
    said = mtbench(*run, *prompts, "--answers", files / "other.jsonl", "--against", files / "other.jsonl", fails=ConfigError)
    assert "call the model otherwise with --name" in said


@pytest.mark.parametrize(("model", "name"), [("org/mine", "mine"), ("runs/a/model", "a"), ("runs/a/", "a"), ("m", "m")])
def test_a_models_name_in_files(model: str, name: str) -> None:
    assert file_name(model) == name
