"""Going on: a file of 100,000 judgments in seconds, and sampling that was killed in the middle."""

from __future__ import annotations

import json
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from tape_server import TapeServer, serving
from worlds import cli

from preftune.asking.server import Server
from preftune.data.judgments import append_judgments
from preftune.data.types import Judgment
from preftune.label.judge import Judge
from preftune.label.template import own_template

SECONDS = 5.0  # of CPU; it takes about half of that, more where others keep the machine busy


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_hundred_thousand_judgments_go_on_in_seconds(tmp_path: Path) -> None:
    """50,000 pairs in both orders are in the file; the same command finds that nothing is left, and asks nothing."""
    data, out = tmp_path / "d.jsonl", tmp_path / "j.jsonl"
    rows = [
        {"id": f"e{k}", "prompt": f"question {k}", "responses": [f"one answer {k}", f"some other {k}"]} for k in range(50_000)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with Server("http://127.0.0.1:9/v1") as nobody:
        name = Judge(nobody, "m", own_template("pair")).annotator
    append_judgments(out, [Judgment(f"e{k}", 0, 1, "i", name, o) for k in range(50_000) for o in ((0, 1), (1, 0))])
    with serving(TapeServer()) as state:
        before = cpu_of_children()
        done = subprocess.run(
            [sys.executable, "-m", "preftune", "judge", "--data", data, "--base-url", state.url, "--judge-model", "m",
             "--out", out, "--cache", tmp_path / "r.sqlite", "--reply", "letter", "--json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        used = cpu_of_children() - before
    found = json.loads(done.stdout)
    assert (found["known_before"], found["judgments"], state.n_requests) == (100_000, 100_000, 0)
    assert used < SECONDS, f"{used:.1f} s of CPU, start of Python included"


def test_sampling_that_was_killed_asks_for_what_is_missing_alone(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"question {k}\n" for k in range(60)), encoding="utf-8")
    with serving(TapeServer(reply=lambda m: f"reply to {m[-1]['content']}", delay=0.02)) as state:
        words = [sys.executable, "-m", "preftune", "sample", "--prompts", str(tmp_path / "p.txt"), "--model", "m", "--base-url",
                 state.url, "--out", str(tmp_path / "o.jsonl"), "--cache", str(tmp_path / "r.sqlite"), "--concurrency", "4",
                 "--json"]  # fmt: skip
        first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while sum(state.served.values()) < 20:
            time.sleep(0.005)
        first.send_signal(signal.SIGKILL)
        first.wait()
        time.sleep(0.2)
        file = sqlite3.connect(tmp_path / "r.sqlite")
        kept = file.execute("SELECT count(*) FROM replies").fetchone()[0]
        file.close()
        before = sum(state.served.values())
        done = cli(*words[3:])
    assert kept >= before - 2 * 4, "what was answered is kept, but for what was under way"
    assert sum(state.served.values()) - before == 60 - kept
    assert json.loads(done.out)["n_missing"] == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert sorted(row["responses"][0] for row in rows) == sorted(f"reply to question {k}" for k in range(60))
