"""The verb for MT-Bench: the figures of FastChat's judgments, or a run that makes them. `preftune.cli` takes it in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from preftune.evaluate.mtbench import Question
    from preftune.label.judge import Judge
    from preftune.label.template import Kind


def mtbench(
    judgments: Annotated[
        Path | None, typer.Option(help="FastChat's model_judgment/JUDGE_single.jsonl or JUDGE_pair.jsonl: its figures.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="question.jsonl; with --judgments: figures by category.")] = None,
    model: Annotated[str | None, typer.Option(help="Model that answers: a run, a folder, or with --model-url a name.")] = None,
    answers: Annotated[Path | None, typer.Option(help="A model's stored answers (model_answer/MODEL.jsonl).")] = None,
    name: Annotated[str | None, typer.Option(help="What to call the model; default: by its path or file.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another model's answers: compare in both orders, in the place of scores.")
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="Answers known to be right; a question that has one is judged by it.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model that judges.")] = None,
    template: Annotated[
        Path | None, typer.Option(help="judge_prompts.jsonl, or a template of your own; default: ours.")
    ] = None,
    template_name: Annotated[
        str | None, typer.Option(help="Which one of judge_prompts.jsonl. [default: single-v1, or pair-v2 with --against]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for model_answer/ and model_judgment/.")] = None,
    base_url: BaseUrl = None,
    model_url: ModelUrl = None,
    temperature: AnswerTemperature = None,
    top_p: Annotated[float, typer.Option(help="Of the answers: keep the likeliest tokens that hold this share.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
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
    """MT-Bench: scores by turn and category or pairwise wins, of FastChat's files or of a model that is asked now."""
    given = dict(locals())
    needs, more = ("questions", "judge_model", "out"), ("against", "references")
    check_benchmark(given, counts="judgments", stored="answers", needs=needs, more=more)
    from preftune.evaluate.fastchat import as_text, read_judged
    from preftune.evaluate.mtbench import read_questions

    asked = [] if questions is None else read_questions(questions)
    if judgments is not None:
        found = read_judged(judgments).figures(asked)
        print_found(found, as_text(found), as_json)
        return
    with benchmark(
        model_url, base_url, concurrency=concurrency, retries=retries, timeout=timeout, cache=cache, price_in=price_in,
        price_out=price_out, max_cost=max_cost, chat_template=chat_template, device=device,
    ) as room:  # fmt: skip
        answered = _answered(given, asked, room)
        judged_file, n_unscored, n = _judged(given, asked, answered, room)
        ledgers = {"answers": room.answered.as_dict(), "judge": room.judged.as_dict()}
        lines = [f"answers: {room.answered.lines()[0]}", f"judge: {room.judged.lines()[0]}"]
    found = read_judged(judged_file).figures(asked) | {"file": str(judged_file), "ledger": ledgers}
    print_found(found, "\n".join([as_text(found), *lines, str(judged_file)]), as_json)
    check_unscored(n_unscored, n, max_unscored, judged_file)


def _answered(given: dict[str, Any], asked: Sequence[Question], room: Benchmark) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The model's name and its answers, sampled now or as they are stored."""
    from preftune.evaluate.answering import Drawing
    from preftune.evaluate.mtbench import read_answers
    from preftune.evaluate.mtbench_run import answer_all, file_name

    model = given["model"]
    if model is None:
        file: Path = given["answers"]
        return given["name"] or _stem(file), read_answers(file)
    name = given["name"] or file_name(model)
    drawing = Drawing(model, given["temperature"], given["top_p"], 0.0, given["max_tokens"], given["seed"])
    return name, answer_all(
        asked, room.answers_for(model), drawing, replies=room.replies, ledger=room.answered, on_progress=room.progress
    )


def _judged(
    given: dict[str, Any], asked: Sequence[Question], answered: tuple[str, dict[str, tuple[str, ...]]], room: Benchmark
) -> tuple[Path, int, int]:
    """The file of judgments, how many acts of judging have no verdict, and how many there are."""
    from preftune.evaluate.mtbench import dialogues, read_answers
    from preftune.evaluate.mtbench_run import add_rows, answer_rows, file_name, game_rows, judge_all, score_rows

    against: Path | None = given["against"]
    name, answers = answered
    models = {name: answers} | ({} if against is None else {_stem(against): read_answers(against)})
    if against is not None and len(models) == 1:
        raise ConfigError(f"--against {against}: is called {name} as the model is; call the model otherwise with --name")
    references = None if given["references"] is None else read_answers(given["references"])
    examples = dialogues(asked, models, references)
    for each, said in models.items():
        add_rows(given["out"] / "model_answer" / f"{each}.jsonl", answer_rows(asked, said, each), mine=("question_id",))
    judge = _judge(given, room, pairs=against is not None)
    judged = judge_all(
        examples, judge, replies=room.replies, ledger=room.judged, max_cost=given["max_cost"], on_progress=room.progress
    )
    folder, judge_name = given["out"] / "model_judgment", file_name(judge.model)
    n_unscored = sum(one.read.value is None for one in judged)
    if against is None:
        file = folder / f"{judge_name}_single.jsonl"
        add_rows(file, score_rows(judged, asked, name, judge), mine=("question_id", "model", "turn"))
    else:
        file = folder / f"{judge_name}_pair.jsonl"
        rows = game_rows(judged, examples, asked, (name, _stem(against)), judge)
        add_rows(file, rows, mine=("question_id", "model_1", "model_2", "turn"))
    return file, n_unscored, len(judged)


def _judge(given: dict[str, Any], room: Benchmark, *, pairs: bool) -> Judge:
    """The judge with its template. Raises ConfigError for a template of the other kind."""
    from preftune.label.opened import judges_of

    template: Path | None = given["template"]
    name = given["template_name"]
    if template is not None and template.suffix == ".jsonl" and name is None:
        name = "pair-v2" if pairs else "single-v1"
    kind: Kind = "pair" if pairs else "score"
    [judge] = judges_of(
        [given["judge_model"]], room.judging, room.replies, room.judged, kind=kind, template=template, template_name=name,
        max_cost=given["max_cost"],
    )  # fmt: skip
    if judge.templates.kind != kind:
        what = "compares two answers" if judge.templates.kind == "pair" else "rates one answer"
        raise ConfigError(
            f"--template: {judge.templates.name} {what}; --against FILE is given to compare, and left out to rate"
        )
    return judge


def _stem(file: Path) -> str:
    """A model's name by its file: phi-3 for phi-3.jsonl.gz."""
    return file.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")


VERBS: dict[str, Callable[..., None]] = {"mtbench": mtbench}
"""Verb -> function, in the order of the help."""
