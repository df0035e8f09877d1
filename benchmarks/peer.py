"""preftune and TRL in one process, turn by turn: the same start weights, rows, order and optimizer, so the same losses.

    python benchmarks/peer.py --data ../shared/data --json runs/bench.json      all cases, an hour of CPU
    python benchmarks/peer.py --data ../shared/data --quick                     a small model, under a minute
    python benchmarks/peer.py … --size 150M --max-length 1024 --vocabulary 128000 --threads 2 --precision bf16
    python benchmarks/peer.py --data ../shared/data --memory                    peak memory, each side in a process of its own
    python benchmarks/peer.py --data ../shared/data --profile                   where the time of preftune's step goes

TRL trains by its own `train()`. After each of its optimizer steps `preftune`'s job, the same generator that `preftune train`
runs, takes the same step on its own copy of the weights. Both are timed in CPU seconds of the process and by the clock, and
the ratio is taken step by step, so that whatever else the machine does meets both. With each ratio stand the largest
difference of the losses and the distance of the final weights, in units of how far they moved.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# before torch reads them
_THREADS = sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv[:-1] else "1"
os.environ |= {"OMP_NUM_THREADS": _THREADS, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

from peer_inputs import LORA_RANK, SETS, Size, job_settings, prepare  # noqa: E402
from peer_table import compared, memory_table, peak_row, plot, table  # noqa: E402
from trl_side import PEERS, learned, make_trainer, now, same_start, set_up, since, tokens_read, watch  # noqa: E402

SIZES = {"5M": (128, 4), "15M": (256, 4), "50M": (512, 8), "150M": (768, 16)}
"""Width and layers; the names are about right with 50,000 rows of embedding (5M: with 32,000)."""
CELLS = [(data, tuning, peer) for data in SETS for tuning in ("full", "lora") for peer in PEERS]
QUICK_CELLS = [("hh", "full", "default"), ("hh", "lora", "lean")]


@dataclass(frozen=True)
class Shape:
    """What is held equal over the cases of one call."""

    size: str
    vocabulary: int
    max_length: int
    threads: int
    precision: str

    @classmethod
    def of(cls, given: argparse.Namespace) -> Shape:
        """As the command line asks."""
        return cls(given.size, given.vocabulary, given.max_length, given.threads, given.precision)

    @property
    def model(self) -> Size:
        """The Llama of this shape."""
        hidden, layers = SIZES[self.size]
        return Size(hidden=hidden, layers=layers, vocabulary=self.vocabulary)


@dataclass
class Cell:
    """One case against one setting of TRL. Times are medians over the measured steps, in seconds a step."""

    data: str
    tuning: str
    peer: str
    shape: Shape
    n_steps: int  # measured
    n_weights: int
    tokens_read: dict[str, float]  # mean a step, by side; TRL's with padding, of one forward pass
    cpu: dict[str, float]
    wall: dict[str, float]
    ratio_cpu: float
    ratio_wall: float
    loss_difference: float  # largest of all steps, relative
    weight_drift: float  # ‖theirs − ours‖ / ‖update‖
    reference_cpu: dict[str, float]  # once for all steps, in seconds a step's worth of pairs
    steps: list[dict[str, list[float]]]  # CPU, clock, loss, of all steps, with the warm-up


class Ours:
    """preftune's job, driven one optimizer step at a time."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Reads, tokenizes, loads, scores the reference, and stops before the first step."""
        from preftune.config import Config
        from preftune.training.job import Finished, Started, Step, run_job
        from preftune.training.prepare import Said

        self._step_type, self._finished = Step, Finished
        self.config = Config.of(settings)
        self.steps: list[Any] = []
        self.seconds: list[tuple[float, float]] = []
        self._events = run_job(self.config)
        start = now()
        for event in self._events:
            if isinstance(event, Said) and event.kind == "path":
                start = now()
            if isinstance(event, Said) and event.kind == "reference":
                self.reference = since(start)
            if isinstance(event, Started):
                break

    def step(self) -> None:
        """One optimizer step, timed."""
        start = now()
        while not isinstance(event := next(self._events), self._step_type):
            pass
        self.seconds.append(since(start))
        self.steps.append(event)

    def finish(self) -> dict[str, Any]:
        """Lets the job write its result, and reads the weights back."""
        from safetensors.torch import load_file

        run = next(e.run for e in self._events if isinstance(e, self._finished))
        return {name: t for file in run.model.glob("*.safetensors") for name, t in load_file(file).items()}


def measure(key: tuple[str, str, str], inputs: Path, given: argparse.Namespace) -> Cell:
    """One cell of the table."""
    data, tuning, name = key
    peer, n_steps = PEERS[name], given.warmup + given.steps
    with tempfile.TemporaryDirectory(prefix="preftune-bench-") as scratch:
        shape = Shape.of(given)
        settings = settings_of(inputs, Path(scratch), tuning, shape, n_steps)
        ours = Ours(settings)
        rows = in_order(settings, ours.config)
        with set_up(peer) as reference:
            trainer = make_trainer(peer, ours.config, rows, Path(scratch))
            check_ids(trainer, rows, ours.config)
            start = same_start(trainer, ours.config)
            theirs = watch(trainer, after_step=ours.step)
            trainer.train()
        mine = ours.finish()
        logged = (row["loss"] for row in trainer.state.log_history if "loss" in row)
        losses = [(loss, step.loss) for loss, step in zip(logged, ours.steps, strict=True)]
        read = {"preftune": statistics.mean(s.n_tokens for s in ours.steps)}
        read["trl"] = statistics.mean(tokens_read(trainer, peer, ours.config.batch.pairs_per_step))
        kept = slice(given.warmup, None)
        pairs = list(zip(theirs[kept], ours.seconds[kept], strict=True))
        cell = Cell(
            data=data, tuning=tuning, peer=name, shape=shape, n_steps=given.steps, n_weights=n_weights(trainer),
            tokens_read=read,
            cpu={"trl": middle(t[0] for t, _ in pairs), "preftune": middle(o[0] for _, o in pairs)},
            wall={"trl": middle(t[1] for t, _ in pairs), "preftune": middle(o[1] for _, o in pairs)},
            ratio_cpu=middle(t[0] / o[0] for t, o in pairs), ratio_wall=middle(t[1] / o[1] for t, o in pairs),
            loss_difference=max(abs(a - b) / abs(a) for a, b in losses), weight_drift=drift(mine, learned(trainer), start),
            reference_cpu={"trl": sum(r[0] for r in reference) / n_steps, "preftune": ours.reference[0] / n_steps},
            steps=[{"trl": [*t, a], "preftune": [*o, b]} for t, o, (a, b) in zip(theirs, ours.seconds, losses, strict=True)],
        )  # fmt: skip
    del trainer, ours, start, mine
    gc.collect()
    return cell


def settings_of(inputs: Path, scratch: Path, tuning: str, shape: Shape, n_steps: int) -> dict[str, Any]:
    return job_settings(
        inputs, scratch, lora=tuning == "lora", n_steps=n_steps, max_length=shape.max_length, precision=shape.precision
    )


def middle(values: Iterator[float]) -> float:
    return statistics.median(values)


def n_weights(trainer: Any) -> int:
    return sum(p.numel() for name, p in trainer.model.named_parameters() if "lora_" not in name)


def in_order(settings: dict[str, Any], config: Any) -> list[dict[str, str]]:
    """The rows in the order in which the job's plan reads them."""
    from preftune.training.plan import Plan

    rows = [json.loads(line) for line in Path(settings["data"]).read_text(encoding="utf-8").splitlines()]
    rows = rows[: config.steps * config.batch.pairs_per_step]
    plan = Plan.of(len(rows), pairs_per_step=config.batch.pairs_per_step, epochs=1.0, steps=config.steps, seed=config.seed)
    return [rows[i] for step in range(plan.n_steps) for i in plan.examples(step)]


def check_ids(trainer: Any, rows: list[dict[str, str]], config: Any) -> None:
    """TRL reads and scores the ids that the job does. Stops where a row's are others."""
    from preftune.data.template import build_trees
    from preftune.data.types import Example, Pair
    from preftune.model.load import open_renderer

    renderer = open_renderer(config.model, max_length=config.batch.max_length)
    pair = (Pair(0, 1, 1.0, 0.0),)
    examples = [
        Example(id=str(i), prompt=r["prompt"], responses=(r["chosen"], r["rejected"]), pairs=pair) for i, r in enumerate(rows)
    ]
    for row, tree in zip(trainer.train_dataset, build_trees(examples, renderer), strict=True):
        chosen, rejected = (branch.ids.tolist() for branch in tree.branches)
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (tree.prompt.tolist(), chosen, rejected)
    report = renderer.report
    assert not (report.prompts_truncated or report.responses_truncated or report.boundary_merges)


def drift(mine: dict[str, Any], theirs: dict[str, Any], start: dict[str, Any]) -> float:
    """‖theirs − mine‖ / ‖theirs − start‖ over all weights that learn."""
    assert theirs.keys() == start.keys() and theirs.keys() <= mine.keys()
    off, moved = (
        math.sqrt(sum(float((a[n].double() - b[n].double()).square().sum()) for n in theirs))
        for a, b in ((mine, theirs), (theirs, start))
    )
    return off / moved


# Memory: each side alone


@dataclass
class Peak:
    """Memory of one side on one case, alone in a process, in MiB."""

    data: str
    tuning: str
    side: str  # a setting of TRL, or preftune with its tokens_per_microbatch
    shape: Shape
    peak: float
    start: float  # resident with weights loaded and the reference scored
    above: float  # the peak less that and less the optimizer's state: gradients and activations


OURS = {"preftune, one pair a micro-batch": 1, "preftune, as it comes": 8192}


def memory(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The peak memory of each side on each case. `lean` holds one pair at a time, as preftune's first setting does."""
    print(memory_table([]), end="")
    found = []
    for data, tuning in dict.fromkeys(c[:2] for c in given.cells):
        for side in (*given.peers, *OURS):
            job = {"data": data, "tuning": tuning, "side": side, "inputs": str(inputs_of(data, given, folder))}
            job["shape"] = asdict(shape := Shape.of(given))
            command = [sys.executable, __file__, "--alone", json.dumps(job), "--threads", str(given.threads)]
            answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            above = answer["peak"] - answer["start"] - answer["optimizer"]
            found.append(asdict(Peak(data, tuning, side, shape, answer["peak"], answer["start"], above)))
            print(peak_row(found[-1]), flush=True)
    return found


def alone(job: dict[str, Any]) -> None:
    """Three steps of one side. The peak is counted from where its weights are loaded and its reference is scored."""
    side, shape, start = job["side"], Shape(**job["shape"]), {}
    with tempfile.TemporaryDirectory(prefix="preftune-bench-") as scratch:
        settings = settings_of(Path(job["inputs"]), Path(scratch), job["tuning"], shape, 3)
        if side in OURS:
            ours = Ours(settings | {"batch.tokens_per_microbatch": OURS[side]})
            start = reset_peak()
            for _ in range(3):
                ours.step()
            peak, learns = resident("VmHWM"), sum(t.numel() for n, t in ours.finish().items())
        else:
            from preftune.config import Config

            peer, config = PEERS[side], Config.of(settings).resolved()
            with set_up(peer):
                trainer = make_trainer(peer, config, in_order(settings, config), Path(scratch))
                watch(trainer, after_step=lambda: None, at_start=lambda: start.update(reset_peak()))
                trainer.train()
            peak = resident("VmHWM")
            learns = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(json.dumps({"peak": peak, "start": start["start"], "optimizer": learns * 8 / 2**20}))


def reset_peak() -> dict[str, float]:
    """Makes the kernel count the peak anew; what is resident now, in MiB. Linux only."""
    import ctypes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what start-up has freed counts for neither side
    Path("/proc/self/clear_refs").write_text("5")
    return {"start": resident("VmRSS")}


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


# The whole


def inputs_of(data: str, given: argparse.Namespace, folder: Path) -> Path:
    """Model, tokenizer and rows of one data set, made once."""
    shape = Shape.of(given)
    where = folder / data
    if not where.exists():
        n_rows = 4 * max(given.warmup + given.steps, 3)
        print(
            prepare(data, given.data, where, shape.model, n_rows=n_rows, max_length=shape.max_length),
            file=sys.stderr,
            flush=True,
        )
    return where


def about(given: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on."""
    from importlib.metadata import version

    here = Path(__file__).resolve().parents[1]
    git = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
    )
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    names = ("preftune", "torch", "transformers", "trl", "peft", "accelerate", "tokenizers")
    return {
        "date": datetime.date.today().isoformat(),
        "commands": ["python benchmarks/peer.py " + " ".join(sys.argv[1:])],
        "commits": [git.stdout.strip()],
        "versions": {"python": platform.python_version()} | {n: version(n) for n in names},
        "machine": f"{cpu[0] if cpu else platform.machine()}, {os.cpu_count()} CPUs",
        "load_average": os.getloadavg()[0],
        "lora_rank": LORA_RANK,
        "quick": given.quick,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PREFTUNE_DATA", "../shared/data")))
    parser.add_argument("--case", action="append", default=[], help="data:tuning:peer, parts may be *; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, not counted")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--size", choices=SIZES, default="50M", help="weights of the model, about")
    parser.add_argument("--vocabulary", type=int, default=50_000, help="rows of the embedding")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: matrix products by autocast")
    parser.add_argument("--quick", action="store_true", help="5 million weights, 3 steps, 2 cases")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--profile", action="store_true", help="shares of preftune's step instead of a comparison")
    parser.add_argument("--json", type=Path, help="write the results here; cells of other cases that it has are kept")
    parser.add_argument("--compare", type=Path, help="a former --json: says which case has become slower by more than 10 %%")
    parser.add_argument("--plot", type=Path, help="draw the table into this .svg or .png")
    parser.add_argument("--table", type=Path, help="measure nothing: print (and --plot, --compare) this former --json")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.warmup, given.steps, given.size, given.vocabulary = 1, 2, "5M", 32_000
    cells = QUICK_CELLS if given.quick and not given.case else CELLS
    wanted = [case.split(":") for case in given.case or ["*:*:*"]]
    given.cells = [c for c in cells if any(all(w in ("*", part) for w, part in zip(ws, c, strict=True)) for ws in wanted)]
    if not given.cells:
        parser.error(f"--case: {given.case} are none of {', '.join(':'.join(c) for c in CELLS)}")
    given.sets = list(dict.fromkeys(c[0] for c in given.cells))
    given.peers = list(dict.fromkeys(c[2] for c in given.cells))
    if not (given.alone or given.table) and not given.data.is_dir():
        parser.error(f"--data: {given.data} is not a folder; give the one with {', '.join(s.file for s in SETS.values())}")
    return given


def run_cells(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures the cells one after the other, and writes what is there after each."""
    cells: list[dict[str, Any]] = []
    peaks: list[dict[str, Any]] = []
    content = {"about": about(given), "cells": cells, "memory": peaks}
    shape = asdict(Shape.of(given))
    if given.json and given.json.exists():
        former = json.loads(given.json.read_text())
        for said in ("commands", "commits"):
            content["about"][said] = list(dict.fromkeys([*former["about"][said], *content["about"][said]]))
        again = [key[:2] if given.memory else key for key in given.cells]
        cells += [
            c
            for c in former["cells"]
            if given.memory or c["shape"] != shape or (c["data"], c["tuning"], c["peer"]) not in again
        ]
        peaks += [
            m for m in former["memory"] if not given.memory or m["shape"] != shape or (m["data"], m["tuning"]) not in again
        ]
    if given.memory:
        peaks += memory(given, folder)
        write(content, given.json)
        return content
    for key in given.cells:
        cell = asdict(measure(key, inputs_of(key[0], given, folder), given))
        cells.append(cell)
        print(table([cell], head=len(cells) == 1), end="", flush=True)
        write(content, given.json)
    return content


def write(content: dict[str, Any], file: Path | None) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Runs what the command line asks for; 1 where a case has become slower than in the former table."""
    given = arguments()
    import warnings

    import torch

    warnings.filterwarnings("ignore")  # those of the peer are not ours to mend
    torch.set_num_threads(given.threads)
    if given.alone:
        alone(json.loads(given.alone))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="preftune-bench-inputs-"))
    try:
        if given.profile:
            from peer_profile import profile

            for data, tuning in dict.fromkeys(c[:2] for c in given.cells):
                where = folder / f"{data}-{tuning}"
                where.mkdir()
                settings = settings_of(inputs_of(data, given, folder), where, tuning, Shape.of(given), 3)
                print(f"{data} {tuning}\n{profile(Ours(settings))}")
            return 0
        content = json.loads(given.table.read_text()) if given.table else run_cells(given, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{json.dumps(content['about'])}\n\n{table(content['cells'])}\n{memory_table(content['memory'])}")
    if given.plot:
        plot(content, given.plot)
    slower = compared(content["cells"], json.loads(given.compare.read_text())["cells"]) if given.compare else []
    print("".join(f"slower: {line}\n" for line in slower) or ("no case is slower by more than 10 %\n" if given.compare else ""))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
