"""The verbs that say whether it worked: eval, diagnose. `preftune.cli` takes them in."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from preftune.cli_asking import (
    BaseUrl,
    Cache,
    Concurrency,
    Device,
    Fields,
    Format,
    MaxCost,
    PriceIn,
    PriceOut,
    Progress,
    Retries,
    Timeout,
    check_prices,
    fields_of,
)
from preftune.cli_data import AsJson, print_found, say
from preftune.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    pass


def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub id.")],
    scorer: Annotated[
        str | None, typer.Argument(help="With --by reward the model, with --by rule FILE.py:FUNCTION.", show_default=False)
    ] = None,
    against: Annotated[str | None, typer.Option(help="Model to compare with; default: the run's own reference.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Held-out pairs; default: those that the run held out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the evaluation; default: the run's.")] = None,
    beta: Annotated[float | None, typer.Option(help="β of implicit rewards; default: the run's own, else 0.1.")] = None,
    prompts: Annotated[int, typer.Option("--n-prompts", min=0, help="Most held-out prompts that are answered; 0: none.")] = 128,
    per_prompt: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    perplexity: Annotated[
        list[Path] | None, typer.Option(help="Text, a document a line, or JSONL with `text`. May be repeated.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Of the perplexity, in tokens; default: 1024 or the context.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens that a further window adds; default: half a window.")] = None,
    by: Annotated[Literal["llm", "reward", "rule"], typer.Option(help="Who judges the answers.")] = "llm",
    base_url: BaseUrl = None,
    judge_model: Annotated[
        list[str] | None, typer.Option("--judge-model", help="Language model that judges. May be repeated.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="The judge's template: AlpacaEval's, LLMBar's, judge_prompts.jsonl.")
    ] = None,
    template_name: Annotated[str | None, typer.Option(help="Which one of judge_prompts.jsonl, such as pair-v2.")] = None,
    rubric: Annotated[
        str, typer.Option(help="helpfulness, honesty, instructions, safety, or a file of your own words.")
    ] = "helpfulness",
    answers: Annotated[
        str | None,
        typer.Option("--answers", help="Stored answers to judge against, found by their prompt; default: the reference's."),
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-evaluation-harness, separated by commas.")
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option("--lm-eval-path", help="Folder of its YAML files of tasks of your own.")
    ] = None,
    lm_eval_limit: Annotated[int | None, typer.Option("--lm-eval-limit", min=1, help="Most documents of a task.")] = None,
    format: Format = "auto",
    field: Fields = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="Chat template: chatml, plain or a Jinja file.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or pure_bf16.")] = "auto",
    device: Device = "auto",
    tokens_per_batch: Annotated[
        int, typer.Option(min=1, help="Most tokens read in one pass; never changes the result.")
    ] = 8192,
    concurrency: Concurrency = 8,
    retries: Retries = 6,
    timeout: Timeout = 120.0,
    cache: Cache = None,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    max_cost: MaxCost = None,
    seed: Annotated[int, typer.Option(help="Same seed, same answers, same pairs, same intervals.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Whether it worked: held-out pairs, KL, own answers, perplexity, win rate. Ctrl-C keeps what is finished."""
    _check(locals())
    from preftune.asking.records import Ledger
    from preftune.evaluate.job import Settings
    from preftune.evaluate.job import evaluate as measure
    from preftune.evaluate.judge import Who
    from preftune.evaluate.models import Models
    from preftune.training.dist import leave
    from preftune.training.interrupt import term_interrupts

    main = os.environ.get("RANK", "0") == "0"
    settings = Settings(
        data=data, format=format, fields=tuple(fields_of(field).items()), out=out, prompts=prompts, per_prompt=per_prompt,
        max_tokens=max_tokens, seed=seed, texts=tuple(perplexity or ()), window=window, stride=stride, answers=answers,
        tasks=tuple(t.strip() for t in (lm_eval or "").split(",") if t.strip()), tasks_folder=lm_eval_path,
        task_limit=lm_eval_limit,
    )  # fmt: skip
    who = Who(
        by, (scorer,) if scorer else tuple(judge_model or ()), base_url=base_url, concurrency=concurrency, retries=retries,
        timeout=timeout, template=template, template_name=template_name, rubric=rubric, replies=cache, max_cost=max_cost,
        device=device, seed=seed,
    )  # fmt: skip
    ledger = Ledger(price_in=price_in, price_out=price_out)
    try:
        with term_interrupts(), Progress() as progress:
            shown = progress if main else lambda name, done, total: None
            models = Models.open(
                model, against=against, beta=beta, template=chat_template, precision=precision, device=device,
                budget=tokens_per_batch, note=say,
            )  # fmt: skip
            judge = who.judge(ledger, on_progress=shown) if who.names else None
            found = measure(models, settings, judge=judge, on_progress=shown)
    except KeyboardInterrupt:
        again = shlex.join(["preftune", *sys.argv[1:]])
        raise Interrupted(f"interrupted; finished parts are kept. The same command goes on: {again}") from None
    finally:
        leave()
    if not main:
        return
    from preftune.diagnose.symptoms import diagnose as look
    from preftune.report.page import write_report
    from preftune.run import Run

    for line in ledger.lines() if who.names and by == "llm" else ():
        say(f"judging: {line}")
    folders = Run.all_in(out or model)
    for run in (f for f in folders if f.config_file.exists()):
        say(f"diagnosis: {look(run).summary} (preftune diagnose {run.path})")
    say(f"report: {write_report(folders)}")  # and the model's card, with these figures
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    from rich.console import Console

    from preftune.evaluate.table import show

    show(found, Console(highlight=False))


def _check(given: dict[str, Any]) -> None:
    """Options that contradict each other. Raises ConfigError."""
    _check_judge(given)
    for name in ("window", "stride"):
        if given[name] is not None and not given["perplexity"]:
            raise ConfigError(f"--{name}: is of --perplexity FILE, which is not asked for")
    for name in ("lm_eval_path", "lm_eval_limit"):
        if given[name] is not None and not given["lm_eval"]:
            raise ConfigError(f"--{name.replace('_', '-')}: is of --lm-eval TASKS, which is not asked for")
    check_prices(given["max_cost"], given["price_in"], given["price_out"])


_OF_A_LANGUAGE_MODEL = ("judge_model", "base_url", "template", "template_name", "max_cost")


def _check_judge(given: dict[str, Any]) -> None:
    """Options that say who judges and do not go together. Raises ConfigError."""
    by, scorer, own_words = given["by"], given["scorer"], given["rubric"] != "helpfulness"
    if by == "llm" and scorer:
        raise ConfigError(
            f"{scorer}: this word belongs to --by reward or --by rule; a model that judges is named by --judge-model"
        )
    if by != "llm" and not scorer:
        raise ConfigError(f"--by {by}: name {'a reward model' if by == 'reward' else 'FILE.py:FUNCTION'} behind the model")
    asked = [name for name in _OF_A_LANGUAGE_MODEL if given[name] is not None] + ["rubric"] * own_words
    if by != "llm" and asked:
        raise ConfigError(f"--{asked[0].replace('_', '-')}: only a language model is asked; --by {by} needs none")
    if by == "llm" and not given["judge_model"] and (asked or given["answers"]):
        raise ConfigError("--judge-model, or --by reward|rule: somebody has to judge the answers")
    if given["template"] is None and given["template_name"]:
        raise ConfigError("--template-name: says how a --template is read; give that too")
    if given["template"] and own_words:
        raise ConfigError("--rubric: is for our own templates; a --template says itself what it asks for")


def diagnose(
    run: Annotated[Path, typer.Argument(help="Run folder, also of a run that goes on.")],
    only: Annotated[list[str] | None, typer.Option("--only", help="This finding alone; may be given again.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also what is in order, and what was not looked at.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 where there is an error.")] = False,
) -> None:
    """Say whether a run worked, why not, and what to do: findings from its own files, worst first."""
    from rich.console import Console

    from preftune.diagnose.symptoms import diagnose as look
    from preftune.report.page import write_report
    from preftune.run import Run

    folder = Run.open(run)
    found = look(folder, only=only or ())
    if not only:
        write_report([folder])
    if as_json:
        print_found(found.as_dict(), "", as_json)
    else:
        found.show(Console(highlight=False), everything=everything)
    if strict and found.n_errors:
        raise typer.Exit(1)


VERBS: dict[str, Callable[..., None]] = {"eval": evaluate, "diagnose": diagnose}
"""Verb -> function, in the order of the help."""
