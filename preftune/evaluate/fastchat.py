"""FastChat's files of MT-Bench judgments: what they come to, and rows of ours that its tools read.

    >>> found = read_judged(Path("gpt-4_single.jsonl")).figures(questions)
    >>> found["models"]["phi-3-dpo"]["average"]
    8.2

`*_single.jsonl` holds a score from 1 to 10 for each model, question and turn (-1: the judge gave none); `*_pair.jsonl` the
winner of two models in both orders, and "error" where there is none. A win counts where both orders agree on it, anything
else is a tie; adjusted, a tie is half a win.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.data.readers import rows_of_file
from preftune.errors import DataError, listing
from preftune.evaluate.estimate import bootstrap
from preftune.evaluate.mtbench import Question, table

NO_SCORE = -1
"""FastChat's score where the judge gave none."""
_WINNERS = ("model_1", "model_2", "tie", "error")


@dataclass(frozen=True)
class Score:
    """One answer that was rated."""

    place: str
    question: str
    model: str
    judge: str
    turn: int
    score: float | None  # None: the judge gave none


@dataclass(frozen=True)
class Game:
    """Two answers that were compared, in both orders."""

    place: str
    question: str
    models: tuple[str, str]
    judge: str
    winners: tuple[str, str]  # of the order model_1 first, then model_2 first: one of _WINNERS

    @property
    def share(self) -> float:
        """1 where model_1 wins in both orders, 0 where model_2 does, else one half."""
        first, second = self.winners
        return 0.5 if first != second or first == "tie" else float(first == "model_1")


@dataclass(frozen=True)
class Scores:
    """The rows of a file of scores."""

    rows: list[Score]

    def figures(self, questions: Sequence[Question] = ()) -> dict[str, Any]:
        """Per model the mean of each turn and of all, with a bootstrap interval over questions; by category with questions."""
        _check(self.rows, questions)
        by_model: dict[str, list[Score]] = defaultdict(list)
        for row in self.rows:
            by_model[row.model].append(row)
        models = {name: _of_model(rows, questions) for name, rows in by_model.items()}
        order = sorted(models, key=lambda name: -(models[name]["average"] or 0))
        n_dropped = sum(row.score is None for row in self.rows)
        return _head("single", self.rows, n_dropped) | {"models": {name: models[name] for name in order}}


@dataclass(frozen=True)
class Games:
    """The rows of a file of comparisons."""

    rows: list[Game]

    def figures(self, questions: Sequence[Question] = ()) -> dict[str, Any]:
        """Per model wins, losses and ties over all its games, and its adjusted win rate; by category with questions."""
        _check(self.rows, questions)
        whole = [row for row in self.rows if "error" not in row.winners]
        shares: dict[str, list[tuple[Game, float]]] = defaultdict(list)
        for row in whole:
            shares[row.models[0]].append((row, row.share))
            shares[row.models[1]].append((row, 1 - row.share))
        models = {name: _of_games(games, questions) for name, games in shares.items()}
        order = sorted(models, key=lambda name: -models[name]["win_rate_adjusted"])
        consistent = sum(row.winners[0] == row.winners[1] for row in whole)
        head = _head("pairwise", self.rows, len(self.rows) - len(whole)) | {"n_same_in_both_orders": consistent}
        return head | {"models": {name: models[name] for name in order}}


def read_judged(file: Path) -> Scores | Games:
    """A file of FastChat's judgments; which kind is seen at the first row. Raises DataError that lists every bad row."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected FastChat's model_judgment/JUDGE_single.jsonl or JUDGE_pair.jsonl")
    raws = list(rows_of_file(file))
    pairs = bool(raws) and isinstance(raws[0].value, Mapping) and "model_1" in raws[0].value
    found: list[Any] = []
    problems = []
    for raw in raws:
        try:
            if raw.problem or not isinstance(raw.value, Mapping):
                raise ValueError(raw.problem or "not an object with named columns")
            found.append((_game if pairs else _score)(raw.place, raw.value))
        except ValueError as error:
            problems.append(f"{raw.place}: {error}")
    if problems or not found:
        what = f"{len(problems)} of {len(raws)} rows are no {'comparisons' if pairs else 'scores'} of FastChat's"
        raise DataError(f"{file}: {what}:\n{listing(problems)}" if problems else f"{file}: no rows in it")
    return Games(found) if pairs else Scores(found)


def as_text(found: Mapping[str, Any]) -> str:
    """The figures for a terminal."""
    dropped = f", {found['n_dropped']} without a verdict left out" if found["n_dropped"] else ""
    lines = [f"{found['kind']}, {found['n_rows']} judgments by {', '.join(found['judges'])}{dropped}"]
    for name, one in found["models"].items():
        if found["kind"] == "single":
            turns = "".join(f"turn {k[4:]} {_shown(v)}, " for k, v in one.items() if k.startswith("turn"))
            low, high = one["average_low"], one["average_high"]
            lines.append(f"{name}: {turns}mean {_shown(one['average'])}{_interval(low, high)} ({one['n']} scores)")
        else:
            low, high = one["win_rate_adjusted_low"], one["win_rate_adjusted_high"]
            counts = f"{one['win']} won, {one['loss']} lost, {one['tie']} tied"
            lines.append(f"{name}: {counts}; adjusted win rate {_shown(one['win_rate_adjusted'])}{_interval(low, high)}")
        lines += [f"  {category:<12} {_shown(value)}" for category, value in one["by_category"].items()]
    return "\n".join(lines)


def _score(place: str, row: Mapping[str, Any]) -> Score:
    question, judge = _common(row)
    score, turn, model = row.get("score"), row.get("turn", 1), row.get("model")
    if not isinstance(model, str) or not model:
        raise ValueError("no model; expected question_id, model, score, turn (or model_1, model_2, g1_winner, g2_winner)")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise ValueError(f"score is {score!r}, expected a number, {NO_SCORE} where the judge gave none")
    if type(turn) is not int or turn < 1:
        raise ValueError(f"turn is {turn!r}, expected 1, 2, …")
    return Score(place, question, model, judge, turn, None if score == NO_SCORE else float(score))


def _game(place: str, row: Mapping[str, Any]) -> Game:
    question, judge = _common(row)
    models = row.get("model_1"), row.get("model_2")
    one, other = models
    if not isinstance(one, str) or not isinstance(other, str) or one == other:
        raise ValueError(f"model_1 and model_2 are {one!r} and {other!r}, expected two different names")
    winners = row.get("g1_winner", row.get("winner")), row.get("g2_winner", row.get("winner"))
    first, second = winners
    if first not in _WINNERS or second not in _WINNERS:
        raise ValueError(f"g1_winner and g2_winner are {first!r} and {second!r}, expected one of {', '.join(_WINNERS)}")
    return Game(place, question, (one, other), judge, (str(first), str(second)))


def _common(row: Mapping[str, Any]) -> tuple[str, str]:
    """The question's id and the judge's name."""
    if type(row.get("question_id")) not in (int, str):
        raise ValueError(f"question_id is {row.get('question_id')!r}, expected the id of a question")
    judge = row.get("judge", "")
    return str(row["question_id"]), str(judge[0]) if isinstance(judge, list) and judge else str(judge)


def _check(rows: Sequence[Score] | Sequence[Game], questions: Sequence[Question]) -> None:
    known = {q.id for q in questions}
    if strange := [f"{r.place}: question {r.question}" for r in rows if questions and r.question not in known]:
        raise DataError(f"{len(strange)} judgments are about questions that --questions does not hold:\n{listing(strange)}")


def _head(kind: str, rows: Sequence[Score] | Sequence[Game], n_dropped: int) -> dict[str, Any]:
    return {"kind": kind, "judges": sorted({row.judge for row in rows}), "n_rows": len(rows), "n_dropped": n_dropped}


def _of_model(rows: Sequence[Score], questions: Sequence[Question]) -> dict[str, Any]:
    found = table(questions, [(f"{row.question}/{row.turn}", row.score) for row in rows])
    by_question: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.score is not None:
            by_question[row.question].append(row.score)
    interval = bootstrap([by_question[name] for name in sorted(by_question)])
    means = {"average": found.average, "average_low": interval.low, "average_high": interval.high}
    turns = {f"turn{k}": value for k, value in found.turns.items()}
    counts = {"n": found.n, "n_dropped": found.n_unscored}
    return counts | {name: _known(v) for name, v in (turns | means).items()} | {"by_category": found.by_category}


def _of_games(games: Sequence[tuple[Game, float]], questions: Sequence[Question]) -> dict[str, Any]:
    n, shares = len(games), [share for _, share in games]
    win, loss = shares.count(1.0), shares.count(0.0)
    by_question: dict[str, list[float]] = defaultdict(list)
    by_category: dict[str, list[float]] = defaultdict(list)
    category = {q.id: q.category for q in questions}
    for game, share in games:
        by_question[game.question].append(share)
        if category:
            by_category[category[game.question]].append(share)
    interval = bootstrap([by_question[name] for name in sorted(by_question)])
    return {
        "n": n, "win": win, "loss": loss, "tie": n - win - loss, "win_rate": win / n, "loss_rate": loss / n,
        "win_rate_adjusted": sum(shares) / n, "win_rate_adjusted_low": _known(interval.low),
        "win_rate_adjusted_high": _known(interval.high),
        "by_category": {name: sum(values) / len(values) for name, values in sorted(by_category.items())},
    }  # fmt: skip


def _known(value: float) -> float | None:
    return value if abs(value) < float("inf") else None  # NaN is not less than anything either


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
