"""`preftune eval` from end to end: what it writes, that nothing is measured twice, one rank or two, and mistakes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from judges_for_tests import code_of, text_of
from tape_server import TapeServer, serving
from worlds import World, cli, command, finish, free_port, read_jsonl, spawn, write_jsonl

import preftune
from preftune.evaluate import job, own_answers
from preftune.evaluate.job import Settings, evaluate
from preftune.evaluate.models import Models
from preftune.evaluate.record import Evaluation
from preftune.run import Run

SHORT = ("--n-prompts", 5, "--max-tokens", 6)


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPO run that has moved."""
    out = tmp_path_factory.mktemp("eval") / "run"
    return preftune.train(world.settings(out, steps=4, optim__lr=1e-2, samples__n=0), quiet=True).path


def record(folder: Path) -> Evaluation:
    run = Run(folder)
    return Evaluation.of(run.read_json(run.evaluation_file))


def timeless(found: Evaluation) -> dict[str, Any]:
    return found.as_dict() | {"at": ""}


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its evaluation by the command line, with a rule as the judge and a text."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "rule.py").write_text("def short(prompt, response):\n    return -len(response)\n")
    (folder / "text.txt").write_text("the kettle is broken\nhello and thank you\n")
    words = ["eval", trained, f"{folder}/rule.py:short", "--by", "rule", *SHORT, "--perplexity", folder / "text.txt"]
    left = cli(*words, "--out", folder / "out", "--json")
    assert left.code == 0, left.err
    assert json.loads(left.out) == json.loads((folder / "out" / "evaluation.json").read_text())
    return folder


def test_all_parts_are_measured_and_read_back(evaluated: Path, trained: Path, world: World) -> None:
    found = record(evaluated / "out")
    assert (found.policy, found.against, found.objective, found.beta) == (str(trained), str(world.base), "dpo", 0.1)
    assert found.held_out is not None and found.train is not None and found.held_out.n_pairs == found.train.n_pairs > 5
    assert found.samples is not None and found.samples.kl_per_response is not None and found.samples.reference is not None
    assert found.samples.kl_per_response.value > 0 and found.samples.n_prompts == 5
    assert found.wins[0].judge == "rule:short" and found.wins[0].n_total == 5
    assert found.perplexity[0].name == "text.txt" and found.perplexity[0].change is not None
    assert found.verdict and "rule:short" in found.verdict


def test_answers_hold_what_was_judged(evaluated: Path) -> None:
    rows = read_jsonl(evaluated / "out" / "answers.jsonl")
    assert len(rows) == 5
    for row in rows:
        ours, theirs = len(row["policy"][0]["text"]), len(row["reference"][0]["text"])
        assert row["preference"] == (0.5 if ours == theirs else float(ours < theirs))
        assert len(row["policy"]) == len(row["reference"]) == 2
        for answer in row["policy"]:
            assert len(answer["pieces"]) == len(answer["log_ratios"]) == answer["n_tokens"] <= 6


def test_the_same_command_measures_nothing_twice(evaluated: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any, **named: Any) -> Any:
        raise AssertionError("measured again")

    before = record(evaluated / "out")
    for module, name in ((job, "score_pairs"), (job, "perplexity"), (own_answers, "compare_all")):
        monkeypatch.setattr(module, name, never)
    settings = Settings(out=evaluated / "out", prompts=5, max_tokens=6, texts=(evaluated / "text.txt",))
    again = evaluate(Models.open(str(trained)), settings)
    assert (again.held_out, again.train, again.samples, again.perplexity) == (
        before.held_out, before.train, before.samples, before.perplexity,
    )  # fmt: skip
    with pytest.raises(AssertionError, match="measured again"):
        evaluate(Models.open(str(trained)), Settings(out=evaluated / "out", prompts=5, max_tokens=7))


def test_an_interruption_keeps_what_is_finished(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = own_answers.compare_all

    def stop(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **named)

    monkeypatch.setattr(own_answers, "compare_all", stop)
    left = cli("eval", trained, *SHORT, "--out", tmp_path)
    assert left.code == 75 and "The same command goes on" in left.err
    assert not (tmp_path / "evaluation.json").exists()
    assert {"held-out", "training"} <= set(json.loads((tmp_path / "evaluation-parts.json").read_text()))
    monkeypatch.setattr(own_answers, "compare_all", real)
    monkeypatch.setattr(job, "score_pairs", None)
    assert cli("eval", trained, *SHORT, "--out", tmp_path).code == 0


def test_two_ranks_measure_what_one_does(evaluated: Path, trained: Path, tmp_path: Path) -> None:
    words = [
        "eval",
        str(trained),
        *map(str, SHORT),
        "--perplexity",
        str(evaluated / "text.txt"),
        "--out",
        str(tmp_path / "two"),
    ]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    both = [
        spawn(command, words, str(tmp_path / f"log-{r}"), shared | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)
    ]
    assert finish(*both) == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    one, two = record(evaluated / "out"), record(tmp_path / "two")
    close(timeless(two) | {"wins": [], "verdict": ""}, timeless(one) | {"wins": [], "verdict": ""})
    assert [[a["text"] for a in row["policy"]] for row in read_jsonl(tmp_path / "two" / "answers.jsonl")] == [
        [a["text"] for a in row["policy"]] for row in read_jsonl(evaluated / "out" / "answers.jsonl")
    ]
    assert (tmp_path / "log-1").read_text() == "", "only rank 0 talks"


def close(a: Any, b: Any) -> None:
    """The same but for the rounding of another batch."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            if name not in ("margins", "calibration"):  # a value near an edge may stand on either side of it
                close(a[name], b[name])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            close(x, y)
    else:
        assert a == (pytest.approx(b, abs=2e-4, rel=2e-4) if isinstance(b, float) else b)


def test_a_model_that_is_no_run_and_sft(world: World, tmp_path: Path) -> None:
    """An SFT model has implicit rewards against where it began, and its own loss on what it held out."""
    sft = preftune.train(world.settings(tmp_path / "sft", loss__name="sft", steps=2, samples__n=0, eval__every=2), quiet=True)
    left = cli("eval", sft.path, "--against", world.base, "--n-prompts", 0)
    found = record(sft.path)
    assert left.code == 0 and found.held_out is not None and found.held_out.n_pairs > 5
    assert found.held_out.loss == pytest.approx(sft.metrics(split="eval")[-1]["loss"], abs=2e-4)
    assert found.held_out.chosen_log_ratio is not None and "held out" in left.out
    left = cli(
        "eval", sft.model, "--against", world.base, "--data", world.file("held_out"), "--out", tmp_path / "x", "--n-prompts", 0
    )
    assert left.code == 0 and record(tmp_path / "x").held_out.n_pairs == 10  # type: ignore[union-attr]
    assert record(tmp_path / "x").held_out.loss is None  # type: ignore[union-attr]


def test_a_run_on_its_own_replies(world: World, tmp_path: Path) -> None:
    """Its data are prompts: answers and KL are measured; pairs that are named are compared by implicit rewards."""
    (tmp_path / "rule.py").write_text("def score(prompt, response):\n    return float(len(response))\n")
    run = preftune.train(
        world.settings(tmp_path / "own", steps=1, loss="rloo", rollout__max_tokens=4, rollout__prompts=4, rollout__n=2,
                       rollout__beta=0.2, reward__rule=f"{tmp_path}/rule.py:score", samples__n=0), quiet=True,
    )  # fmt: skip
    found = evaluate(Models.open(str(run.path)), Settings(prompts=2, max_tokens=4))
    assert (found.objective, found.against, found.beta) == ("rloo", str(world.base), 0.2)
    assert found.held_out is None and found.samples is not None and found.samples.n_prompts == 2
    named = evaluate(Models.open(str(run.path)), Settings(data=str(world.file("pairs")), prompts=0, out=tmp_path / "pairs"))
    assert named.held_out is not None and named.held_out.n_pairs > 5 and named.held_out.loss is None and named.train is None


def test_by_category_and_source_of_the_file(world: World, tmp_path: Path) -> None:
    rows = [row | {"category": "even" if i % 2 else "odd", "source": "web" if i < 3 else "mail"}
            for i, row in enumerate(read_jsonl(world.file("held_out")))]  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = evaluate(Models.open(str(world.base), against=str(world.other)), Settings(str(data), out=tmp_path, prompts=0))
    assert found.held_out is not None
    assert {what: {n: e.n for n, e in parts.items()} for what, parts in found.held_out.by.items() if what != "length"} == {
        "category": {"even": 5, "odd": 5},
        "source": {"mail": 7, "web": 3},
    }


def test_stored_answers_are_found_by_their_prompt(trained: Path, world: World, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": " stored"} for row in read_jsonl(world.file("pairs"))[::2]]
    stored = write_jsonl(tmp_path / "stored.jsonl", rows)
    (tmp_path / "rule.py").write_text("def stored(prompt, response):\n    return float('stored' in response)\n")
    words = ["eval", trained, f"{tmp_path}/rule.py:stored", "--by", "rule", "--n-prompts", 12, "--max-tokens", 4]
    left = cli(*words, "--answers", stored, "--out", tmp_path / "out")
    found = record(tmp_path / "out")
    assert left.code == 0 and 0 < found.wins[0].n_total < 12
    assert (found.wins[0].against, found.wins[0].win_rate.value) == ("stored", 0.0)
    assert any(f"{12 - found.wins[0].n_total} of 12 prompts have no answer" in note for note in found.notes)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["{base}", "--data", "{held}"], "--out"),
        (["{base}", "--out", "{out}"], "--data"),
        (["{run}", "--by", "rule"], "--by rule: name FILE.py:FUNCTION"),
        (["{run}", "x.py:f"], "--judge-model"),
        (["{run}", "{out}/x.py:f", "--by", "rule"], "x.py: no such file; a rule of your own"),
        (["{run}", "--judge-model", "{out}/none"], "no such folder"),
        (["{run}", "--answers", "x"], "somebody has to judge"),
        (["{run}", "--rubric", "honesty"], "somebody has to judge"),
        (["{run}", "x.py:f", "--by", "rule", "--rubric", "honesty"], "--rubric: only a language model"),
        (["{run}", "--judge-model", "j", "--template-name", "pair-v2"], "--template-name: says how"),
        (["{run}", "--stride", "4"], "--stride: is of --perplexity"),
        (["{run}", "--lm-eval-limit", "4"], "--lm-eval-limit: is of --lm-eval"),
        (["{run}", "--beta", "0"], "--beta: 0.0 given"),
        (["{run}", "--against", "{out}/none"], "no such folder"),
        (["{run}", "--perplexity", "{out}/none.txt"], "no such file"),
    ],
)
def test_mistakes(trained: Path, world: World, tmp_path: Path, words: list[str], why: str) -> None:
    places = {"base": world.base, "held": world.file("held_out"), "run": trained, "out": tmp_path}
    left = cli("eval", *(word.format(**places) for word in words), "--n-prompts", 0)
    assert left.code == 2 and why in left.err and "Traceback" not in left.err


def test_a_language_model_judges_in_both_orders(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that finds the shorter answer better, whichever is shown first; a second look asks nothing."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")

    def shorter(messages: list[dict[str, str]]) -> str:
        a, b = (len(text_of(messages, side)) for side in "AB")
        return f"{'A' if a <= b else 'B'} {code_of(messages)}"

    with serving(TapeServer(reply=shorter)) as state:
        words = ["eval", trained, "--n-prompts", 6, "--max-tokens", 5, "--out", tmp_path / "out", "--judge-model", "m",
                 "--base-url", state.url, "--cache", tmp_path / "replies.sqlite"]  # fmt: skip
        left = cli(*words)
        assert left.code == 0, left.err
        n_asked = state.n_requests
        assert cli(*words).code == 0 and state.n_requests - n_asked <= 1, "but for what form the judge can give"
    (wins,) = record(tmp_path / "out").wins
    rows = read_jsonl(tmp_path / "out" / "answers.jsonl")
    lengths = [(len(row["policy"][0]["text"]), len(row["reference"][0]["text"])) for row in rows]
    assert (wins.n_wins, wins.n_wins_base) == (sum(a < b for a, b in lengths), sum(a > b for a, b in lengths))
    assert wins.order_consistency is not None and wins.first_wins is not None and wins.judge.startswith("m/")
