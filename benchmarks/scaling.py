"""How time and memory grow: with the number of pairs, the prompt's share, the response's length, the model, and K.

    python benchmarks/scaling.py --out runs/scaling                       # all parts, some minutes on one core
    python benchmarks/scaling.py --out runs/scaling --part data --pairs 1000000

All inputs are made here: words drawn at random, weights drawn at random. Times are CPU seconds of the process, so that a busy
machine measures what an idle one does; each measure of data is a process of its own, so that a peak of memory belongs to it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PARTS = ("data", "plan", "start", "reference", "step", "ranked")
MAX_LENGTH, BUDGET, N_REFERENCE = 512, 4096, 24
Row = dict[str, Any]


# Inputs


def words(rng: random.Random) -> list[str]:
    """A language of 5,000 words made of random syllables."""
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "s")]
    return ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(5000)]


def make_inputs(folder: Path, sizes: Sequence[int]) -> None:
    """A model of 1.5 million weights, its tokenizer, and files of pairs: prompts of about 60 words, responses of about 40."""
    from peer_inputs import Size, make_model, make_tokenizer

    rng = random.Random(0)
    lexicon = words(rng)

    def say(n: int) -> str:
        return " ".join(rng.choices(lexicon, k=rng.randint(n // 2, 3 * n // 2)))

    if not (folder / "model").exists():
        tokenizer = make_tokenizer([say(50) for _ in range(2000)], 8000)
        make_model(folder / "model", tokenizer, Size(128, 2, 8192), MAX_LENGTH)
    for n in sizes:
        file = folder / f"{n}.jsonl"
        if not file.exists():
            with file.open("w", encoding="utf-8") as stream:
                for _ in range(n):
                    stream.write(json.dumps({"prompt": say(60), "chosen": f" {say(40)}", "rejected": f" {say(40)}"}) + "\n")


def make_tree(rng: Any, prompt: int, lengths: Sequence[int], pairs: Sequence[tuple[int, int]], vocabulary: int = 8192) -> Any:
    import numpy as np

    from preftune.data.types import Branch, Pair, Tree

    def ids(n: int) -> Any:
        return rng.integers(0, vocabulary, n).astype(np.int32)

    branches = tuple(Branch(ids(n), np.ones(n, np.bool_)) for n in lengths)
    return Tree("", ids(prompt), branches, tuple(Pair(*pair) for pair in pairs))


def make_policy(hidden: int = 128, layers: int = 4, vocabulary: int = 8192) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from preftune.engine.policy import Path as Scoring
    from preftune.engine.policy import Policy

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config), Scoring("forest", "own"))


# Measures of data, each in a process of its own


class Laps:
    """CPU seconds and the peak of memory from one lap to the next."""

    def __init__(self) -> None:
        self.row: Row = {}
        self._last = 0.0

    def __call__(self, name: str) -> None:
        now = time.process_time()
        self.row[name] = now - self._last
        self._last = now

    @staticmethod
    def peak() -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child_data(file: str, model: str, cache: str) -> Row:
    """Reads, tokenizes and plans, as `preftune train` does up to the model."""
    import gc

    lap = Laps()
    import numpy as np

    from preftune.config import Config
    from preftune.data.read import read_examples
    from preftune.data.template import build_trees
    from preftune.data.tokens import Kept, tokenization_identity
    from preftune.engine.reference import keys_of
    from preftune.losses.objective import goal_of
    from preftune.model.load import open_renderer
    from preftune.training.material import material
    from preftune.training.plan import Plan, cut

    renderer = open_renderer(model, max_length=MAX_LENGTH)
    lap("imports and tokenizer")
    lap.row["before"] = Laps.peak()
    gc.disable()  # as a run does at its start
    examples = read_examples(file).examples
    lap("reading")
    lap.row["read"] = Laps.peak()
    trees = build_trees(examples, renderer, kept=Kept(Path(cache), tokenization_identity(Path(model), MAX_LENGTH)))
    lap("tokens")
    n, n_tokens = len(trees), sum(t.n_tokens for t in trees)
    del examples
    trees = material(trees, goal_of(Config.of({}))).trees
    lap("material")
    keys_of(trees)
    lap("keys")
    lengths = np.array([t.n_tokens for t in trees], np.int64)
    plan = Plan.of(n, pairs_per_step=32, epochs=1.0, steps=None, seed=0)
    for step in range(plan.n_steps):
        cut(plan.examples(step), lengths, budget=8192)
    lap("planning")
    return lap.row | {"pairs": n, "tokens_per_pair": n_tokens / n, "peak": Laps.peak(), "steps": plan.n_steps}


def child_start(*settings: str) -> Row:
    """A run up to its first training step, and that step, with the imports of `preftune train`, its collector off as there."""
    lap = Laps()
    import gc

    import preftune.cli  # noqa: F401  # the command line, which imports the rest when it is needed

    gc.disable()  # as the command line does until training begins
    lap("python and preftune's command line")
    import torch  # noqa: F401

    lap("torch")
    import transformers.modeling_utils  # noqa: F401

    lap("transformers")
    from preftune.config import Config
    from preftune.model.load import open_renderer

    config = Config.load(None, list(settings))
    from preftune.api import run_job
    from preftune.training.job import Started
    from preftune.training.loop import Step

    lap("preftune")
    open_renderer(str(config.model), max_length=MAX_LENGTH)
    lap("tokenizer")
    for event in run_job(config):
        kind = getattr(event, "kind", "")
        if kind in ("data", "model", "reference"):
            lap({"data": "reading and tokens", "model": "model"}.get(kind, kind))
        elif isinstance(event, Started):
            lap.row["to the first step"] = time.process_time()
        elif isinstance(event, Step):
            lap("first step")
            break
    return lap.row


def in_process(name: str, *arguments: object) -> Row:
    command = [sys.executable, __file__, "--child", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def part_data(out: Path, pairs: Sequence[int]) -> list[Row]:
    import shutil

    rows = []
    make_inputs(out, pairs)
    for n in pairs:
        shutil.rmtree(out / "cache", ignore_errors=True)
        for start in ("first", "again"):
            rows.append({"start": start} | in_process("data", out / f"{n}.jsonl", out / "model", out / "cache"))
        shutil.rmtree(out / "cache", ignore_errors=True)
    return rows


def part_plan(out: Path, pairs: Sequence[int]) -> list[Row]:
    """The order of an epoch and the micro-batches of its every step, from the lengths alone."""
    import numpy as np

    from preftune.training.plan import Plan, cut

    rows = []
    for n in pairs:
        lengths = np.random.default_rng(0).integers(60, 240, n)
        plan = Plan.of(n, pairs_per_step=32, epochs=1.0, steps=None, seed=0)

        def planned(plan: Plan = plan, lengths: Any = lengths) -> None:
            for step in range(plan.n_steps):
                cut(plan.examples(step), lengths, budget=8192)

        before = Laps.peak()
        seconds = _seconds(planned)
        rows.append({"pairs": n, "steps": plan.n_steps, "seconds": seconds, "before": before, "peak": Laps.peak()})
    return rows


def part_start(out: Path, pairs: Sequence[int]) -> list[Row]:
    import shutil

    n = min(max(pairs), 10_000)
    make_inputs(out, [n])
    shutil.rmtree(out / "start", ignore_errors=True)
    same = [
        f"model={out / 'model'}", f"data={out / f'{n}.jsonl'}", f"cache={out / 'start' / 'cache'}", "device=cpu",
        f"batch.max_length={MAX_LENGTH}", "eval.every=0", "samples.n=0",
    ]  # fmt: skip
    rows = []
    for i, (what, other) in enumerate(
        {
            "first": [],
            "β": ["loss.beta=0.3"],
            "seed": ["seed=7"],
            "loss": ["loss.label_smoothing=0.1"],
            "LoRA": ["lora.r=8"],
        }.items()
    ):
        rows.append({"run": what, "pairs": n} | in_process("start", *same, *other, f"out={out / 'start' / str(i)}"))
    return rows


# Measures of the engine


def median_seconds(work: Callable[[], None], n: int = 5) -> float:
    work()
    return statistics.median(_seconds(work) for _ in range(n))


def paired(one: Callable[[], None], other: Callable[[], None], n: int = 5) -> float:
    """How many times longer `one` takes: the median over turns, after a warm-up of both."""
    one(), other()
    return statistics.median(_seconds(one) / _seconds(other) for _ in range(n))


def _seconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def pair_step(policy: Any, trees: Sequence[Any]) -> Callable[[], None]:
    """Forward and backward of DPO's loss over the pairs of the trees, packed anew each time."""
    import torch

    from preftune.engine.policy import response_sums

    first, pairs = 0, []
    for tree in trees:
        pairs += [(first + pair.winner, first + pair.loser) for pair in tree.pairs]
        first += len(tree.branches)
    winner, loser = torch.tensor(pairs).unbind(1)

    def step() -> None:
        policy.zero_grad()
        batch = policy.pack(trees)
        sums = response_sums(policy(batch), batch.owner, batch.n_responses)
        (-torch.nn.functional.logsigmoid(0.1 * (sums[winner] - sums[loser])).sum()).backward()

    return step


def part_step(out: Path, pairs: Sequence[int]) -> list[Row]:
    import numpy as np

    shapes = [("prompt share", 128, 4, p, (512 - p) // 2) for p in (32, 128, 256, 384, 448)]
    shapes += [("response length", 128, 4, 64, r) for r in (32, 64, 128, 256, 512)]
    shapes += [("model", h, n, 128, 64) for h, n in ((64, 2), (128, 4), (256, 4), (384, 6))]
    rows = []
    for axis, hidden, layers, prompt, response in shapes:
        policy, rng, n = make_policy(hidden, layers), np.random.default_rng(0), max(2, 2048 // (prompt + 2 * response))
        trees = [make_tree(rng, prompt, (response, response), [(0, 1)]) for _ in range(n)]
        seconds = median_seconds(pair_step(policy, trees))
        read = sum(t.n_tokens for t in trees)
        weights = sum(p.numel() for p in policy.parameters())
        rows.append(
            {"axis": axis, "weights": weights, "prompt": prompt, "response": response, "ms_per_pair": 1000 * seconds / n,
             "us_per_token": 1e6 * seconds / read}
        )  # fmt: skip
    return rows


def part_ranked(out: Path, pairs: Sequence[int]) -> list[Row]:
    import numpy as np

    policy, rows = make_policy(), []
    for prompt, response in ((32, 128), (128, 64), (448, 64)):
        for k in (2, 4, 8):
            rng = np.random.default_rng(0)
            together = [make_tree(rng, prompt, [response] * k, [(0, loser) for loser in range(1, k)]) for _ in range(2)]
            apart = [pair for tree in together for pair in make_apart(tree)]
            one, many = pair_step(policy, together), pair_step(policy, apart)
            ratio = paired(many, one)
            expected = (k - 1) * (prompt + 2 * response) / (prompt + k * response)
            rows.append({"prompt": prompt, "response": response, "k": k, "speed_up": ratio, "fewer_tokens": expected})
    return rows


def make_apart(tree: Any) -> list[Any]:
    """Best against each of the rest, as trees of their own."""
    from preftune.data.types import Pair, Tree

    return [Tree("", tree.prompt, (tree.branches[0], branch), (Pair(0, 1),)) for branch in tree.branches[1:]]


def part_reference(out: Path, pairs: Sequence[int]) -> list[Row]:
    """Scoring as the reference is scored, beside the bare forward pass over the same batches, packed before."""
    import numpy as np
    import torch

    from preftune.engine.score import by_length, score_all

    policy, rng, rows = make_policy().eval(), np.random.default_rng(0), []
    for longest in (128, 512):
        sizes = rng.integers(16, longest, (N_REFERENCE, 3)).tolist()
        trees = [make_tree(rng, p, (a, b), [(0, 1)]) for p, a, b in sizes]
        lengths = [t.n_tokens for t in trees]
        batches = [policy.pack([trees[i] for i in group]) for group in by_length(range(N_REFERENCE), lengths, BUDGET)]

        def bare(batches: Any = batches) -> None:
            with torch.inference_mode():
                for batch in batches:
                    policy(batch)

        def scored(trees: Any = trees) -> None:
            for _ in score_all(policy, trees, budget=BUDGET):
                pass

        ratio = paired(bare, scored)
        rows.append({"longest": longest, "tokens": sum(lengths), "throughput_of_bare": ratio})
    return rows


# What was found


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(name, row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if name in ("before", "read", "peak"):
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def draw(found: dict[str, list[Row]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for name in ("reading", "tokens", "planning"):
        first = [r for r in found["data"] if r["start"] == "first"]
        axes[0].loglog([r["pairs"] for r in first], [r[name] for r in first], "o-", label=name)
    again = [r for r in found["data"] if r["start"] == "again"]
    axes[0].loglog([r["pairs"] for r in again], [r["tokens"] for r in again], "o--", label="tokens, again")
    axes[0].set(xlabel="pairs", ylabel="CPU seconds", title="Data")
    for axis, name, scale in ((axes[1], "response length", 1.0), (axes[2], "model", 1e-6)):
        of = {"response length": "response", "model": "weights"}[name]
        rows = [r for r in found["step"] if r["axis"] == name]
        axis.plot([r[of] * scale for r in rows], [r["ms_per_pair"] for r in rows], "o-")
        axis.set(xlabel={"response": "tokens of a response", "weights": "million weights"}[of], ylim=(0, None))
        axis.set(ylabel="CPU ms per pair", title=f"Step: {name}")
    for prompt, response in dict.fromkeys((r["prompt"], r["response"]) for r in found["ranked"]):
        rows = [r for r in found["ranked"] if (r["prompt"], r["response"]) == (prompt, response)]
        axes[3].plot(
            [r["k"] for r in rows], [r["speed_up"] for r in rows], "o-", label=f"prompt {prompt}, responses {response}"
        )
    axes[3].set(xlabel="K responses of one prompt", ylabel="times faster than K-1 pairs", ylim=(0, None), title="K > 2")
    axes[0].legend()
    axes[3].legend()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder for inputs and results")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--pairs", type=int, action="append", help="numbers of pairs; default 1000, 10000, 100000")
    parser.add_argument("--svg", type=Path, help="draw the figure there (needs data, step and ranked)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps({"data": child_data, "start": child_start}[asked.child[0]](*asked.child[1:])))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    results = asked.out / "results.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for part in asked.part or PARTS:
        found[part] = globals()[f"part_{part}"](asked.out.resolve(), asked.pairs or [1000, 10_000, 100_000])
        results.write_text(json.dumps(found, indent=1))
        print(f"\n## {part}\n\n{table(found[part])}", flush=True)
    print(f"\n{platform.machine()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    if asked.svg:
        draw(found, asked.svg)


if __name__ == "__main__":
    main()
