"""Several ranks: the same curve as one, uneven or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from worlds import World, command, finish, free_port, read_jsonl, same_curve, spawn, write_jsonl

import preftune
from preftune.run import Run


def ranks(words: list[str], log: Path, world_size: int = 2) -> list[int]:
    """`preftune WORDS` in processes as torchrun starts them; their exit codes."""
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return finish(
        *(spawn(command, words, f"{log}-{r}", shared | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(world_size))
    )


def logs(log: Path) -> str:
    """All that the ranks wrote."""
    return "\n".join(p.read_text() for p in sorted(log.parent.glob(f"{log.name}-*")))


@pytest.mark.parametrize(
    ("n", "more"),
    [
        (48, {}),
        (21, {"epochs": 2.0, "steps": None}),  # odd, and a last step of one example: fewer than ranks
        (21, {"epochs": 2.0, "steps": None, "lora__r": 4, "optim__lr": 1e-2}),
        (48, {"batch__tokens_per_microbatch": 300}),
    ],
    ids=["even", "uneven", "lora", "accumulation"],
)
def test_two_ranks_give_the_curve_of_one(world: World, tmp_path: Path, n: int, more: dict[str, Any]) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", read_jsonl(world.file("pairs"))[:n])
    held_out = write_jsonl(tmp_path / "held.jsonl", read_jsonl(world.file("held_out"))[:3])
    more = {"data": str(data), "eval__data": str(held_out), "batch__pairs_per_step": 10, "eval__every": 2, **more}
    one = preftune.train(world.settings(tmp_path / "one", **more), quiet=True)
    words = ["train", *world.words(tmp_path / "two", **{k: v for k, v in more.items() if v is not None})]
    words = [w for w in words if not (w.startswith("steps=") and more.get("steps", 0) is None)]
    assert ranks(words, tmp_path / "log") == [0, 0], logs(tmp_path / "log")
    two = Run.open(tmp_path / "two")
    same_curve(one, two)
    assert one.samples() == two.samples()
    assert two.read_json(two.env_file)["ranks"] == 2
    assert (tmp_path / "log-1").read_text() == "", "only rank 0 talks"


def test_more_ranks_than_held_out_examples_and_a_reference_not_scored_yet(world: World, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl", read_jsonl(world.file("held_out"))[:1])
    more = {"eval__data": str(held_out), "eval__every": 2, "cache": str(tmp_path / "cache")}
    assert ranks(["train", *world.words(tmp_path / "two", **more)], tmp_path / "log") == [0, 0], logs(tmp_path / "log")
    same_curve(preftune.train(world.settings(tmp_path / "one", **more), quiet=True), Run.open(tmp_path / "two"))


def test_two_ranks_stop_and_go_on_together(world: World, tmp_path: Path) -> None:
    import signal

    from crashes_for_tests import signalled_at

    words = ["train", *world.words(tmp_path / "two", steps=8)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first = spawn(command, words, str(tmp_path / "log-0"), shared | {"RANK": "0", "LOCAL_RANK": "0"})
    second = spawn(signalled_at, words, str(tmp_path / "log-1"), "update", 3, signal.SIGTERM, shared | {"RANK": "1"})
    assert finish(first, second) == [75, 75], logs(tmp_path / "log")
    assert ranks([*words, "--resume"], tmp_path / "log") == [0, 0], logs(tmp_path / "log")
    same_curve(preftune.train(world.settings(tmp_path / "one", steps=8), quiet=True), Run.open(tmp_path / "two"))


def test_a_mistake_ends_every_rank(world: World, tmp_path: Path) -> None:
    words = ["train", *world.words(tmp_path / "two", eval__metric="nothing")]
    assert ranks(words, tmp_path / "log") == [2, 2]
    assert not (tmp_path / "two").exists()


def test_torchrun_itself(world: World, tmp_path: Path) -> None:
    """As people start it: torchrun, and the package as a module."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
            "-m", "preftune", "train", *world.words(tmp_path / "two", steps=3)]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "two")
    same_curve(preftune.train(world.settings(tmp_path / "one", steps=3), quiet=True), Run.open(tmp_path / "two"))
