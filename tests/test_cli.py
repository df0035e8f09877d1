"""The command line: verbs, exit codes, what goes to which stream, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import World, cli, command, finish, read_jsonl, spawn

import preftune
from preftune.cli import _talk
from preftune.config import Config
from preftune.errors import DataError

HEAVY = ("torch", "transformers", "numpy", "datasets", "matplotlib", "pydantic", "peft")


def python(code: str, **environment: str) -> str:
    """Standard output of Python code in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom preftune.cli import main\nsys.argv = ['preftune', '--help']\n"
        "try:\n    main()\nexcept SystemExit as leave:\n    assert not leave.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = python(code, COLUMNS="100", NO_COLOR="1")
    assert out.splitlines()[-1] == "[]"
    for verb in ("train", "score", "chat", "config", "check", "report", "demo"):
        assert f" {verb} " in out


def test_settings_are_shown_without_torch() -> None:
    code = "import sys\nfrom preftune.config import describe\ndescribe('dpo')\nprint('transformers' in sys.modules)"
    assert python(code) == "False\n"


def test_what_config_prints_is_a_recipe(tmp_path: Path) -> None:
    left = cli("config")
    assert left.code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(left.out)
    assert Config.load(recipe) == Config.of({})
    recipe.write_text(cli("config", "--loss", "sft").out)
    assert Config.load(recipe) == Config.of({"loss": "sft"})
    settings = [line for line in left.out.splitlines() if re.match(r"^ *[a-z_0-9]+:", line)]
    assert len(settings) > 40
    assert all("#" in line or line.rstrip().endswith(":") for line in settings), "every setting has a line of help"


def test_train_with_a_recipe_and_words_that_win_over_it(world: World, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loss: {name: dpo, beta: 0.3}\nbatch:\n  pairs_per_step: 4\nsteps: 2\nsamples: {n: 0}\n")
    left = cli("train", recipe, f"model={world.base}", f"data={world.file('pairs')}", f"out={tmp_path / 'run'}",
               f"cache={tmp_path}", "batch.pairs_per_step=6")  # fmt: skip
    assert left.code == 0 and left.out == f"{tmp_path / 'run'}\n"
    config = Config.load(tmp_path / "run" / "config.yaml")
    assert (config.loss_parameters["beta"], config.batch.pairs_per_step, config.steps) == (0.3, 6, 2)


def test_train_without_a_recipe_names_its_folder_itself(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    left = cli("train", f"model={world.base}", f"data={world.file('pairs')}", f"cache={tmp_path}", "steps=1")
    assert left.code == 0, left.err
    assert re.fullmatch(r"runs/dpo-\d{8}-\d{6}\n", left.out)
    assert (tmp_path / left.out.strip() / "model").is_dir()


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (Path(__file__).parents[1] / "recipes").glob("*.yaml")))
def test_the_recipes_of_the_repository(world: World, tmp_path: Path, recipe: str) -> None:
    file = Path(__file__).parents[1] / "recipes" / f"{recipe}.yaml"
    words = [f"model={world.base}", f"data={world.file('pairs')}", f"out={tmp_path / 'run'}", f"cache={tmp_path}"]
    if recipe == "ppo":  # it says nothing of a reward, which is everybody's own
        (tmp_path / "rule.py").write_text("def brief(prompt, response):\n    return -len(response)\n")
        words.append(f"reward.rule={tmp_path / 'rule.py'}:brief")
    left = cli("train", file, *words, "steps=1")  # as it stands: also a model with a short context takes it
    assert left.code == 0, left.err


def test_score_writes_a_row_per_response(world: World, tmp_path: Path) -> None:
    left = cli("score", "--model", world.base, "--data", world.file("held_out"))
    rows = [json.loads(line) for line in left.out.splitlines()]
    assert left.code == 0 and len(rows) == 20
    assert [list(row) for row in rows] == [["id", "response", "logp_sum", "n_tokens"]] * 20
    assert [row["response"] for row in rows] == [0, 1] * 10
    out = tmp_path / "deep" / "rows.jsonl"
    words = ("--model", world.other, "--reference", world.base, "--data", world.file("held_out"), "--beta", "0.5", "--out", out)
    left = cli("score", *words)
    assert left.code == 0 and left.out == ""
    more = read_jsonl(out)
    assert [list(r) for r in more] == [["id", "response", "logp_sum", "n_tokens", "ref_logp_sum", "reward"]] * 20
    for row, plain in zip(more, rows, strict=True):
        assert row["id"] == plain["id"] and row["n_tokens"] == plain["n_tokens"]
        assert abs(row["ref_logp_sum"] - plain["logp_sum"]) < 1e-4
        assert row["reward"] == pytest.approx(0.5 * (row["logp_sum"] - row["ref_logp_sum"]))


def test_check_counts_and_shows_what_is_scored(world: World) -> None:
    left = cli("check", world.file("chat"), "--model", world.base)
    assert left.code == 0
    assert "48 rows: 48 examples of 48 prompts, 0 set aside" in left.out
    assert "⟦" in left.out and left.out.count("⟦<|im_end|>⟧") == 2 and "<|im_start|>assistant" in left.out
    found = json.loads(cli("check", world.file("pairs"), "--json").out)
    assert (found["rows_read"], found["pairs"], found["responses"]) == (48, 48, 96)


def test_check_refuses_what_is_of_no_effect_without_a_model(world: World) -> None:
    left = cli("check", str(world.file("chat")), "--max-length", "64")
    assert left.code == 2 and "--model" in left.err


def test_report_is_written_again_from_the_files(world: World, tmp_path: Path) -> None:
    assert cli("train", *world.words(tmp_path / "run", steps=1)).code == 0
    page = tmp_path / "run" / "report.html"
    page.unlink()
    left = cli("report", tmp_path / "run")
    assert left.code == 0 and left.out.strip() == str(page) and page.stat().st_size > 1000


def test_one_answer_and_a_piped_conversation(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("chat", world.base, "--max-tokens", "8", "--temperature", "0")
    first = cli(*words, "--prompt", "Hello")
    assert first.code == 0 and first.out.endswith("\n") and len(first.out) > 1
    assert cli(*words, "--prompt", "Hello").out == first.out
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nHello\n/new\nHello\n/quit\nnever read\n"))
    said = cli(*words)
    answers = said.out.splitlines(keepends=True)
    assert said.code == 0 and "you>" not in said.out
    assert said.out.startswith(first.out) and said.out.endswith(first.out)
    assert said.out != 3 * first.out, "the second answer knows the first"
    assert len(answers) >= 3


class Terminal(io.StringIO):
    """Lines typed by a person."""

    def isatty(self) -> bool:
        return True


def test_a_conversation_at_a_terminal_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Model:
        asked: list[str] = []

        def answer(self, text: str) -> Iterator[str]:
            self.asked.append(text)
            yield "an "
            if text == "long":
                raise KeyboardInterrupt
            if text == "full":
                raise DataError("the context is full")
            yield "answer"

    monkeypatch.setattr("sys.stdin", Terminal("long\nfull\n/nwe\nshort\n"))
    _talk(Model())
    out, err = capsys.readouterr()
    assert Model.asked == ["long", "full", "short"] and out.endswith("an answer\nyou> \n")
    assert "/new starts over" in err.splitlines()[0] and "the context is full\n/new" in err and "/nwe: no such command" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("full\n"))
    with pytest.raises(DataError):
        _talk(Model())


def test_nothing_but_text_in_a_pipe(world: World, tmp_path: Path) -> None:
    for name, environment in (("plain", {}), ("terminal", {"TERM": "xterm-256color"})):
        log = tmp_path / name
        assert finish(spawn(command, ["train", *world.words(tmp_path / f"run-{name}", steps=2)], str(log), environment)) == [0]
        text = log.read_text()
        assert "\x1b" not in text and "\r" not in text and "held-out after" in text


def on_a_terminal(words: list[str], environment: dict[str, str]) -> str:
    """What a command writes to a terminal."""
    import pty

    ours, theirs = pty.openpty()
    process = spawn(command, words, os.ttyname(theirs), environment)
    pieces = []
    while process.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.05)[0]:
            pieces.append(os.read(ours, 65536))
    os.close(theirs)
    os.close(ours)
    assert finish(process) == [0]
    return b"".join(pieces).decode()


def test_a_line_is_drawn_on_a_terminal_without_colour_where_none_is_wanted(world: World, tmp_path: Path) -> None:
    wanted = {"TERM": "xterm-256color", "NO_COLOR": "1", "COLUMNS": "160"}
    text = on_a_terminal(["train", *world.words(tmp_path / "run")], wanted)
    assert "training" in text and "held-out after" in text
    assert "\x1b[?25l" in text, "the cursor is hidden while a line is drawn"
    assert not re.search(r"\x1b\[(3[0-7]|9[0-7]|38;)", text), "no colours"


def test_a_pipe_that_is_closed_early_gives_no_traceback() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([sys.executable, "-m", "preftune", "config"], stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert done.returncode == 1 and done.stderr == ""


def test_a_stream_of_ascii_alone_gives_no_traceback() -> None:
    left = subprocess.run(
        [sys.executable, "-m", "preftune", "config"], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert left.returncode == 0 and b"\\u2026" in left.stdout


def test_version() -> None:
    assert cli("--version").out == f"preftune {preftune.__version__}\n"


def test_flags_in_the_place_of_settings_are_answered(tmp_path: Path) -> None:
    for words in (["--lr", "1e-4"], ["--optim.lr=1e-4"], ["--fast"]):
        left = cli("train", "model=m", "data=d", *words)
        assert left.code == 2 and "no such option; settings are given as key=value" in left.err and words[0] in left.err
    left = cli("train", "--resume")
    assert left.code == 2 and "--resume: give the folder" in left.err


def test_a_run_is_scored_from_another_folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.base.parent)
    words = [f"model={world.base.name}", f"data={world.file('pairs')}", f"out={tmp_path / 'run'}", f"cache={tmp_path}"]
    assert cli("train", *words, "steps=1", "samples.n=0").code == 0
    monkeypatch.chdir(tmp_path)
    left = cli("score", "--model", "run", "--data", world.file("held_out"))
    assert left.code == 0 and "ref_logp_sum" in left.out, left.err


def test_unknown_verbs_and_options_leave_with_2() -> None:
    for words in (["trian"], ["train", "--fast"], ["score"]):
        left = cli(*words)
        assert left.code == 2 and "Traceback" not in left.err


def test_the_package_is_a_command_too() -> None:
    done = subprocess.run([sys.executable, "-m", "preftune", "config"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == cli("config").out
