"""The verbs that ask models: sample, judge, generate-pairs. `preftune.cli` takes them in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from preftune.cli_asking import (
    BaseUrl,
    Cache,
    ChatTemplate,
    Concurrency,
    Device,
    Fields,
    Format,
    MaxCost,
    MaxUnscored,
    PriceIn,
    PriceOut,
    Progress,
    Quarantine,
    Retries,
    Timeout,
    cache_file,
    check_prices,
    check_unscored,
    fields_of,
)
from preftune.cli_data import AsJson, Seed, print_found, say
from preftune.errors import ConfigError, ServerError, printable

if TYPE_CHECKING:
    from preftune.data.types import Example
    from preftune.label.job import Summary
    from preftune.sampling.responses import Plan


def judge(
    data: Annotated[str, typer.Option("--data", help="Responses to judge: pairs, rankings, AlpacaEval, … in any format.")],
    out: Annotated[Path, typer.Option(help="judgments.jsonl; what is in it already is not judged again.")],
    scorer: Annotated[
        str | None, typer.Argument(help="With --by reward the model, with --by rule FILE.py:FUNCTION.", show_default=False)
    ] = None,
    by: Annotated[Literal["llm", "reward", "rule"], typer.Option(help="Who judges.")] = "llm",
    base_url: BaseUrl = None,
    judge_model: Annotated[
        list[str] | None, typer.Option("--judge-model", help="Model that judges; repeat it and they vote.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="Template of your own: AlpacaEval's, LLMBar's, judge_prompts.jsonl.")
    ] = None,
    template_name: Annotated[str | None, typer.Option(help="Which one of judge_prompts.jsonl, such as pair-v2.")] = None,
    labels: Annotated[str | None, typer.Option(help="What verdicts look like in your template: FIRST,SECOND[,TIE].")] = None,
    rubric: Annotated[
        str, typer.Option(help="helpfulness, honesty, instructions, safety, or a file of your own words.")
    ] = "helpfulness",
    reply: Annotated[
        Literal["auto", "letter", "json"],
        typer.Option(help="letter: log-probs count; json: reasons, then a verdict; auto: the first that the judge can give."),
    ] = "auto",
    score: Annotated[bool, typer.Option("--score", help="Rate each response from 1 to 10 instead of comparing two.")] = False,
    scores: Annotated[Path | None, typer.Option(help="Also write the score of each response here, JSONL.")] = None,
    order: Annotated[Literal["both", "seeded"], typer.Option(help="Both orders, or one by a seeded coin.")] = "both",
    choice: Annotated[
        Literal["all", "best_worst"], typer.Option(help="Of scored responses: all pairs, or best against worst.")
    ] = "all",
    temperature: Annotated[float, typer.Option(help="0: the likeliest reply.", min=0)] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Longest reply; default: what the template needs.", min=1)] = None,
    concurrency: Concurrency = 8,
    retries: Retries = 6,
    timeout: Timeout = 120.0,
    cache: Cache = None,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    max_cost: MaxCost = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count and estimate; ask nothing.")] = False,
    max_unscored: MaxUnscored = 0.05,
    format: Format = "auto",
    field: Fields = None,
    quarantine: Quarantine = None,
    chat_template: ChatTemplate = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Judge responses: by a language model (key from OPENAI_API_KEY), a reward model, or a rule."""
    from preftune.asking.askers import Askers
    from preftune.asking.records import Ledger
    from preftune.asking.replies import Replies
    from preftune.data.write import judged_file, write_examples
    from preftune.label.job import Job, estimate
    from preftune.label.opened import judges_of, scored_by

    _check(locals())
    examples = _examples(data, format, field, quarantine)
    ledger = Ledger(price_in=price_in, price_out=price_out)
    with Replies(cache_file(cache)) as replies, Progress() as progress:
        job = Job(
            examples, out, replies, ledger, order=order, seed=seed, pairs=choice, max_cost=max_cost, scores_out=scores,
            on_progress=progress,
        )  # fmt: skip
        if by != "llm":
            summary = job.by_scores(
                scored_by(by, str(scorer), examples, template=chat_template, device=device, on_progress=progress)
            )
        else:
            with Askers(
                base_url, concurrency=concurrency, retries=retries, timeout=timeout, template=chat_template, device=device
            ) as askers:
                judges = judges_of(
                    judge_model or [], askers, replies, ledger, kind="score" if score else "pair", template=template,
                    template_name=template_name, labels=labels, rubric=rubric, reply=reply, temperature=temperature,
                    max_tokens=max_tokens, max_cost=max_cost, asks=not dry_run,
                )  # fmt: skip
                if dry_run:
                    guess = estimate(examples, judges, replies, ledger, order=order, seed=seed)
                    print_found(guess.as_dict(), guess.as_text(), as_json)
                    return
                summary = job.by_models(judges)
    write_examples(judged_file(out), examples)
    print_found(summary.as_dict(), summary.as_text(), as_json)
    _end(summary, out, max_unscored)


def _check(given: dict[str, Any]) -> None:
    """Options that contradict each other. Raises ConfigError."""
    by = given["by"]
    if by == "llm" and not given["judge_model"]:
        raise ConfigError("--judge-model: name the model that judges (with --base-url a server's, without it a local one)")
    if by == "llm" and given["scorer"]:
        raise ConfigError(
            f"{given['scorer']}: this word belongs to --by reward or --by rule; a model is named by --judge-model"
        )
    if by != "llm":
        what = "a reward model" if by == "reward" else "FILE.py:FUNCTION"
        if not given["scorer"]:
            raise ConfigError(f"--by {by}: name {what} behind it")
        for name in ("base_url", "judge_model", "template", "labels", "dry_run", "max_cost", "score"):
            if given[name]:
                raise ConfigError(f"--{name.replace('_', '-')}: only a language model is asked; --by {by} needs none")
    if given["template"] is None and (given["labels"] or given["template_name"]):
        raise ConfigError("--labels and --template-name: say how a --template is read; give that too")
    if given["scores"] and by == "llm" and not given["score"] and given["template"] is None:
        raise ConfigError("--scores: comparing two gives no scores; add --score")
    if given["template"] and (given["reply"] != "auto" or given["rubric"] != "helpfulness" or given["score"]):
        raise ConfigError("--reply, --rubric and --score: are for our own templates; a --template says itself what it asks for")
    check_prices(given["max_cost"], given["price_in"], given["price_out"])


def _end(summary: Summary, out: Path, max_unscored: float) -> None:
    """The exit code of a run that left too much open."""
    if summary.n_not_asked:
        raise ServerError(f"{summary.n_not_asked} questions were not asked because of --max-cost; the same command goes on")
    check_unscored(summary.n_unscored, summary.n_judgments, max_unscored, out)


def _examples(data: str, format: str, field: list[str] | None, quarantine: Path | None) -> list[Example]:
    from preftune.data.read import read_examples

    source = read_examples(data, format=format, fields=fields_of(field), quarantine=quarantine)
    for line in source.notes:
        say(line)
    return source.examples


Prompts = Annotated[str, typer.Option("--prompts", help="A .txt file with one a line, rows with a prompt, or any data format.")]
Models = Annotated[list[str], typer.Option("--model", help="A server's model or a local one; repeat it and they take turns.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that hold this share.")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least this fraction as likely as the likeliest.")]
MaxTokens = Annotated[int, typer.Option(help="Longest response, in tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends a response. May be repeated.")]


def sample(
    prompts: Prompts,
    model: Models,
    out: Annotated[Path, typer.Option(help="JSONL of prompts and responses; prompts that are in it are not asked again.")],
    n: Annotated[int, typer.Option("-n", help="Responses per prompt.")] = 1,
    base_url: BaseUrl = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeat it and they take turns. [default: 1.0]")] = None,
    system: Annotated[str, typer.Option(help="Instruction that the model is shown; it is not kept with the prompt.")] = "",
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    max_tokens: MaxTokens = 512,
    stop: Stop = None,
    concurrency: Concurrency = 8,
    retries: Retries = 6,
    timeout: Timeout = 120.0,
    cache: Cache = None,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    max_cost: MaxCost = None,
    field: Fields = None,
    chat_template: ChatTemplate = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Draw several responses to each prompt, from local models or a server, and say how different they are."""
    from preftune.sampling.responses import Plan, Way

    ways = tuple(Way(m, t, system, "system" if system else "") for m in model for t in temperature or [1.0])
    plan = Plan(ways, n, top_p, min_p, max_tokens, tuple(stop or ()), seed)
    _collect(plan, **_asking(locals()))


def generate_pairs(
    prompts: Prompts,
    model: Models,
    out: Annotated[Path, typer.Option(help="JSONL of pairs; prompts that are in it are not asked again.")],
    good: Annotated[Path | None, typer.Option(help="Instruction for the better response; default: our own words.")] = None,
    bad: Annotated[Path | None, typer.Option(help="Instruction for the worse response; default: our own words.")] = None,
    base_url: BaseUrl = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token every time.", min=0)] = 1.0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    max_tokens: MaxTokens = 512,
    stop: Stop = None,
    concurrency: Concurrency = 8,
    retries: Retries = 6,
    timeout: Timeout = 120.0,
    cache: Cache = None,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    max_cost: MaxCost = None,
    field: Fields = None,
    chat_template: ChatTemplate = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write pairs by one good and one bad instruction. Pairs sampled from your own model and judged are worth more."""
    from preftune.sampling.responses import Plan, Way

    if len(model) > 1:
        raise ConfigError("--model: one model writes both responses of a pair, or the model would be what tells them apart")
    ways = tuple(Way(model[0], temperature, _instruction(given, name), name) for name, given in (("good", good), ("bad", bad)))
    plan = Plan(ways, 2, top_p, min_p, max_tokens, tuple(stop or ()), seed, paired=True)
    _collect(plan, **_asking(locals()))


def _instruction(given: Path | None, name: str) -> str:
    """The text of an instruction: the user's file, or ours."""
    from importlib import resources

    try:
        file = resources.files("preftune.sampling") / f"{name}.txt" if given is None else given.expanduser()
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--{name} {given}: cannot be read: {error}") from None
    if not text:
        raise ConfigError(f"--{name} {given}: the file is empty; expected an instruction")
    return text


_ASKING = ("prompts", "out", "base_url", "concurrency", "retries", "timeout", "cache", "price_in", "price_out", "max_cost",
           "field", "chat_template", "device", "as_json")  # fmt: skip


def _asking(given: dict[str, Any]) -> dict[str, Any]:
    """The options that say who is asked and how, apart from what is drawn."""
    return {name: given[name] for name in _ASKING}


def _collect(
    plan: Plan, *, prompts: str, out: Path, base_url: str | None, concurrency: int, retries: int, timeout: float,
    cache: Path | None, price_in: float, price_out: float, max_cost: float | None, field: list[str] | None,
    chat_template: str | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Draws what is missing in `out` and says what came of it."""
    from preftune.asking.askers import Askers
    from preftune.asking.records import Ledger
    from preftune.asking.replies import Replies
    from preftune.files import read_jsonl
    from preftune.sampling.prompts import read_prompts
    from preftune.sampling.responses import collect, diversity

    check_prices(max_cost, price_in, price_out)
    found = read_prompts(prompts, fields=fields_of(field))
    for line in found.notes:
        say(line)
    ledger = Ledger(price_in=price_in, price_out=price_out)
    with (
        Replies(cache_file(cache)) as replies,
        Progress() as progress,
        Askers(
            base_url, concurrency=concurrency, retries=retries, timeout=timeout, template=chat_template, device=device
        ) as askers,
    ):
        counts = collect(
            found.prompts, plan, askers.of, out, replies=replies, ledger=ledger, max_cost=max_cost, on_progress=progress
        )
    groups = [row["responses"] for row in read_jsonl(out)]
    different = None if plan.paired else diversity(groups)
    if as_json:
        print(json.dumps(counts.as_dict() | {"diversity": different and different._asdict(), "ledger": ledger.as_dict()}))
    else:
        print(printable("\n".join([*counts.lines(), *(different.lines() if different else []), *ledger.lines()])))
    if counts.n_missing:
        raise ServerError(f"{counts.n_missing} prompts have no responses yet; the same command asks for what is missing")


VERBS: dict[str, Callable[..., None]] = {"sample": sample, "judge": judge, "generate-pairs": generate_pairs}
"""Verb -> function, in the order of the help."""
