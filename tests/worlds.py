"""A tiny world to train in: models of a few thousand weights, their tokenizer, and data in the shapes that people have.

A run in it takes about a second. `preftune` is driven through its command line in this process (`cli`), or in processes of
their own (`spawn`), forked from a server that has imported everything once, which tests may kill.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers_for_tests import CHATML, byte_level

THINGS = ("kettle", "lamp", "ferry ticket", "harbour map", "old chair", "very small teapot with a blue lid")
WORDS = ("sorry", "please", "send", "new", "soon", "thank you", "keep", "early", "last", "nearest", "broken", "what", "hello")


@dataclass(frozen=True)
class World:
    """Folders and files of the world."""

    root: Path

    @property
    def base(self) -> Path:
        """A Llama-style base model whose tokenizer has a ChatML template."""
        return self.root / "base"

    @property
    def other(self) -> Path:
        """Another model with the same tokenizer."""
        return self.root / "other"

    def file(self, name: str) -> Path:
        """pairs, chat, demonstrations (messages), completions, or held_out."""
        return self.root / f"{name}.jsonl"

    def settings(self, out: Path, **more: Any) -> dict[str, Any]:
        """Settings of a short DPO run on the pairs; dots are spelled __."""
        short: dict[str, Any] = {
            "model": str(self.base), "data": str(self.file("pairs")), "out": str(out), "cache": str(self.root / "cache"),
            "optim.lr": 1e-3, "batch.pairs_per_step": 8, "steps": 5, "eval.fraction": 0.2, "samples.n": 2,
            "samples.max_tokens": 6, "eval.every": 5,
        }  # fmt: skip
        return short | {name.replace("__", "."): value for name, value in more.items()}

    def words(self, out: Path, **more: Any) -> list[str]:
        """The same as words of a command line."""
        return [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in
                self.settings(out, **more).items()]  # fmt: skip


def build(root: Path) -> World:
    """Writes the world; the same bytes every time."""
    world = World(root)
    save_model(world.base, seed=0)
    save_model(world.other, seed=1)
    pairs = [_pair(i) for i in range(48)]
    write_jsonl(world.file("pairs"), pairs)
    write_jsonl(world.file("chat"), [p | {"prompt": [{"role": "user", "content": p["prompt"]}]} for p in pairs])
    write_jsonl(world.file("held_out"), [_pair(i) for i in range(100, 110)])
    turns = [
        [("user", p["prompt"]), ("assistant", p["chosen"]), ("user", "Thank you"), ("assistant", "Gladly.")] for p in pairs
    ]
    write_jsonl(world.file("demonstrations"), [{"messages": [{"role": r, "content": c} for r, c in t]} for t in turns])
    write_jsonl(world.file("completions"), [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs])
    return world


def _pair(i: int) -> dict[str, str]:
    rng = random.Random(i)
    said = [" ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(3)]
    prompt = f"{i}: my {rng.choice(THINGS)} {said[0]}?"
    return {"prompt": prompt, "chosen": f" I am sorry. {said[1]}.", "rejected": f" Not at all, {said[2]}!"}


def tokenizer() -> Any:
    """Byte-level, with ChatML's tokens and template; EOS is the end of turn, PAD another token."""
    return byte_level(special=("<|im_start|>", "<|im_end|>", "<|end|>"), eos="<|im_end|>", pad="<|end|>", template=CHATML)


def model(*, seed: int = 0, hidden: int = 32, layers: int = 2, positions: int = 256, vocabulary: int = 420) -> Any:
    """A Llama with random weights, large enough that its log-probs differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=positions, initializer_range=0.1,
        bos_token_id=None, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_model(folder: Path, **shape: Any) -> Path:
    """A model folder with tokenizer."""
    model(**shape).save_pretrained(str(folder))
    tokenizer().save_pretrained(str(folder))
    return folder


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """JSON lines as rows."""
    return [json.loads(line) for line in file.read_text().splitlines()]


class Left(NamedTuple):
    """How a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def cli(*words: str) -> Left:
    """Runs `preftune WORDS` in this process."""
    from preftune.cli import main

    out, err, argv = StringIO(), StringIO(), sys.argv
    sys.argv = ["preftune", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    finally:
        sys.argv = argv
    return Left(code, out.getvalue(), err.getvalue())


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload_for_tests"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)  # the server gets no sys.path of ours before 3.12
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ |= {} if before is None else {"PYTHONPATH": before}
    return context


def spawn(function: Callable[..., Any], *arguments: Any) -> Any:
    """A process of its own that calls `function`, a module's top-level one; ready at once, since all is imported already."""
    process = _server().Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def command(words: list[str], log: str, environment: dict[str, str] | None = None) -> None:
    """`preftune WORDS` as the whole of a process; what it writes goes to the file `log`."""
    os.environ.update(environment or {})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import torch

    from preftune.cli import main

    torch.set_num_threads(1)
    sys.argv = ["preftune", *words]
    main()


def finish(*processes: Any, timeout: float = 120) -> list[int]:
    """Waits for processes; their exit codes (negative: the signal)."""
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError("the process did not end")
    return [process.exitcode for process in processes]


def free_port() -> str:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def weights(folder: Path) -> dict[str, Any]:
    """All tensors of a model folder."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same_weights(a: Path, b: Path) -> bool:
    """Whether two model folders hold the same tensors, bit for bit."""
    import torch

    left, right = weights(a), weights(b)
    assert left
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def blank_page(runs: Any) -> Path:
    """Stands in for the report, which takes longer than a run in this world and has tests of its own."""
    runs[0].report_file.write_text("a page")
    return Path(runs[0].report_file)


@contextmanager
def real_pages() -> Iterator[None]:
    """Runs inside write their real report."""
    import preftune.api
    from preftune.report.page import write_report

    preftune.api.write_report = write_report
    try:
        yield
    finally:
        preftune.api.write_report = blank_page


TIMINGS = ("tokens_per_second", "seconds")


def timeless(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Metric rows without what differs from day to day."""
    return ({name: value for name, value in row.items() if name not in TIMINGS} for row in rows)


MEASURED = (
    "loss",
    "grad_norm",
    "kl",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
EXACT = ("rewards/accuracies", "lengths/chosen", "lengths/rejected", "learning_rate", "epoch", "step", "split")


def same_curve(a: Any, b: Any) -> None:
    """Asserts that two runs are one curve: losses to 1e-5, other measures to what follows from them, counts exactly.

    Final weights are the same within what float32 rounds.
    """
    from pytest import approx

    ours, theirs = a.metrics(), b.metrics()
    assert len(ours) == len(theirs) > 4
    for mine, yours in zip(ours, theirs, strict=True):
        assert abs(mine["loss"] - yours["loss"]) <= 1e-5, (mine["step"], mine["split"])
        for name in set(MEASURED) & set(mine):
            assert mine[name] == approx(yours[name], rel=2e-4, abs=2e-4), (name, mine["step"])
        for name in set(EXACT) & set(mine):
            assert mine[name] == yours[name], (name, mine["step"])
    left, right = weights(a.model), weights(b.model)
    assert left.keys() == right.keys()
    moved = max(float((left[n] - right[n]).abs().max()) for n in left)
    assert moved < 2e-4, f"weights differ by {moved}"
