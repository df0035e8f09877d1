"""Training steps on a GPU by preftune and by a padded peer, with random weights and made-up token trees: one command, no data.

    python benchmarks/gpu.py --json runs/gpu.json                     all cases; goes on where it stopped
    python benchmarks/gpu.py --json runs/gpu.json --quick             every case with the chosen attention alone, minutes
    python benchmarks/gpu.py --json runs/gpu.json --case '8B:hh:*'    some cases
    python benchmarks/gpu.py --tiny --device cpu                      that it runs: seconds, without a GPU

A case is a model shape, a distribution of lengths and what learns (all weights, or LoRA). Each side of it takes the same
optimizer steps on the same trees from the same weights, so that the losses can be laid beside each other: preftune with every
attention that is installed, and the peer, which computes what TRL's DPO step computes (`gpu_sides` says how and how not).
Matrix products are in bf16, weights that learn in float32. The reference log-probs are computed before the steps on all sides.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import gc
import json
import platform
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_inputs import LENGTHS, MODELS, TINY, TINY_LENGTHS, describe_lengths, make_model, make_trees, with_adapters
from gpu_sides import Case, Run, measure_side, sides

from preftune.engine.policy import Policy

TUNINGS = {"0.5B": ("full", "lora"), "1.5B": ("full", "lora"), "7B": ("lora",), "8B": ("lora",), "tiny": ("full", "lora")}
QUICK = ["0.5B:*:full", "1.5B:*:full", "1.5B:*:lora", "8B:*:lora"]


def main() -> None:
    given = arguments()
    device = torch.device(given.device)
    models, lengths = ({"tiny": TINY}, TINY_LENGTHS) if given.tiny else (MODELS, LENGTHS)
    cases = [Case(m, d, t) for m in models for d in lengths for t in TUNINGS[m]]
    patterns = given.case or (QUICK if given.quick and not given.tiny else ["*"])
    cases = [c for c in cases if any(fnmatch.fnmatchcase(c.name, p) for p in patterns)]
    if not cases:
        sys.exit(f"--case: nothing is called {' or '.join(patterns)}; a case is MODEL:LENGTHS:TUNING such as 8B:hh:lora")
    results = read(given.json)
    about = {**machine(device), "arguments": " ".join(sys.argv[1:]), "lengths": describe_lengths(lengths)}
    if "peak" not in results or results["about"]["device"] != about["device"]:
        results = {"peak": peak(device, 512 if given.tiny else 8192), "cases": {}}
    results["about"] = about
    print(
        f"{about['device']}, torch {about['torch']}: {results['peak'] / 1e12:.1f} TFLOP/s in a bf16 matrix product", flush=True
    )
    started = time.perf_counter()
    for case in cases:
        if not given.again and not results["cases"].get(case.name, {"error": "not measured"}).get("error"):
            print(f"{case.name}: measured before", flush=True)
        elif time.perf_counter() - started > given.seconds:
            print(f"{case.name}: not begun, {given.seconds:g} s are over; the same command goes on", flush=True)
        else:
            results["cases"][case.name] = measured(case, given, device, results["peak"], lengths[case.lengths])
            write(given.json, results)
    print(table(results["cases"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="file of the results; cases that it has are not measured again")
    parser.add_argument("--case", action="append", help="MODEL:LENGTHS:TUNING, with * and ?; may be given several times")
    parser.add_argument("--quick", action="store_true", help="fewer cases, only the attention that is chosen, three steps")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights: that everything runs")
    parser.add_argument("--again", action="store_true", help="measure cases that the file has, too")
    parser.add_argument("--steps", type=int, help="measured steps (5; with --quick 3)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--pairs", type=int, default=32, help="pairs in a step")
    parser.add_argument("--tokens", type=int, default=8192, help="most tokens in a micro-batch, padding counted")
    parser.add_argument("--compile", action="store_true", help="also with compiled layers")
    parser.add_argument("--seconds", type=float, default=480, help="begin no case after this long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    given.steps = given.steps or (3 if given.quick or given.tiny else 5)
    if given.tiny:
        given.pairs, given.tokens = 6, 128
    elif given.device == "cpu":
        parser.error("there is no GPU here; --tiny --device cpu shows that it runs")
    return given


def measured(case: Case, given: argparse.Namespace, device: torch.device, top: float, lengths: Any) -> dict[str, Any]:
    """All sides of one case, one after another on the same weights."""
    print(f"\n{case.name}", flush=True)
    start = time.perf_counter()
    shape = TINY if given.tiny else MODELS[case.model]
    run = Run(given.pairs, given.tokens, given.steps, given.warmup, top, 64 if given.tiny else 1024)
    trees = make_trees(lengths, run.n_trees, vocabulary=shape.vocabulary, longest=run.longest)
    found: dict[str, Any] = {"sides": {}}
    try:
        model = make_model(shape, device, longest=run.longest)
        path = Policy.choose(model, trees, autocast=torch.bfloat16).path
        if case.tuning == "lora":
            model = with_adapters(model)
        found["weights"], found["chosen"] = sum(p.numel() for p in model.parameters()), path.why
        print(f"  {path.why}\n  ready after {time.perf_counter() - start:.0f} s", flush=True)
        for side in sides(path, device, quick=given.quick, compiled=given.compile):
            found["sides"][side.name] = asdict(measure_side(side, model, trees, run))
            print("  " + line(side.name, found["sides"][side.name]), flush=True)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc(limit=-4)
    found["largest_loss_difference"] = difference(found["sides"])
    found["seconds"] = time.perf_counter() - start
    model = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def difference(found: dict[str, Any]) -> float | None:
    """Largest relative difference of a step's loss between any two sides."""
    losses = [side["losses"] for side in found.values() if side["losses"]]
    return max((max(step) - min(step)) / min(step) for step in zip(*losses, strict=True)) if len(losses) > 1 else None


def line(name: str, side: dict[str, Any]) -> str:
    if side["error"]:
        return f"{name:<28} {side['error']}"
    return (
        f"{name:<28} {side['seconds']:8.3f} s/step  {side['pairs_per_second']:8.1f} pairs/s  "
        f"{side['tokens_per_second']:9.0f} tokens/s  {side['peak_gib']:6.1f} GiB  MFU {side['mfu']:5.1%}  "
        f"losses {side['losses'][0]:.5f} … {side['losses'][-1]:.5f}  (micro-batch {side['microbatch']})"
    )


def table(cases: dict[str, Any]) -> str:
    names = ["case", "fastest of preftune", "s/step", "pairs/s", "peak GiB", "MFU", "fastest peer", "s/step", "ratio",
             "losses differ by"]  # fmt: skip
    rows = ["", f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for name, case in sorted(cases.items()):
        done = {n: s for n, s in case["sides"].items() if not s["error"]}
        ours, theirs = ([(s["seconds"], n) for n, s in done.items() if n.startswith(kind)] for kind in ("preftune", "peer"))
        if not ours or not theirs:
            rows.append(f"| {name} | {case.get('error') or 'not every side ran'} |" + " |" * 8)
            continue
        (mine, own), (other, peer) = min(ours), min(theirs)
        side = done[own]
        rows.append(
            f"| {name} | {own} | {mine:.3f} | {side['pairs_per_second']:.1f} | {side['peak_gib']:.1f} | {side['mfu']:.1%} "
            f"| {peer} | {other:.3f} | **{other / mine:.2f}** | {case['largest_loss_difference']:.0e} |"
        )
    return "\n".join(rows)


def peak(device: torch.device, n: int) -> float:
    """Operations a second of an n × n bf16 matrix product on random numbers: the median of ten after three."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / sorted(seconds[3:])[5]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None
    return {
        "device": name, "memory_gib": memory, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def read(file: Path | None) -> dict[str, Any]:
    return json.loads(file.read_text()) if file and file.exists() else {}


def write(file: Path | None, results: dict[str, Any]) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(file)


if __name__ == "__main__":
    main()
