"""The path of a new user, prompts to chat: the commands of docs/from-prompts.md, as they stand there, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from annotation_for_tests import Annotation
from worlds import THINGS, World, cli, read_jsonl, real_pages

from preftune.data.judgments import read_judgments
from preftune.run import Run

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "from-prompts.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    """The page's blocks of one kind, in order."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def shell(commands: str, model: Path) -> str:
    """Runs commands of the page in this folder, those of preftune in this process; what they print."""
    printed = ""
    for line in commands.splitlines():
        words = [word.replace("$MODEL", str(model)) for word in shlex.split(line)]
        if words[0] == "preftune":
            left = cli(*words[1:])
            assert left.code == 0, f"{line}\n{left.out}\n{left.err}"
            printed += left.out
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True)
    return printed


def test_the_page_as_it_stands(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "prompts.txt").write_text(
        "".join(f"Where is my {thing}, the one of row {n}?\n" for n in range(8) for thing in THINGS)
    )
    (tmp_path / "rule.py").write_text(blocks("python")[0])
    sample, judge, export, agree, pairs, check, train, chat = blocks("bash")

    shell(sample, world.base)
    answers = read_jsonl(tmp_path / "answers.jsonl")
    sizes = [len(row["responses"]) for row in answers]  # a model with random weights says nothing at all at times
    assert len(sizes) == 48 and set(sizes) <= {2, 3, 4} and sizes.count(4) > 40

    shell(judge, world.base)
    assert len(read_judgments(tmp_path / "by-rule.jsonl")) == sum(n * (n - 1) // 2 for n in sizes)

    with Annotation(tmp_path / "answers.jsonl", tmp_path / "mine.db") as server:
        me = server.person("me")
        task = me.next()["task"]
        for n in range(10):
            task = me.judge(task["item"], "left" if n % 2 else "right", str(n))["task"]
    shell(export, world.base)
    assert len(read_judgments(tmp_path / "by-me.jsonl")) == 10

    assert "me" in shell(agree, world.base)
    shell(pairs, world.base)
    rows = read_jsonl(tmp_path / "pairs.jsonl"), read_jsonl(tmp_path / "held-out.jsonl")
    assert rows[0] and rows[1] and not {json.dumps(r["prompt"]) for r in rows[0]} & {json.dumps(r["prompt"]) for r in rows[1]}

    assert shell(check, world.base)
    with real_pages():
        shell(train, world.base)
    run = Run.open(tmp_path / "runs" / "aligned")
    assert run.model.is_dir() and run.report_file.exists() and len(run.metrics(split="train")) >= 1
    assert shell(chat, world.base)
