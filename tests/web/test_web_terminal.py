"""Judging by keys in a terminal: a real one (pty) and a pipe."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from annotation_for_tests import until, write_pairs

from preftune.data.read import read_examples
from preftune.web.store import Store


def judgments(folder: Path) -> list[tuple[str, str, str, str]]:
    store = Store.open(folder / "a.db", read_examples(folder / "p.jsonl").examples)
    return [(j.verdict, j.strength, j.why, j.annotator) for j in store.judgments()]


def command(folder: Path, *words: str) -> list[str]:
    where = ["annotate", str(folder / "p.jsonl"), "--db", str(folder / "a.db"), "--terminal", "--name", "ada"]
    return [sys.executable, "-m", "preftune", *where, *words]


def test_from_a_pipe(tmp_path: Path) -> None:
    """Choices, a reason, a slight one, undo, what is no key, and the end of input; a second call goes on."""
    write_pairs(tmp_path / "p.jsonl", 4)
    done = subprocess.run(command(tmp_path), input="0uwrit is shorter\n1zb", capture_output=True, text=True, check=True)
    assert "taken back" in done.stdout and "'z'" in done.stdout
    first, second = judgments(tmp_path)
    assert first[0] in ("i", "j") and first[1:] == ("slight", "it is shorter", "ada")
    assert second == ("both_bad", "", "", "ada")
    done = subprocess.run(command(tmp_path), input="s0", capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("all done, thank you")
    assert len(judgments(tmp_path)) == 3


def test_at_a_terminal(tmp_path: Path) -> None:
    """Keys count without Enter, a reason may be mended, q leaves with what was said, and texts cannot drive the terminal."""
    write_pairs(tmp_path / "p.jsonl", 3, prompt="\x1b[2Jclear \x07 bell", chosen="\x1b]0;title\x07")
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command(tmp_path), stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    os.set_blocking(ours, False)
    seen = b""

    def saw(text: bytes, times: int = 1) -> bool:
        nonlocal seen
        with suppress(BlockingIOError):
            seen += os.read(ours, 65536)
        return seen.count(text) >= times

    until(lambda: saw(b"q leave"))
    os.write(ours, b"rshorx\x7ft\r2")
    until(lambda: saw(b"saved: answer 2"))
    until(lambda: saw(b"q leave", times=2))
    os.write(ours, b"0")
    until(lambda: saw(b"saved: a tie"))
    os.write(ours, b"q")
    assert process.wait(20) == 0
    os.close(ours)
    assert [(v in ("i", "j"), why) for v, _, why, _ in judgments(tmp_path)] == [(True, "short"), (False, "")]
    assert b"\x1b[2J" not in seen and b"\x1b]0;" not in seen
