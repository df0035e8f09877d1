"""MT-Bench: two-turn questions and answers of models become the examples that a judge is shown; then the table of scores.

    >>> examples = dialogues(questions, {"mine": answers}, references)
    >>> judge = Judge(server, "gpt-4", open_template("judge_prompts.jsonl", name="single-v1"))
    >>> scored, n_left = judge_scores(examples, judge, replies=replies, ledger=Ledger())
    >>> table(questions, [(s.example, s.score) for s in scored]).average
    8.2

Files are FastChat's: question.jsonl (`question_id`, `category`, `turns`), a model's answers and the reference answers
(`question_id`, `choices[0].turns`). A question that has a reference answer is judged with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from preftune.data.readers import rows_of_file
from preftune.data.types import Example, Message, Response
from preftune.errors import DataError, listing

Turns = Mapping[str, Sequence[str]]
"""Question id -> a model's answer to each turn."""


class Question(NamedTuple):
    """A question of the user's file."""

    id: str
    category: str
    turns: tuple[str, ...]
    number: int | str = ""  # the id as the file writes it


class Table(NamedTuple):
    """Mean scores. A question without a score is left out and counted."""

    average: float
    turns: dict[int, float]  # number of the turn, from 1
    by_category: dict[str, float]  # empty where no questions are given
    n: int
    n_unscored: int


def read_questions(file: Path) -> list[Question]:
    """The questions of question.jsonl. Raises DataError that lists every line that is none."""

    def question(row: Mapping[str, Any]) -> Question:
        return Question(str(row["question_id"]), str(row.get("category", "")), _texts(row["turns"]), row["question_id"])

    return _read(file, question, "question_id and turns")


def read_answers(file: Path) -> dict[str, tuple[str, ...]]:
    """Answers by question id: of a model, or the references. Raises DataError that lists every line that is none."""

    def answer(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        return str(row["question_id"]), _texts(row["choices"][0]["turns"])

    return dict(_read(file, answer, "question_id and choices[0].turns"))


def dialogues(questions: Sequence[Question], answers: Mapping[str, Turns], references: Turns | None = None) -> list[Example]:
    """An example per question and turn, named `ID/TURN`, whose responses are the models' in the order of `answers`.

    The second turn's response is the whole dialogue after the first question, since each model had its own first answer.
    Raises DataError for questions that a model did not answer in full.
    """
    missing = [
        f"{model}: question {q.id}: {len(turns.get(q.id, ()))} answers, expected {len(q.turns)}"
        for model, turns in answers.items()
        for q in questions
        if len(turns.get(q.id, ())) != len(q.turns)
    ]
    if missing:
        raise DataError(f"answers are missing:\n{listing(missing)}")
    examples = []
    for q in questions:
        known = (references or {}).get(q.id, ())
        for turn in range(1, len(q.turns) + 1):
            responses = tuple(_dialogue(q, turns[q.id], turn) for turns in answers.values())
            reference = _dialogue(q, known, turn) if len(known) >= turn else None
            prompt = (Message("user", q.turns[0]),)
            examples.append(Example(f"{q.id}/{turn}", prompt, responses, source=f"question {q.id}", reference=reference))
    return examples


def table(questions: Sequence[Question], scores: Iterable[tuple[str, float | None]]) -> Table:
    """Means over (example's name, score); None is no score."""
    category = {q.id: q.category for q in questions}
    by_turn: dict[int, list[float]] = defaultdict(list)
    by_category: dict[str, list[float]] = defaultdict(list)
    n_unscored = 0
    for name, score in scores:
        question, _, turn = name.rpartition("/")
        if score is None:
            n_unscored += 1
            continue
        by_turn[int(turn)].append(score)
        if category:
            by_category[category[question]].append(score)
    everything = [score for scores in by_turn.values() for score in scores]
    turns = {turn: _mean(by_turn[turn]) for turn in sorted(by_turn)}
    names = {name: _mean(values) for name, values in sorted(by_category.items())}
    return Table(_mean(everything), turns, names, len(everything), n_unscored)


def _dialogue(question: Question, answers: Sequence[str], turn: int) -> Response:
    """The answer of turn 1 as text; later ones with all that was said since the first question."""
    if turn == 1:
        return answers[0]
    said = [Message("assistant", answers[0])]
    for asked, answered in zip(question.turns[1:turn], answers[1:turn], strict=True):
        said += [Message("user", asked), Message("assistant", answered)]
    return tuple(said)


def _read(file: Path, convert: Any, expected: str) -> list[Any]:
    found, problems = [], []
    for raw in rows_of_file(file):
        try:
            found.append(convert(raw.value))
        except (KeyError, TypeError, IndexError, ValueError):
            problems.append(f"{raw.place}: {raw.problem or f'expected an object with {expected}'}")
    if problems:
        raise DataError(f"{len(problems)} rows of {file} cannot be used:\n{listing(problems)}")
    return found


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values) or not values:
        raise ValueError
    return tuple(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
