"""The main job on real preference files, from nothing: tokenizer, base model, SFT, DPO of all weights, DPO with LoRA.

    python benchmarks/real_data.py --data ../shared/data --out runs/real --set all
    python benchmarks/real_data.py --data ../shared/data --out runs/real-quick --quick

For each data set a byte-level BPE tokenizer and a small Llama are trained on the text of the training prompts' rows, then
`preftune.train` does the rest, one process a run, so that the peak memory of one run is not that of another:

    base       sft on all replies, preferred or not          the "pretrained" model
    sft        sft on the chosen replies, from base          the reference of what follows
    dpo-full   dpo of all weights, from sft
    dpo-lora   dpo of adapters on all linear layers, from sft

The held-out prompts are the same in all four, and no stage sees them. results.json, table.md and the samples of each run are
written under --out, which holds text of the data: it does not belong into a repository.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from preftune.data.read import read_examples
from preftune.data.split import split_by_prompt
from preftune.data.types import Example
from preftune.run import Run

HELD_OUT, SEED = 0.2, 0
VOCABULARY, CONTEXT = 4096, 1024
STAGES = ("base", "sft", "dpo-full", "dpo-lora")

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class DataSet:
    """Where a data set is, how much of a row is read, and how often each stage reads the rows."""

    file: str
    max_length: int
    epochs: dict[str, int]


SETS = {
    "hh": DataSet("hh_rlhf/harmless-base.test.subset.jsonl.gz", 512, {"base": 3, "sft": 1, "dpo": 2}),
    "dpo_en_demo": DataSet("dpo_en_demo/dpo_en_demo.subset.json.gz", 1024, {"base": 2, "sft": 1, "dpo": 1}),
    "alpaca_eval": DataSet("alpaca_eval/annotations/alpaca-7b.json.gz", 512, {"base": 1, "sft": 1, "dpo": 1}),
}
"""Epochs are those that fit into minutes on one core, not those that would be best."""


@dataclass(frozen=True)
class Size:
    """How large the model is, and what is read of the data."""

    hidden: int = 128
    layers: int = 4
    max_length: int = CONTEXT  # nothing longer is read, whatever the data set says
    rows: int | None = None  # the first so many


FULL = Size()
QUICK = Size(hidden=64, layers=2, max_length=256, rows=80)


def stage_settings(stage: str) -> dict[str, Any]:
    """What differs between the four runs."""
    steep = {"optim.schedule": "cosine", "optim.warmup": 0.05}
    dpo = {"loss.name": "dpo", "loss.beta": 0.1, "batch.pairs_per_step": 8}
    return {
        "base": {"loss.name": "sft", "optim.lr": 1e-3, "optim.weight_decay": 0.1, **steep, "batch.pairs_per_step": 4},
        "sft": {"loss.name": "sft", "optim.lr": 2e-4, **steep, "batch.pairs_per_step": 4},
        "dpo-full": {**dpo, "optim.lr": 5e-5},
        "dpo-lora": {**dpo, "optim.lr": 1e-3, "lora.r": 8, "lora.alpha": 16},
    }[stage]


# One data set


@dataclass
class Result:
    """What one run gave. Losses and KL in nats, memory in MiB, seconds by the wall clock."""

    set: str
    stage: str
    settings: dict[str, Any]
    counts: dict[str, Any]
    n_weights: str
    loss_step_0: float
    before: dict[str, float]  # on held-out examples
    after: dict[str, float]
    accuracy_interval: tuple[float, float] | None
    seconds_per_step: tuple[float, float]  # medians: by the clock, of CPU
    n_steps: int
    seconds: float  # the process, from its start to its end
    peak_mib: float
    longer_preferred: float  # of the held-out pairs: what "the longer reply is better" would score, without any model


def run_set(name: str, data: Path, out: Path, size: Size) -> Iterator[Result]:
    """All stages on one data set. Stops with the run's own message where one fails."""
    spec = SETS[name]
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = data / spec.file if size.rows is None else first_rows(data / spec.file, size.rows, folder)
    source = read_examples(file, quarantine=folder / "quarantine.jsonl")
    train, held_out = split_by_prompt(source.examples, HELD_OUT, SEED)
    n_text = write_messages(folder / "base.jsonl", train)
    write_messages(folder / "base-eval.jsonl", held_out)
    made = [sys.executable, __file__, "--make", str(folder / "start"), "--text", str(folder / "base.jsonl")]
    subprocess.run([*made, "--hidden", str(size.hidden), "--layers", str(size.layers)], check=True)
    models = {"base": folder / "start", "sft": folder / "base", "dpo-full": folder / "sft", "dpo-lora": folder / "sft"}
    shared = {
        "seed": SEED, "batch.max_length": min(spec.max_length, size.max_length), "batch.tokens_per_microbatch": 4096,
        "eval.fraction": HELD_OUT, "cache": folder / "cache", "samples.max_tokens": 60,
    }  # fmt: skip
    rows = {"data": file, "quarantine": folder / "quarantine.jsonl"}
    text = {"data": folder / "base.jsonl", "eval.data": folder / "base-eval.jsonl"}
    for stage in STAGES:
        own = stage_settings(stage) | {"epochs": float(spec.epochs[stage.partition("-")[0]])}
        own["eval.every"] = -(-(n_text if stage == "base" else len(train)) // own["batch.pairs_per_step"])  # once an epoch
        where = {"model": models[stage], "out": folder / stage, **(text if stage == "base" else rows)}
        seconds, peak = train_apart(shared | own | where)
        yield collected(name, stage, own, Run(folder / stage), seconds=seconds, peak=peak, longer=longer_preferred(held_out))


def first_rows(file: Path, n: int, folder: Path) -> Path:
    """The first `n` rows of a compressed file, as a file of the same kind."""
    text = gzip.decompress(file.read_bytes()).decode("utf-8")
    short = folder / file.name.removesuffix(".gz")
    if short.suffix == ".jsonl":
        short.write_text("\n".join(text.split("\n")[:n]), encoding="utf-8")
    else:
        short.write_text(json.dumps(json.loads(text)[:n]), encoding="utf-8")
    return short


def write_messages(file: Path, examples: list[Example]) -> int:
    """Each reply as a dialogue of its own, better or not: the text that the base model learns from. How many there are."""
    n = 0
    with file.open("w", encoding="utf-8") as stream:
        for example in examples:
            turns = [("user", example.prompt)] if isinstance(example.prompt, str) else example.prompt
            for response in dict.fromkeys(example.responses):
                whole = [*turns, ("assistant", response)] if isinstance(response, str) else [*turns, *response]
                messages = [{"role": role, "content": content} for role, content in whole]
                stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                n += 1
    return n


def train_apart(settings: dict[str, Any]) -> tuple[float, float]:
    """`preftune.train` in a process of its own; its seconds and the largest memory that it held, in MiB."""
    file = Path(settings["out"]).with_suffix(".json")
    file.write_text(json.dumps(settings, default=str))
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--train", str(file)])
    _, status, usage = os.wait4(process.pid, 0)  # the kernel's own count for this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{file}: the run with these settings failed with exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return time.perf_counter() - started, usage.ru_maxrss * unit / 2**20


def train_here(file: Path) -> None:
    """What that process does: the settings in, the run out, and beside it the seconds of each step, by the clock and of CPU."""
    import preftune
    from preftune.training.loop import Step

    seconds: list[tuple[float, float]] = []
    last = time.process_time()

    def watch(event: Any) -> None:
        nonlocal last
        now = time.process_time()
        if isinstance(event, Step):
            seconds.append((event.seconds, now - last))
        last = now

    run = preftune.train(json.loads(file.read_text()), quiet=True, on_event=watch)
    (run.path / "seconds.json").write_text(json.dumps(seconds))


def longer_preferred(examples: list[Example]) -> float:
    """Share of pairs whose better reply has more characters; a tie counts one half."""
    pairs = [[len(str(e.responses[k])) for k in p[:2]] for e in examples for p in e.pairs if p.confidence > 0.5]
    return statistics.mean(0.5 if better == worse else float(better > worse) for better, worse in pairs)


def collected(name: str, stage: str, own: dict[str, Any], run: Run, *, seconds: float, peak: float, longer: float) -> Result:
    """The figures of a finished run. Stops where DPO does not begin at ln 2, or a figure is not finite."""
    steps, evals = run.metrics(split="train"), run.metrics(split="eval")
    counts = run.read_json(run.data_file)
    for row in (*steps, *evals):
        bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        assert not bad, f"{run.path}: step {row['step']}: not finite: {bad}"
    if stage.startswith("dpo"):
        off = abs(steps[0]["loss"] - math.log(2))
        assert off <= 1e-5, f"{run.path}: the loss at step 0 is off ln 2 by {off:.1e}"
        assert evals[0]["step"] == 0
    accuracy = evals[-1].get("rewards/accuracies")
    said = [e["message"] for e in run.events() if e["kind"] == "model"]
    return Result(
        set=name, stage=stage, settings=own, counts=counts, n_weights=said[0] if said else "",
        loss_step_0=steps[0]["loss"], before=evals[0], after=evals[-1],
        accuracy_interval=None if accuracy is None else wilson(accuracy, counts["eval_examples"]),
        seconds_per_step=seconds_of_steps(run), n_steps=len(steps), seconds=seconds, peak_mib=peak, longer_preferred=longer,
    )  # fmt: skip


def seconds_of_steps(run: Run) -> tuple[float, float]:
    """Medians over the steps: wall clock, CPU. The first step is left out, since memory is taken then."""
    wall, cpu = zip(*json.loads((run.path / "seconds.json").read_text())[1:], strict=True)
    return statistics.median(wall), statistics.median(cpu)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927); ties count one half in `share`."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


# The model to start from, in a process of its own as well: this one stays small


def make_start(folder: Path, text: Path, *, hidden: int, layers: int) -> None:
    """A byte-level BPE tokenizer of the text and a Llama with random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    lines = (json.loads(line) for line in text.read_text(encoding="utf-8").splitlines())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|turn|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for row in lines for m in row["messages"]), trainer)
    wrapped = cast(Any, PreTrainedTokenizerFast)(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    wrapped.chat_template = CHAT_TEMPLATE
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=wrapped.eos_token_id, pad_token_id=wrapped.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


# What is written and shown


def row_of(r: Result) -> list[str]:
    """One line of the table."""
    c, after = r.counts, r.after
    line = [r.set, r.stage, f"{c['rows_read']} / {c['used']} / {c['dropped']} / {c['quarantined']}"]
    line += [f"{c['prompts_truncated']} / {c['responses_truncated']}", f"{c['train_examples']} / {c['eval_examples']}"]
    line += [f"{r.loss_step_0:.6f}", f"{r.before['loss']:.4f} → {after['loss']:.4f}"]
    if r.accuracy_interval:
        low, high = r.accuracy_interval
        line += [f"{after['rewards/accuracies']:.3f} [{low:.2f}, {high:.2f}]", f"{r.longer_preferred:.3f}"]
        line += [f"{after['rewards/margins']:.3f}"]
        line += [f"{r.before['kl']:.1e} → {after['kl']:.2f}"]
    else:
        line += ["", "", "", ""]
    return [*line, str(r.n_steps), "{:.2f} / {:.2f}".format(*r.seconds_per_step), f"{r.seconds:.0f}", f"{r.peak_mib:.0f}"]


COLUMNS = [
    "set", "run", "rows read / used / dropped / quarantined", "prompts / replies cut", "train / held out", "loss at step 0",
    "held-out loss", "held-out accuracy [95 %]", "by length alone", "margin", "KL (nats a response)",
    "steps", "s/step, wall / CPU", "s in all", "peak MiB",
]  # fmt: skip


def table(results: list[Result]) -> str:
    """Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(row_of, results)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def samples_of(run: Run, n: int = 1) -> str:
    """The first `n` answers before and after."""
    rows = run.samples()
    lines = []
    for before in [row for row in rows if row["when"] == "before"][:n]:
        after = next(row for row in rows if row["when"] == "after" and row["id"] == before["id"])
        asked = before["prompt"] if isinstance(before["prompt"], str) else before["prompt"][-1]["content"]
        lines += [f"  {what:>7}: {text[:300]!r}" for what, text in
                  (("prompt", asked), ("before", before["response"]), ("after", after["response"]))]  # fmt: skip
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from importlib.metadata import version

    names = ("preftune", "torch", "transformers", "peft", "tokenizers", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in names},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": os.environ["OMP_NUM_THREADS"],
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Runs what the command line asks for, and writes results.json and table.md under --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with hh_rlhf, dpo_en_demo and alpaca_eval")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/real"), help="where runs and results go; what is there is replaced"
    )
    parser.add_argument("--set", choices=[*SETS, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="smaller models and a few steps: that it runs, not what it gives")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hidden", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train_here(given.train)
        return
    if given.make:
        make_start(given.make, given.text, hidden=given.hidden, layers=given.layers)
        return
    if given.data is None or not given.data.is_dir():
        parser.error(f"--data: {given.data} is not a folder; give the one with {', '.join(s.file for s in SETS.values())}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread by default: the figures then depend least on who else computes
    about, results = machine(), []
    size = QUICK if given.quick else FULL
    for name in SETS if given.set == "all" else [given.set]:
        for result in run_set(name, given.data, given.out, size):
            results.append(result)
            print(
                f"{result.set} {result.stage}: {result.n_weights}\n{samples_of(Run(given.out / name / result.stage))}",
                flush=True,
            )
    content = {**about, "size": asdict(size), "results": [asdict(r) for r in results]}
    (given.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (given.out / "table.md").write_text(table(results))
    print(f"\n{json.dumps(about)}\n\n{table(results)}")


if __name__ == "__main__":
    main()
