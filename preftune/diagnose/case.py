"""What a run, its data and its evaluation hold, as findings about runs read it: files only, and whatever is there so far.

    >>> case = Case.of(Run.open("runs/first"))
    >>> case.accuracy()
    Estimate(value=0.71, low=0.66, high=0.76, n=371)

Log-ratios and KL are in nats. A number that was not measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from preftune.config import Config
from preftune.data.types import Judgment
from preftune.evaluate.estimate import Estimate, mean, wilson
from preftune.evaluate.record import Evaluation, Wins
from preftune.files import read_jsonl
from preftune.run import Run

Row = Mapping[str, Any]
Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, ...] = ("chosen", "rejected")

LATE = 0.25
"""The share of the steps, at the end, over which batches are averaged to say where a run has come to."""


@dataclass(frozen=True)
class Case:
    """One run.

    place:      its folder, as commands name it.
    data:       data.json; about: env.json.
    train:      metrics of each step's batch before its update; held_out: on held-out examples after so many steps.
    answers:    rows of answers.jsonl.
    finished:   it ran to its end.
    """

    place: str
    config: Config
    data: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    train: Sequence[Row] = ()
    held_out: Sequence[Row] = ()
    events: Sequence[Row] = ()
    evaluation: Evaluation | None = None
    answers: Sequence[Row] = ()
    judgments: Sequence[Judgment] = ()
    finished: bool = True

    @classmethod
    def of(cls, run: Run) -> Case:
        """Reads a run folder, also of a run that goes on. Raises PreftuneError for files that are none of ours."""
        found = run.read_json(run.evaluation_file)
        return cls(
            place=str(run.path),
            config=run.config(),
            data=run.read_json(run.data_file) or {},
            about=run.read_json(run.env_file) or {},
            train=run.metrics(split="train"),
            held_out=run.metrics(split="eval"),
            events=run.events(),
            evaluation=None if found is None else Evaluation.of(found, str(run.evaluation_file)),
            answers=read_jsonl(run.answers_file),
            judgments=run.judgments(),
            finished=run.model.is_dir(),
        )

    @property
    def n_done(self) -> int:
        """Steps that were done."""
        return len(self.train)

    @cached_property
    def n_planned(self) -> int:
        """Steps that the settings ask for; those that were done, of a run that did not come to say so."""
        return int(self.data.get("steps", self.n_done))

    @property
    def late(self) -> Sequence[Row]:
        """Rows of the last steps."""
        return self.train[-max(1, round(LATE * self.n_done)) :] if self.train else ()

    @property
    def first_pass(self) -> Sequence[Row]:
        """Rows whose examples the policy had not learnt from yet, once it had begun to move: the first epoch but its start.

        A batch is measured before its update, so in the first epoch every batch is as good as held out.
        """
        first = [row for row in self.train if row.get("epoch", 0.0) <= 1 + 1e-9]
        return first[max(1, len(first) // 5) :]

    def independent(self, split: Literal["train", "eval"]) -> float:
        """Comparisons that one example is worth: K responses give K(K − 1)/2 pairs, of which K − 1 are independent."""
        units, examples = self.data.get(f"{split}_units") or [0], self.data.get(f"{split}_examples", 0)
        pairs = units[0] / examples if examples else 1.0
        return max(1.0, ((1 + math.sqrt(1 + 8 * pairs)) / 2 - 1))

    def accuracy(self) -> Estimate | None:
        """How often the policy's reward prefers the chosen response, on examples that it had not learnt from.

        An evaluation's figure where there is one, else that of the last held-out metrics, and of the first pass beside either.
        """
        name = "rewards/accuracies"
        parts: list[tuple[float, float]] = []  # accuracy, independent comparisons
        seen = [row[name] for row in self.first_pass if row.get(name) is not None]
        if seen:
            parts.append((sum(seen) / len(seen), len(seen) * self.config.batch.pairs_per_step * self.independent("train")))
        held_out = self.held_out_accuracy
        if held_out is not None:
            parts.append((held_out.value, held_out.n))
        n = sum(weight for _, weight in parts)
        return wilson(sum(value * weight for value, weight in parts), round(n)) if n >= 1 else None

    @cached_property
    def held_out_accuracy(self) -> Estimate | None:
        """The same on held-out examples alone, at the end."""
        if self.evaluation is not None and self.evaluation.held_out is not None and self.evaluation.held_out.n_pairs:
            return self.evaluation.held_out.accuracy
        rows = [row for row in self.held_out if row.get("rewards/accuracies") is not None and row["step"] > 0]
        n = round(self.data.get("eval_examples", 0) * self.independent("eval"))
        return wilson(rows[-1]["rewards/accuracies"] * n, n) if rows and n else None

    def trained_accuracy(self) -> Estimate | None:
        """Accuracy on examples that were learnt from: an evaluation's, or that of late batches after the first epoch."""
        if self.evaluation is not None and self.evaluation.train is not None and self.evaluation.train.n_pairs:
            return self.evaluation.train.accuracy
        rows = [row for row in self.late if row.get("epoch", 0.0) > 1 + 1e-9 and row.get("rewards/accuracies") is not None]
        n = round(len(rows) * self.config.batch.pairs_per_step * self.independent("train"))
        n = min(n, round(self.data.get("train_examples", n) * self.independent("train")))  # in many epochs the same come again
        return wilson(sum(row["rewards/accuracies"] for row in rows) / len(rows) * n, n) if rows and n else None

    def log_ratio(self, side: Side) -> tuple[float, float] | None:
        """(log π/π_ref of a whole response, tokens) at the end, held out if there is such; π_0 in π_ref's place without one."""
        rows = self.held_out if len(self.held_out) > 1 else self.late
        if not rows or f"lengths/{side}" not in rows[-1]:
            return None
        last = rows[-1:] if rows is self.held_out else rows
        tokens = _mean(row[f"lengths/{side}"] for row in last)
        if f"log_ratios/{side}" in rows[-1]:
            return _mean(row[f"log_ratios/{side}"] for row in last), tokens
        if rows is self.held_out and rows[0]["step"] == 0:
            return rows[-1][f"logps/{side}"] - rows[0][f"logps/{side}"], tokens
        return None

    def kl(self) -> Estimate | None:
        """KL(policy‖reference) of a response: on the policy's own answers if they were measured, else on those of the data."""
        samples = self.evaluation.samples if self.evaluation else None
        if samples is not None and samples.kl_per_response is not None:
            return samples.kl_per_response
        moved = [row for row in self.held_out if row["step"] > 0]
        rows = [row for row in moved[-1:] or self.late if row.get("kl") is not None]
        if rows:
            return mean([[row["kl"]] for row in rows]) if len(rows) > 1 else certain(rows[0]["kl"])
        return None

    def shift(self) -> float | None:
        """How far the likelihood of the data's responses has gone, nats a response: of chosen or rejected the further."""
        sides = [found for side in SIDES if (found := self.log_ratio(side))]
        return max((abs(nats) for nats, _ in sides), default=None)

    def kl_per_token(self) -> Estimate | None:
        """The same for a token."""
        samples = self.evaluation.samples if self.evaluation else None
        if samples is not None and samples.kl_per_token is not None:
            return samples.kl_per_token
        kl, tokens = self.kl(), [found[1] for side in SIDES if (found := self.log_ratio(side))]
        if kl is None or not sum(tokens):
            return None
        return scaled(kl, len(tokens) / sum(tokens))

    @property
    def wins(self) -> Wins | None:
        """The win rate that rests on the most comparisons."""
        return max(self.evaluation.wins, key=lambda one: one.n_total, default=None) if self.evaluation else None

    def change(self, name: str) -> tuple[Estimate, Estimate] | None:
        """A metric of batches in the first steps and in the last ones, as many."""
        rows = [row[name] for row in self.train if row.get(name) is not None]
        n = round(LATE * len(rows))
        return (mean([[v] for v in rows[:n]]), mean([[v] for v in rows[-n:]])) if n >= 2 else None


def certain(value: float) -> Estimate:
    """A number of which nobody knows how sure it is."""
    return Estimate(value, value, value, 1)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The same in another unit."""
    return Estimate(estimate.value * factor, estimate.low * factor, estimate.high * factor, estimate.n)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
