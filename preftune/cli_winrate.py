"""The verb for win rates: the figures of a file of preferences, or an AlpacaEval run. `preftune.cli` takes it in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from preftune.cli_asking import (
    AnswerTemperature,
    BaseUrl,
    Benchmark,
    Cache,
    ChatTemplate,
    Concurrency,
    Device,
    MaxCost,
    MaxUnscored,
    ModelUrl,
    PriceIn,
    PriceOut,
    Retries,
    Timeout,
    benchmark,
    check_benchmark,
    check_unscored,
)
from preftune.cli_data import AsJson, Seed, print_found
from preftune.errors import ConfigError

if TYPE_CHECKING:
    from preftune.evaluate.alpaca import Output
    from preftune.label.reliability import Reliability


def winrate(
    annotations: Annotated[
        Path | None, typer.Option(help="AlpacaEval's annotations (.json, .json.gz, .jsonl) or our judgments.jsonl.")
    ] = None,
    length_control: Annotated[
        Path | None, typer.Option(help="Folder of AlpacaEval's df_gamed*.csv and instruction_difficulty*.csv.")
    ] = None,
    own_prompts: Annotated[
        bool, typer.Option("--own-prompts", help="Control lengths by these rows alone, for prompts of your own.")
    ] = False,
    instructions: Annotated[
        Path | None,
        typer.Option(help="All instructions of the benchmark in order: difficulties go by text, not by row number."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="What was judged, where it is not beside judgments.jsonl.")] = None,
    annotator: Annotated[str | None, typer.Option(help="Of judgments.jsonl: whose are counted.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="For a run: AlpacaEval's prompt file, rows with `instruction`.")] = None,
    model: Annotated[str | None, typer.Option(help="Model that answers: a run, a folder, or with --model-url a name.")] = None,
    outputs: Annotated[Path | None, typer.Option(help="A model's stored outputs (model_outputs.json).")] = None,
    name: Annotated[str | None, typer.Option(help="What to call the model; default: by its path or file.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="The baseline's outputs (model_outputs.json).")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model that judges.")] = None,
    template: Annotated[Path | None, typer.Option(help="The judge's template, such as AlpacaEval's; default: ours.")] = None,
    template_name: Annotated[str | None, typer.Option(help="Which one of judge_prompts.jsonl, such as pair-v2.")] = None,
    labels: Annotated[str | None, typer.Option(help="What verdicts look like in your template: FIRST,SECOND[,TIE].")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for model_outputs.json, annotations.json and judgments.jsonl.")
    ] = None,
    order: Annotated[
        Literal["seeded", "both"], typer.Option(help="Shown in one order by AlpacaEval's coin, or in both.")
    ] = "seeded",
    base_url: BaseUrl = None,
    model_url: ModelUrl = None,
    temperature: AnswerTemperature = None,
    top_p: Annotated[float, typer.Option(help="Of the answers: keep the likeliest tokens that hold this share.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 2048,
    concurrency: Concurrency = 8,
    retries: Retries = 6,
    timeout: Timeout = 120.0,
    cache: Cache = None,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    max_cost: MaxCost = None,
    max_unscored: MaxUnscored = 0.05,
    chat_template: ChatTemplate = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Win rate, its error and the length-controlled one, as AlpacaEval counts: of a file of preferences, or of a run."""
    given = dict(locals())
    _check(given)
    from preftune.evaluate.annotations import read_annotations
    from preftune.evaluate.benchmark import figures
    from preftune.evaluate.length_tables import read_tables

    tables = None if length_control is None else read_tables(length_control, instructions=instructions)
    if annotations is not None:
        found = figures(
            read_annotations(annotations, data=data, annotator=annotator), tables=tables, own=own_prompts, seed=seed
        )
        print_found(found.as_dict(), found.as_text(), as_json)
        return
    with benchmark(
        model_url, base_url, concurrency=concurrency, retries=retries, timeout=timeout, cache=cache, price_in=price_in,
        price_out=price_out, max_cost=max_cost, chat_template=chat_template, device=device,
    ) as room:  # fmt: skip
        file, quality = _run(given, room)
        ledgers = {"answers": room.answered.as_dict(), "judge": room.judged.as_dict()}
        lines = [*quality.lines(), f"answers: {room.answered.lines()[0]}", f"judge: {room.judged.lines()[0]}", str(file)]
    read = read_annotations(file)
    check_unscored(read.preferences.count(None), len(read.preferences), max_unscored, file)
    found = figures(read, tables=tables, own=own_prompts, seed=seed)
    more = {"file": str(file), "judge": quality.as_dict(), "ledger": ledgers}
    print_found(found.as_dict() | more, "\n".join([found.as_text(), *lines]), as_json)


def _check(given: dict[str, Any]) -> None:
    """Options that contradict each other. Raises ConfigError."""
    if given["own_prompts"] and given["length_control"]:
        raise ConfigError("--own-prompts: controls lengths without AlpacaEval's tables; leave --length-control out")
    if given["instructions"] and not given["length_control"]:
        raise ConfigError("--instructions: says which difficulty belongs to a row; give --length-control FOLDER too")
    needs = ("baseline", "judge_model", "out", *(("prompts",) if given["outputs"] is None else ()))
    check_benchmark(given, counts="annotations", stored="outputs", needs=needs, more=("prompts", "baseline", "labels"))
    if given["annotations"] is None and (given["data"] or given["annotator"]):
        raise ConfigError("--data and --annotator: say how judgments.jsonl is read; give that as --annotations")


def _run(given: dict[str, Any], room: Benchmark) -> tuple[Path, Reliability]:
    """Answers, judges and writes: the file of annotations, and how far its judge can be trusted."""
    from preftune.data.judgments import read_judgments
    from preftune.data.write import judged_file, write_examples
    from preftune.evaluate.alpaca import annotation_rows, comparisons, in_order_of, read_outputs, write_array
    from preftune.label.job import Job
    from preftune.label.opened import judges_of
    from preftune.label.reliability import reliability

    out: Path = given["out"]
    base_file: Path = given["baseline"]
    base = read_outputs(base_file)  # before anybody is asked
    ours = _outputs(given, base, room)
    theirs = in_order_of(ours, base, base_file)
    theirs = [one._replace(generator=one.generator or base_file.stem) for one in theirs]
    examples = comparisons(theirs, ours)
    judgments = out / "judgments.jsonl"
    [judge] = judges_of(
        [given["judge_model"]], room.judging, room.replies, room.judged, template=given["template"],
        template_name=given["template_name"], labels=given["labels"], max_cost=given["max_cost"],
    )  # fmt: skip
    if judge.templates.kind != "pair":
        raise ConfigError(f"--template: {judge.templates.name} rates one answer; a win rate needs one that compares two")
    job = Job(
        examples, judgments, room.replies, room.judged, order=given["order"], max_cost=given["max_cost"],
        on_progress=room.progress,
    )  # fmt: skip
    job.by_models([judge])
    write_examples(judged_file(judgments), examples)
    ids = {example.id for example in examples}  # the file may hold more: of outputs that were judged before these
    said = [one for one in read_judgments(judgments) if one.annotator == judge.annotator and one.example in ids]
    file = out / "annotations.json"
    write_array(file, annotation_rows(theirs, ours, examples, said, judge.annotator))
    [quality] = reliability(said, examples)
    return file, quality


def _outputs(given: dict[str, Any], base: list[Output], room: Benchmark) -> list[Output]:
    """The model's outputs, sampled now or as they are stored, and written down in the order of the prompts."""
    from preftune.data.types import Message
    from preftune.evaluate.alpaca import in_order_of, output_rows, read_instructions, read_outputs, write_array
    from preftune.evaluate.answering import Drawing, answers
    from preftune.evaluate.mtbench_run import file_name

    wanted = None if given["prompts"] is None else read_instructions(given["prompts"])
    model, stored = given["model"], given["outputs"]
    if model is None:
        found = read_outputs(stored)
        name = given["name"] or next((one.generator for one in found if one.generator), stored.stem)
        found = found if wanted is None else in_order_of(wanted, found, stored)
    else:
        wanted = wanted or []
        in_order_of(wanted, base, given["baseline"])  # a baseline that lacks one is said before anybody is asked
        name = given["name"] or file_name(model)
        drawing = Drawing(model, given["temperature"], given["top_p"], 0.0, given["max_tokens"], given["seed"])
        asked = [((Message("user", one.instruction),), 0.0) for one in wanted]
        said = answers(
            room.answers_for(model), asked, drawing, replies=room.replies, ledger=room.answered,
            on_progress=lambda done, total: room.progress(name, done, total),
        )  # fmt: skip
        found = [one._replace(output=answer.text) for one, answer in zip(wanted, said, strict=True)]
    found = [one._replace(generator=name) for one in found]
    write_array(given["out"] / "model_outputs.json", output_rows(found))
    return found


VERBS: dict[str, Callable[..., None]] = {"winrate": winrate}
"""Verb -> function, in the order of the help."""
