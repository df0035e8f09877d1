"""Sampling: several responses to a prompt, the same whatever else is asked, only what is missing, from a model or a server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tape_server import TapeServer, serving
from typer.testing import CliRunner
from worlds import World

from preftune.cli import app
from preftune.data.read import read_examples
from preftune.data.similarity import distinct, mean_similarity, similarity
from preftune.data.types import Message
from preftune.errors import ConfigError, DataError, ServerError
from preftune.sampling.prompts import read_prompts
from preftune.sampling.responses import Plan, Way, diversity

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`preftune VERB … --json` in a folder of its own."""
    monkeypatch.setattr("preftune.asking.server._FIRST_PAUSE", 0.02)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("What is a tide?\nName a colour.\nSay hi.\n", encoding="utf-8")

    def call(verb: str, *words: object, fails: type[Exception] | None = None, cache: str = "r.sqlite") -> dict[str, Any]:
        said = [verb, "--prompts", "p.txt", "--cache", cache, "--json", *map(str, words)]
        done = CliRunner().invoke(app, said)
        if fails is not None:
            assert isinstance(done.exception, fails), (done.output, done.exception)
            return {"error": str(done.exception), **(json.loads(done.stdout) if done.stdout.startswith("{") else {})}
        assert done.exit_code == 0, (done.output, done.exception)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return call


def lines(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


# ---- a model on this machine ------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_whatever_else_is_asked(world: World, run: Run, tmp_path: Path) -> None:
    words = ("--model", world.base, "-n", 3, "--max-tokens", 8, "--seed", 5)
    run("sample", *words, "--out", "all.jsonl", cache="a.sqlite")
    (tmp_path / "p.txt").write_text("Say hi.\nSomething else?\n", encoding="utf-8")
    run("sample", *words, "--out", "two.jsonl", cache="b.sqlite")
    every, two = lines(tmp_path / "all.jsonl"), lines(tmp_path / "two.jsonl")
    [shared] = every.keys() & two.keys()
    assert every[shared] == two[shared]
    run("sample", *words[:-1], 6, "--out", "other.jsonl", cache="c.sqlite")
    assert lines(tmp_path / "other.jsonl")[shared]["responses"] != two[shared]["responses"]


def test_what_the_file_holds_is_not_asked_again(world: World, run: Run, tmp_path: Path) -> None:
    words = ("sample", "--model", world.base, "-n", 2, "--max-tokens", 6, "--out", "s.jsonl")
    first = run(*words)
    text = (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert (first["n_written"], first["n_responses"], first["diversity"]["n_prompts"]) == (3, 6, 3)
    (tmp_path / "s.jsonl").write_text("".join(text[:2]) + text[2][:40], encoding="utf-8")  # torn in the middle of a line
    again = run(*words, cache="empty.sqlite")
    assert (again["n_before"], again["n_written"], again["ledger"]["n_requests"]) == (2, 1, 2)
    assert (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines(keepends=True) == text
    assert "other settings" in run(*words, "--seed", 9, fails=ConfigError)["error"]


def test_models_and_temperatures_take_turns_and_each_response_says_whose_it_is(world: World, run: Run, tmp_path: Path) -> None:
    run("sample", "--model", world.base, "--model", world.other, "--temperature", 0.5, "--temperature", 1.5, "-n", 5,
        "--max-tokens", 4, "--out", "s.jsonl")  # fmt: skip
    origins = [[(o["model"], o["temperature"]) for o in row["origin"]] for row in lines(tmp_path / "s.jsonl").values()]
    ways = [(str(m), t) for m in (world.base, world.other) for t in (0.5, 1.5)]
    assert origins == [[*ways, ways[0]]] * 3
    examples = read_examples(tmp_path / "s.jsonl").examples
    assert [len(e.responses) for e in examples] == [5, 5, 5]
    assert examples[0].prompt == (Message("user", "What is a tide?"),)


def test_a_stop_text_ends_a_response_and_is_cut(world: World, run: Run, tmp_path: Path) -> None:
    run("sample", "--model", world.base, "--max-tokens", 12, "--temperature", 0, "--out", "whole.jsonl")
    whole = lines(tmp_path / "whole.jsonl")
    name, text = next((n, row["responses"][0]) for n, row in whole.items())
    stop = text[len(text) // 2]
    run("sample", "--model", world.base, "--max-tokens", 12, "--temperature", 0, "--stop", stop, "--out", "cut.jsonl")
    cut = lines(tmp_path / "cut.jsonl")[name]
    assert cut["responses"] == [text.split(stop)[0]] and cut["origin"][0]["finish"] == "stop"


def test_good_and_bad_instructions_make_pairs(world: World, run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("Be wrong.", encoding="utf-8")
    run("generate-pairs", "--model", world.base, "--out", "g.jsonl", "--max-tokens", 6, "--bad", "bad.txt")
    data = read_examples(tmp_path / "g.jsonl")
    assert [(p.winner, p.loser) for e in data.examples for p in e.pairs] == [(0, 1)] * 3
    rows = lines(tmp_path / "g.jsonl")
    assert {tuple(o["instruction"] for o in row["origin"]) for row in rows.values()} == {("good", "bad")}
    assert all(len(row["prompt"]) == 1 for row in rows.values()), "instructions are no part of the prompt"
    two = run("generate-pairs", "--model", "a", "--model", "b", "--out", "x.jsonl", fails=ConfigError)
    assert "one model writes both" in two["error"]


def test_a_local_model_judges_by_one_forward_pass(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    front = "---\nlabels: [A, B]\n---\n<|im_start|>user\n{instruction}\nA {output_1}\nB {output_2}\n<|im_end|>"
    (tmp_path / "t.txt").write_text(front, encoding="utf-8")
    row = {"prompt": [{"role": "user", "content": "Colour?"}], "responses": ["red", "blue"]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    words = ["judge", "--data", "d.jsonl", "--judge-model", str(world.base), "--template", "t.txt", "--out", "j.jsonl"]
    done = CliRunner().invoke(app, [*words, "--cache", "r.sqlite", "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    judged = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert [j["shown_order"] for j in judged] == [[0, 1], [1, 0]]

    import torch

    from preftune.model.load import load_model, open_renderer

    model, renderer = load_model(world.base).eval(), open_renderer(world.base)
    for j in judged:  # by hand: the next-token distribution after the prompt
        first, second = (row["responses"][k] for k in j["shown_order"])
        ids = renderer.prompt_ids((Message("user", f"Colour?\nA {first}\nB {second}"),))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(ids[None].astype("int64"))).logits[0, -1].double()
        a, b = (renderer.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "AB")
        share = float(torch.softmax(logits[[a, b]], -1)[0])
        assert j["p"] == pytest.approx(share if j["shown_order"] == [0, 1] else 1 - share, abs=1e-5)


# ---- a server ---------------------------------------------------------------------------------------------------------


def test_a_server_is_asked_once_for_each_sample(run: Run, tmp_path: Path) -> None:
    count = iter(range(100))
    with serving(
        TapeServer(reply=lambda m: f"reply {next(count)} to {m[-1]['content']}", faults={1: "429", 4: "drop"})
    ) as state:
        words = ("sample", "--model", "m", "--base-url", state.url, "-n", 4, "--system", "Be brief.", "--out", "s.jsonl")
        found = run(*words)
        assert state.n_requests == 14 and found["n_responses"] == 12
        assert run(*words)["ledger"]["n_requests"] == 0
    assert {body["messages"][0]["content"] for body in state.bodies} == {"Be brief."}
    seeds = [body["seed"] for body in state.bodies if body["messages"][1]["content"] == "Say hi."]
    assert len(set(seeds)) == 4, "each sample has a seed of its own"
    for row in lines(tmp_path / "s.jsonl").values():
        assert len(set(row["responses"])) == 4 and row["prompt"][0]["role"] == "user"


def test_prompts_without_an_answer_are_said_and_asked_the_next_time(run: Run, tmp_path: Path) -> None:
    with serving(TapeServer(reply=lambda m: "yes", faults={0: "400"})) as state:
        words = ("sample", "--model", "m", "--base-url", state.url, "--concurrency", 1, "--out", "s.jsonl")
        found = run(*words, fails=ServerError)
        assert (found["n_written"], found["n_missing"]) == (2, 1) and "1 prompts have no responses" in found["error"]
        assert run(*words)["n_before"] == 2
    assert state.n_requests == 4 and len(lines(tmp_path / "s.jsonl")) == 3


@pytest.fixture(scope="module")
def served(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `transformers serve` with the tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("served") / "log"
    code = "from transformers.cli.transformers import main; main()"
    words = ["serve", str(world.base), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_transformers_serve_answers_as_the_local_model_does(served: str, world: World, run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("What is a tide?\nSay hi.\n", encoding="utf-8")
    words = ("--model", world.base, "--temperature", 0, "--max-tokens", 8)
    remote = run("sample", *words, "--base-url", served, "--out", "remote.jsonl")
    local = run("sample", *words, "--out", "local.jsonl")
    theirs, ours = lines(tmp_path / "remote.jsonl"), lines(tmp_path / "local.jsonl")
    assert {n: row["responses"] for n, row in theirs.items()} == {n: row["responses"] for n, row in ours.items()}
    assert remote["ledger"]["tokens_in"] == local["ledger"]["tokens_in"] > 0


# ---- prompts and figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "\ufeffOne?\n\n  Two?  \nOne?\n", ["One?", "Two?"]),
        ("p.jsonl", '{"prompt": "One?"}\n{"prompt": [{"role": "user", "content": "Two?"}], "year": 3}\n', ["One?", "Two?"]),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "One?"}]}\n', ["One?"]),
        ("p.jsonl", '{"prompt": "One?", "chosen": "a", "rejected": "b"}\n', ["One?"]),
        ("p.csv", "prompt\nOne?\nTwo?\n", ["One?", "Two?"]),
    ],
)
def test_prompts_are_read_from_what_people_have(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = read_prompts(str(tmp_path / name)).prompts
    assert [p.prompt if isinstance(p.prompt, str) else p.prompt[0].content for p in found] == expected


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("p.txt", "\n \n", "no prompts in it"),
        ("p.jsonl", '{"prompt": "One?"}\n{"prompt": " "}\n{"prompt": 3}\n', r"(?s)2 of 3.*prompt is empty.*prompt is a"),
        ("p.jsonl", '{"id": 1, "prompt": "One?"}\n{"id": 1, "prompt": "Two?"}\n', "stands for 2 different prompts"),
        ("p.jsonl", '{"question": "One?"}\n', "columns"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_asked_are_listed(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=reason):
        read_prompts(str(tmp_path / name))


@pytest.mark.parametrize("wrong", [{"n": 1}, {"top_p": 0.0}, {"min_p": 2.0}, {"max_tokens": 0}])
def test_a_plan_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Plan((Way("a"), Way("b")), **{"n": 2} | wrong)


def test_diversity_by_hand() -> None:
    found = diversity([["a b", "a b"], ["a b c", "d e f"], ["alone"]])
    assert found == (pytest.approx((0.5 + 1) / 2), pytest.approx((0.5 + 1) / 2), 0.25, pytest.approx(0.5), 2)
    assert diversity([["x"]]) == (None, None, None, None, 0)
    assert similarity("the cat sat", "the cat sat!") == 0.875
    assert (distinct([""], 1), mean_similarity(["a"])) == (None, None)


@given(st.text(max_size=30), st.text(max_size=30))
def test_similarity_is_a_symmetric_share(a: str, b: str) -> None:
    assert similarity(a, b) == similarity(b, a)
    assert 0 <= similarity(a, b) <= 1 == similarity(a, a)
