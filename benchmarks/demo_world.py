"""The demo's world for comparisons: its reference is made once, then many trainings from it are measured by the true reward.

    >>> made = make_world(Path("runs/objectives/seed-0"), QUICK, seed=0)
    >>> row = measured_once(made, "dpo", {"loss.name": "dpo"}, pairs)
    >>> row["win_rate"]
    [0.93, 0.91, 0.95]

All stages are the demo's own (`preftune.demo.story`). What is finished stays, and is not done again.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from preftune.config import Config
from preftune.data.read import read_examples
from preftune.data.types import Example
from preftune.data.write import write_examples
from preftune.demo.story import (
    Measured,
    Size,
    collect,
    dpo_settings,
    kl_from,
    make_base,
    measure,
    sft_settings,
    write_dialogues,
)
from preftune.demo.world import World
from preftune.errors import ConfigError, TrainingError
from preftune.evaluate.estimate import Estimate, mean, win_rate
from preftune.evaluate.samples import looks
from preftune.files import make_folder, write_atomic
from preftune.model.load import quiet_transformers
from preftune.run import Run
from preftune.training.job import run_job

TINY = Size(demonstrations=200, sft_epochs=1, prompts=24, replies=3, dpo_epochs=1, eval_prompts=8, max_tokens=24)
"""Sizes for seeing that a script runs; the model has learnt nothing then."""

Row = dict[str, Any]


class Made(NamedTuple):
    """A world with its reference, what the reference answered, and how good that is."""

    folder: Path
    size: Size
    seed: int
    sft: Run
    collected: list[Example]  # train prompts with the reference's replies, not judged yet
    unseen: list[Example]  # prompts about items that no preference speaks of
    before: Measured  # the reference's replies to them


def make_world(folder: Path, size: Size, *, seed: int) -> Made:
    """Base model, SFT and samples in `folder`, taken from there where they are. Raises ConfigError for other sizes there."""
    torch.set_num_threads(1)
    quiet_transformers()
    make_folder(folder)
    about = {"size": asdict(size), "seed": seed}
    known = folder / "world.json"
    if known.exists() and json.loads(known.read_text()) != about:
        raise ConfigError(f"--out: {folder} holds a world of another size; choose another folder")
    write_atomic(known, json.dumps(about))
    world, dialogues, replies = World(seed), folder / "demonstrations.jsonl", folder / "collected.jsonl"
    if not (folder / "sft" / "model").exists():
        dialogues.unlink(missing_ok=True)
        write_dialogues(dialogues, world.demonstrations(size.demonstrations))
        _run(sft_settings(make_base(world, folder / "base", seed=seed), folder, size, seed), "SFT")
    sft = Run.open(folder / "sft")
    if not replies.exists():
        write_examples(replies, collect(sft, world, size, seed))
    unseen = world.prompts(size.eval_prompts, split="eval")
    collected = list(read_examples(str(replies)).examples)
    return Made(folder, size, seed, sft, collected, unseen, measure(sft, unseen, size, seed + 1))


def train(made: Made, name: str, settings: Mapping[str, Any], data: Path) -> Row:
    """The demo's DPO stage with another loss and other settings. What the curve says; "stopped" where training gave up."""
    out = made.folder / "runs" / name
    usual = dpo_settings(made.sft, data, made.folder, made.size, made.seed)
    changed = {k: v for k, v in usual.items() if not k.startswith("loss.")} | dict(settings)
    started = time.process_time()
    try:
        _run(changed | {"out": str(out), "eval.every": 0, "samples.n": 0}, name)
    except TrainingError as error:
        return {"settings": dict(settings), "stopped": str(error)}
    rows = Run.open(out).metrics(split="train")
    tail = rows[-max(1, len(rows) // 10) :]
    finite = all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    return {
        "settings": dict(settings),
        "steps": len(rows),
        "seconds": time.process_time() - started,
        "finite": finite,
        "loss_first": rows[0]["loss"],
        "loss_last": sum(r["loss"] for r in tail) / len(tail),
        "loss_highest": max(r["loss"] for r in rows),
    }


def of_policy(made: Made, run: Run) -> Row:
    """What true reward, reference and replies say of a trained model; an estimate is [value, low, high]."""
    after = measure(run, made.unseen, made.size, made.seed + 1)
    kl = kl_from(made.sft, run, after)
    return {
        "win_rate": _triple(win_rate(after.rewards(), made.before.rewards())),
        "kl": _triple(kl.per_response),
        "kl_per_token": _triple(kl.per_token),
        **of_replies(after),
    }


def of_replies(measured: Measured) -> Row:
    """True reward, length and kind of a model's replies."""
    seen = looks(measured.answers)
    return {
        "reward": _triple(mean(measured.rewards())),
        "tokens": _triple(seen.tokens),
        "ended": _triple(seen.ended),
        "malformed": _triple(measured.share("malformed")),
    }


def _triple(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


Measure = Callable[[Made, Run], Row]
"""What is measured of a run when it is over."""


def measured_once(made: Made, name: str, settings: Mapping[str, Any], data: Path, *, by: Measure = of_policy) -> Row:
    """Trains as the demo does but for `settings` and `data`, and measures (by `of_policy`, or another way).

    What was measured before is read from its file, results/NAME.json.
    """
    file = made.folder / "results" / f"{name}.json"
    make_folder(file.parent)
    if file.exists():
        row: Row = json.loads(file.read_text())
        return row
    row = {"name": name, "seed": made.seed, "data": data.stem, **train(made, name, settings, data)}
    if "stopped" not in row:
        row |= by(made, Run.open(made.folder / "runs" / name))
    write_atomic(file, json.dumps(row, indent=1))
    return row


def _run(settings: Mapping[str, Any], name: str) -> None:
    """A run to its end, with one line about it."""
    started = time.perf_counter()
    for _ in run_job(Config.of(settings), resume=True):
        pass
    print(f"   {name}: trained in {time.perf_counter() - started:.0f} s", flush=True)


def table(rows: list[Row], columns: Mapping[str, str]) -> str:
    """Markdown. columns: heading -> key of a row; a value with an interval is shown as value ± half its width."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(_cell(row.get(key)) for key in columns.values()) + " |" for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        digits = 3 if abs(value[0]) < 1 else 2 if abs(value[0]) < 10 else 1
        return f"{value[0]:.{digits}f} ± {(value[2] - value[1]) / 2:.{digits}f}"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def dress(axes: Any, ink: str, faint: str, *, grid: str) -> None:
    """Axes in the page's inks, with no ground of their own."""
    axes.tick_params(colors=ink, length=3)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    axes.grid(axis=grid, color=faint, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(faint)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)


def save_figure(figure: Any, file: Path, label: str) -> None:
    """An SVG that stands by itself, drawn with the inks above, and follows the reader's light or dark."""
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = _inline(out.getvalue(), label).replace("<svg ", f"<svg {spaces} ", 1)
    file.write_text(svg.replace(">", f">\n<style>{_COLOURS}</style>", 1) + "\n", encoding="utf-8")


# Colours that no figure of matplotlib's uses, replaced in the SVG by variables, so that a picture follows its reader's light.
INK, FAINT, FIRST, SECOND = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", FIRST: "var(--series-1)", SECOND: "var(--series-2)"}
_COLOURS = (
    "svg { --ink: #1c2430; --faint: #b9c1cb; --series-1: #0b62b8; --series-2: #c2500a; font-family: sans-serif; }"
    " @media (prefers-color-scheme: dark)"
    " { svg { --ink: #e6eaef; --faint: #56616e; --series-1: #6cb2f5; --series-2: #f2a05e; } }"
)


def _inline(svg: str, label: str) -> str:
    """The <svg> element alone, in the page's colours and font, without metadata, its own style sheet or a fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1, flags=re.DOTALL
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every picture, and used by nothing
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.strip()
