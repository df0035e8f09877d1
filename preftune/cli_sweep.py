"""The verb `sweep`. `preftune.cli` takes it in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from preftune.cli_asking import BaseUrl
from preftune.cli_data import AsJson
from preftune.errors import ConfigError, TrainingError, printable

if TYPE_CHECKING:
    from preftune.sweeping.job import Sweep


def sweep(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="A recipe, settings as key=value, and what varies: key=A,B,C or key=A..B..N (N values by equal factors); "
            "behind the recipe the judge of --by rule (FILE.py:FUNCTION) or --by reward (a model).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; default: runs/sweep-TIME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in --out; runs that are done stay.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; default: one a GPU, on a CPU one.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="What is best: held_out.accuracy, wins.0.win_rate, samples.kl_per_response, loss, …")
    ] = None,
    direction: Annotated[
        Literal["higher", "lower"] | None, typer.Option(help="Which is better; default: as is known of the metric.")
    ] = None,
    optuna: Annotated[
        int | None, typer.Option(min=1, help="Let Optuna choose this many runs within the values, and ranges key=A..B.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Reference of all evaluations; default: the run's own.")] = None,
    prompts: Annotated[int, typer.Option(min=0, help="Most held-out prompts that each run answers; 0: none, and no KL.")] = 128,
    per_prompt: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    perplexity: Annotated[list[Path] | None, typer.Option(help="Text whose perplexity is measured. May be repeated.")] = None,
    by: Annotated[Literal["llm", "reward", "rule"], typer.Option(help="Who judges the answers.")] = "llm",
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="Language model that judges.")] = None,
    base_url: BaseUrl = None,
    rubric: Annotated[
        str, typer.Option(help="helpfulness, honesty, instructions, safety, or a file of your own words.")
    ] = "helpfulness",
    best_of: Annotated[
        str | None, typer.Option("--best-of", help="Also the best of so many answers of the reference, such as 2,4,16.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the evaluation's answers, and of Optuna's draws.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines for logs, no progress lines.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate one recipe with many settings: preftune sweep recipes/dpo.yaml loss.beta=0.01,0.1,0.5."""
    from preftune.sweeping.grid import parse

    if resume and out is None:
        raise ConfigError("--resume: give the folder of the sweep to go on with, as --out PATH")
    bare = [w for w in words or [] if "=" not in w]
    if by != "llm" and not bare and not resume:
        what = "FILE.py:FUNCTION" if by == "rule" else "a reward model"
        raise ConfigError(f"--by {by}: name {what} behind the recipe")
    judge = bare.pop() if by != "llm" and bare else judge_model
    if len(bare) > 1:
        raise ConfigError(f"expected at most one recipe, got {', '.join(bare)}; settings are given as key=value")
    fixed, axes = parse([w for w in words or [] if "=" in w])
    recipe: Any = None
    if bare or fixed or axes:
        from preftune.config import Config

        recipe = Config.load(bare[0] if bare else None, fixed)
    from preftune.sweeping.evaluation import How
    from preftune.sweeping.job import sweep as run_sweep

    how = {
        "against": against, "prompts": prompts, "per_prompt": per_prompt, "max_tokens": max_tokens,
        "texts": tuple(str(file) for file in perplexity or ()), "by": by if judge is not None else None, "judge": judge,
        "base_url": base_url, "rubric": rubric, "best_of": _numbers(best_of), "seed": seed,
    }  # fmt: skip
    found = run_sweep(
        recipe, axes if recipe is not None else None, out=out, jobs=jobs, metric=metric, direction=direction, optuna=optuna,
        seed=seed, resume=resume, quiet=quiet,
        evaluation={name: value for name, value in how.items() if value != getattr(How(), name)},
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
    else:
        _print(found)
    if all(row.status == "failed" for row in found.rows):
        raise TrainingError(f"all {len(found.rows)} runs failed; the reasons stand in {found.path / 'sweep.json'}")


def _numbers(text: str | None) -> tuple[int, ...]:
    """What --best-of says. Raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"--best-of {text}: expected numbers of answers, such as 2,4,16") from None


def _print(found: Sweep) -> None:
    """The table, and what it says."""
    from rich.console import Console

    from preftune.sweeping.table import best_of_table, table

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)
    console.print(table(found))
    if found.best_of:
        console.print(best_of_table(found))
    print(printable("\n".join(["", found.verdict.sentence, *found.notes, "", f"page: {found.path / 'sweep.html'}"])))


VERBS: dict[str, Callable[..., None]] = {"sweep": sweep}
"""Verb -> function, in the order of the help."""
