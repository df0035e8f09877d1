"""An MT-Bench run: a model answers the questions turn by turn, a judge rates or compares, all of it in FastChat's own files.

    model_answer/MODEL.jsonl             question_id, answer_id, model_id, choices[0].turns, tstamp
    model_judgment/JUDGE_single.jsonl    question_id, model, judge, user_prompt, judgment, score, turn, tstamp
    model_judgment/JUDGE_pair.jsonl      question_id, model_1, model_2, g1_winner, g2_winner, judge, …

A file that is there already keeps the rows of other models; those of this one are replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from preftune.asking.records import Answer, Asker, Failed, Ledger
from preftune.asking.replies import Replies
from preftune.data.types import Example, Message, content_id
from preftune.errors import ConfigError
from preftune.evaluate.answering import Drawing, answers
from preftune.evaluate.fastchat import NO_SCORE
from preftune.evaluate.mtbench import Question, Turns
from preftune.files import json_line, read_jsonl, write_atomic
from preftune.label.judge import IDENTICAL, Asked, Judge, questions, verdicts
from preftune.label.verdict import Read

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0, "math": 0.0,
                "coding": 0.0, "reasoning": 0.0}  # fmt: skip
"""MT-Bench's temperature by category; 0.7 for all others."""


class Opinion(NamedTuple):
    """One question to the judge, what came back, and what it says."""

    asked: Asked
    answer: Answer | Failed
    read: Read
    prompt: str  # what the judge was shown as the user's message


def answer_all(
    asked: Sequence[Question],
    asker: Asker,
    drawing: Drawing,
    *,
    replies: Replies,
    ledger: Ledger,
    max_cost: float | None = None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, tuple[str, ...]]:
    """The model's answers by question id; each turn sees what was said before it. Raises ServerError, ModelError."""
    said: dict[str, tuple[Message, ...]] = {q.id: () for q in asked}
    for turn in range(max(len(q.turns) for q in asked)):
        now = [q for q in asked if len(q.turns) > turn]
        for q in now:
            said[q.id] += (Message("user", q.turns[turn]),)
        prompts = [(said[q.id], TEMPERATURES.get(q.category, 0.7)) for q in now]

        def progress(done: int, total: int, turn: int = turn) -> None:
            on_progress(f"{drawing.model}, turn {turn + 1}", done, total)

        given = answers(asker, prompts, drawing, replies=replies, ledger=ledger, max_cost=max_cost, on_progress=progress)
        for q, answer in zip(now, given, strict=True):
            said[q.id] += (Message("assistant", answer.text),)
    return {name: tuple(m.content for m in messages if m.role == "assistant") for name, messages in said.items()}


def judge_all(
    examples: Sequence[Example],
    judge: Judge,
    *,
    replies: Replies,
    ledger: Ledger,
    max_cost: float | None = None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Opinion]:
    """What the judge says of each dialogue (of each two in both orders), in their order. Raises ServerError, DataError."""
    asked = questions(examples, judge, order="both", seed=0, secret=replies.secret)
    found: dict[int, Opinion] = {}
    for n, (index, answer, read) in enumerate(verdicts(asked, judge, replies, ledger, max_cost), 1):
        one = asked[index]
        prompt = judge.request(one.example, one.shown, code=one.code).messages[-1].content
        found[index] = Opinion(one, answer, read, prompt)
        on_progress(judge.annotator, n, len(asked))
    return [found[index] for index in sorted(found)]


def answer_rows(asked: Sequence[Question], given: Turns, model: str) -> list[dict[str, Any]]:
    """Rows of model_answer/MODEL.jsonl."""
    return [
        {"question_id": q.number, "answer_id": content_id(model, q.id, given[q.id]), "model_id": model,
         "choices": [{"index": 0, "turns": list(given[q.id])}], "tstamp": time.time()}
        for q in asked
    ]  # fmt: skip


def score_rows(judged: Sequence[Opinion], asked: Sequence[Question], model: str, judge: Judge) -> list[dict[str, Any]]:
    """Rows of model_judgment/JUDGE_single.jsonl."""
    numbers = {q.id: q.number for q in asked}
    rows = []
    for one in judged:
        question, turn = _question(one.asked.example)
        score = NO_SCORE if one.read.value is None else int(one.read.value) if one.read.value % 1 == 0 else one.read.value
        rows.append(
            {"question_id": numbers[question], "model": model, "judge": [judge.model, one.asked.template.name],
             "user_prompt": one.prompt, "judgment": _said(one), "score": score, "turn": turn, "tstamp": time.time()}
        )  # fmt: skip
    return rows


def game_rows(
    judged: Sequence[Opinion], examples: Sequence[Example], asked: Sequence[Question], models: tuple[str, str], judge: Judge
) -> list[dict[str, Any]]:
    """Rows of model_judgment/JUDGE_pair.jsonl: g1 showed the first model's answer first, g2 the second's.

    Two answers that are the same are a tie that nobody was asked about.
    """
    numbers = {q.id: q.number for q in asked}
    by_order = {(one.asked.example.id, one.asked.shown): one for one in judged}
    rows = []
    for example in examples:
        question, turn = _question(example)
        games = [by_order.get((example.id, shown)) for shown in ((0, 1), (1, 0))]
        row: dict[str, Any] = {"question_id": numbers[question], "model_1": models[0], "model_2": models[1]}
        row |= {f"g{k}_winner": _winner(game) for k, game in enumerate(games, 1)}
        row["judge"] = [judge.model, judge.templates.of(example).name]
        for k, game in enumerate(games, 1):
            row |= {f"g{k}_user_prompt": game.prompt if game else "", f"g{k}_judgment": _said(game) if game else IDENTICAL}
        rows.append(row | {"turn": turn, "tstamp": time.time()})
    return rows


def add_rows(file: Path, rows: Sequence[Mapping[str, Any]], *, mine: Sequence[str]) -> None:
    """Writes the file with these rows in the place of those that agree with them in the columns `mine`. Raises StorageError."""
    new = {tuple(row[name] for name in mine) for row in rows}
    kept = [row for row in read_jsonl(file) if tuple(row.get(name) for name in mine) not in new]
    write_atomic(file, "".join(json_line(row) for row in [*kept, *rows]))


def file_name(model: str) -> str:
    """What a model is called in file names: the last part of its path or hub id. Raises ConfigError where there is none."""
    parts = [part for part in model.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts:
        raise ConfigError(f"{model!r}: no name to call it by; give one with --name")
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]  # a run keeps its model in RUN/model


def _question(example: Example) -> tuple[str, int]:
    question, _, turn = example.id.rpartition("/")
    return question, int(turn)


def _winner(game: Opinion | None) -> str:
    if game is None:
        return "tie"
    if game.read.value is None:
        return "error"
    first = "model_1" if game.asked.shown == (0, 1) else "model_2"
    second = "model_2" if first == "model_1" else "model_1"
    return "tie" if game.read.value == 0.5 else first if game.read.value > 0.5 else second


def _said(one: Opinion) -> str:
    return f"$ERROR$ {one.answer.reason}" if isinstance(one.answer, Failed) else one.answer.text
