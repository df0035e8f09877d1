"""The verb check: what is wrong with a preference file, and what a judge says of a sample of it. `preftune.cli` takes it in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
    PriceIn,
    PriceOut,
    Progress,
    Quarantine,
    Retries,
    Timeout,
    cache_file,
    check_prices,
    fields_of,
)
from preftune.cli_data import AsJson, Seed, print_found, say
from preftune.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from preftune.asking.askers import Askers
    from preftune.asking.records import Ledger
    from preftune.data.types import Example, Judgment
    from preftune.diagnose.check import Check
    from preftune.diagnose.corpus import Corpus


def check(
    data: Annotated[str, typer.Argument(help="Preference file, folder, saved dataset or hub id.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Also tokenize with this model, and ask it how likely the data are.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Held-out set or benchmark that must not be in the data. May be repeated.")
    ] = None,
    judged: Annotated[Path | None, typer.Option(help="Judgments of some of the examples, to hold the labels against.")] = None,
    audit: Annotated[int | None, typer.Option(help="Have a judge compare that many pairs, drawn by --seed.", min=1)] = None,
    base_url: BaseUrl = None,
    judge_model: Annotated[
        list[str] | None, typer.Option("--judge-model", help="With --audit: the model that judges. May be repeated.")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="With --audit: a judge's template of your own.")] = None,
    template_name: Annotated[str | None, typer.Option(help="Which one of judge_prompts.jsonl, such as pair-v2.")] = None,
    labels: Annotated[str | None, typer.Option(help="What verdicts look like in your template: FIRST,SECOND[,TIE].")] = None,
    rubric: Annotated[
        str, typer.Option(help="helpfulness, honesty, instructions, safety, or a file of your own words.")
    ] = "helpfulness",
    reply: Annotated[
        Literal["auto", "letter", "json"], typer.Option(help="Form of the judge's reply, as in preftune judge.")
    ] = "auto",
    only: Annotated[list[str] | None, typer.Option(help="Run this check alone. May be repeated.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also show checks that found nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Leave with exit code 1 where there is an error.")] = False,
    fix: Annotated[
        Path | None, typer.Option(help="Write a cleaned copy to this JSONL file; what was left out is said.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the findings with plots to this page.")] = None,
    format: Format = "auto",
    field: Fields = None,
    quarantine: Quarantine = None,
    chat_template: ChatTemplate = None,
    max_length: Annotated[int | None, typer.Option(help="Longest prompt + response, in tokens.")] = None,
    device: Device = "auto",
    concurrency: Concurrency = 8,
    retries: Retries = 6,
    timeout: Timeout = 120.0,
    cache: Cache = None,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    max_cost: MaxCost = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """What is wrong with a preference file, before a GPU hour is spent on it: findings with numbers, places and remedies."""
    from rich.console import Console

    from preftune.asking.records import Ledger
    from preftune.data.judgments import read_judgments
    from preftune.diagnose.check import inspect

    _check(locals())
    renderer = score = auditor = None
    if model is not None:
        from preftune.diagnose.reference import scored_by
        from preftune.model.load import open_renderer

        renderer = open_renderer(model, template=chat_template, max_length=max_length, usual=1024)
        score = partial(scored_by, model, renderer=renderer, template=chat_template, device=device)
    ledger = Ledger(price_in=price_in, price_out=price_out)
    status = Console(stderr=True).status("reading")
    if audit is not None:
        from preftune.asking.askers import Askers
        from preftune.label.opened import judges_of

        auditor = partial(
            _audited, n=audit, names=judge_model or [], ledger=ledger, cache=cache_file(cache), seed=seed, max_cost=max_cost,
            on_start=status.stop,
            askers=partial(Askers, base_url, concurrency=concurrency, retries=retries, timeout=timeout,
                           template=chat_template, device=device),
            asked=partial(judges_of, template=template, template_name=template_name, labels=labels, rubric=rubric, reply=reply),
        )  # fmt: skip
    with status:
        found = inspect(
            data, renderer=renderer, score=score, against=against or (), judged=read_judgments(judged) if judged else (),
            auditor=auditor, only=only or (), format=format, fields=fields_of(field), quarantine=quarantine,
            on_progress=status.update,
        )  # fmt: skip
    if audit is not None:
        found = replace(found, notes=[*found.notes, *(f"the judge: {line}" for line in ledger.lines())])
    if fix is not None:
        _write_cleaned(found, data, fix)
    if html is not None:
        from preftune.report.check_page import write_page

        write_page(found, html, title=data)
    cost = {"audit_ledger": ledger.as_dict()} if audit is not None else {}
    if as_json:
        print_found(found.as_dict() | cost, "", as_json)
    else:
        found.show(Console(highlight=False), everything=everything)
    if strict and found.n_errors:
        raise typer.Exit(1)


def _check(given: dict[str, Any]) -> None:
    """Options that contradict each other. Raises ConfigError."""
    if given["model"] is None and given["max_length"] is not None:
        raise ConfigError("--max-length: give --model too, whose tokenizer it is for")
    if given["chat_template"] is not None and not (given["model"] or given["judge_model"]):
        raise ConfigError("--chat-template: give --model too, whose tokenizer it is for (a judge's template is --template)")
    if given["audit"] is not None and not given["judge_model"]:
        raise ConfigError(
            "--audit: name who judges, by --judge-model (with --base-url a server's model, without it a local one)"
        )
    if given["audit"] is not None and given["only"] and "audit" not in given["only"]:
        raise ConfigError("--audit: is not among the checks of --only; add --only audit")
    for name in ("base_url", "judge_model", "template", "template_name", "labels", "max_cost"):
        if given[name] is not None and given["audit"] is None:
            raise ConfigError(f"--{name.replace('_', '-')}: is for --audit N; nothing is asked without it")
    if given["template"] is None and (given["labels"] or given["template_name"]):
        raise ConfigError("--labels and --template-name: say how a --template is read; give that too")
    if given["template"] and (given["reply"] != "auto" or given["rubric"] != "helpfulness"):
        raise ConfigError("--reply and --rubric: are for our own templates; a --template says itself what it asks for")
    check_prices(given["max_cost"], given["price_in"], given["price_out"])


def _audited(
    corpus: Corpus, *, n: int, names: Sequence[str], ledger: Ledger, cache: Path, seed: int, max_cost: float | None,
    on_start: Callable[[], None], askers: Callable[[], Askers], asked: Callable[..., Any],
) -> list[Judgment]:  # fmt: skip
    """What the judges say of a sample. Raises ServerError where the money did not last: the next run goes on."""
    from preftune.asking.replies import Replies
    from preftune.diagnose.audit import audited
    from preftune.label.judge import judge_pairs

    on_start()  # one live line at a time
    with Replies(cache) as replies, askers() as who, Progress() as progress:
        judges = asked(names, who, replies, ledger, max_cost=max_cost)
        if judges[0].templates.kind == "score":
            raise ConfigError(f"--template: {judges[0].templates.name} rates one answer; an audit compares two")

        def ask(examples: Sequence[Example]) -> list[Judgment]:
            found = []
            for judge in judges:
                made = judge_pairs(
                    examples, judge, replies=replies, ledger=ledger, max_cost=max_cost,
                    on_progress=partial(progress, judge.annotator),
                )  # fmt: skip
                if made.n_left:
                    raise ServerError(
                        f"{judge.annotator}: the audit is not whole because of --max-cost; what was answered is kept, and the "
                        "same command goes on"
                    )
                found += made.judgments
            return found

        return audited(corpus, ask, n, seed=seed)


def _write_cleaned(found: Check, data: str, out: Path) -> None:
    from preftune.data.write import write_examples
    from preftune.diagnose.clean import cleaned

    if Path(data).expanduser().resolve() == out.resolve():
        raise ConfigError(f"--fix {out}: this is the data itself, which is never changed; name another file")
    examples, account = cleaned(found)
    write_examples(out, examples)
    for name, n in account.items():
        say(f"{n:>9,}  {'kept in ' + str(out) if name == 'kept' else 'left out: ' + name}")


VERBS: dict[str, Callable[..., None]] = {"check": check}
"""Verb -> function."""
