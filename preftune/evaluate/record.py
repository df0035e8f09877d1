"""What an evaluation found: the content of a run's evaluation.json, for whoever reads it (diagnosis, report, sweep, scripts).

    >>> found = Evaluation.of(run.read_json(run.evaluation_file))
    >>> found.samples.kl_per_response.value
    4.86

A part that was not measured is None. Log-probabilities, log-ratios and KL are in nats, rewards in β · nats, lengths in tokens,
shares and accuracies are fractions, win rates are percent as AlpacaEval has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from preftune.errors import StorageError
from preftune.evaluate.estimate import Estimate


@dataclass(frozen=True)
class Bin:
    """Pairs whose predicted probability lies from `low` to `high`: σ(|margin|), of the response that the policy prefers.

    `observed.n` counts them.
    """

    low: float
    high: float
    predicted: float  # mean of σ(|margin|)
    observed: Estimate  # how often people preferred that response too: Wilson's interval


@dataclass(frozen=True)
class Histogram:
    """`counts[k]` values lie from `edges[k]` to `edges[k + 1]`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Preferences:
    """The policy's implicit reward on preferences, each pair once.

    Without a reference the reward is what the objective itself compares, and there are no log-ratios.
    """

    n_pairs: int
    n_ties: int  # pairs whose two rewards are equal; they count one half
    accuracy: Estimate  # Wilson's interval; n is the number of pairs
    length_only: Estimate  # accuracy of "the longer one wins", which a policy should beat
    length_matched: Estimate | None  # accuracy on pairs of nearly equal length
    loss: float | None  # of the run's own objective
    margin: Estimate  # reward of chosen minus rejected
    chosen_reward: Estimate
    rejected_reward: Estimate
    chosen_log_ratio: Estimate | None  # log π/π_ref of a whole response
    rejected_log_ratio: Estimate | None
    chosen_log_ratio_per_token: Estimate | None
    rejected_log_ratio_per_token: Estimate | None
    calibration: tuple[Bin, ...] = ()
    calibration_error: float | None = None  # mean |observed − predicted|, weighted by pairs
    margins: Histogram | None = None
    by: dict[str, dict[str, Estimate]] = field(default_factory=dict)  # "category", "source", "length" -> name -> accuracy


@dataclass(frozen=True)
class Answers:
    """What one model's own answers look like."""

    tokens: Estimate
    characters: Estimate
    ended: Estimate  # share that end by themselves, before the token limit
    repetition: Estimate  # share of a response's 4-grams that it has said before
    distinct_1: float  # different words over all words
    distinct_2: float
    unique: float  # different responses over all responses
    logp_per_token: Estimate | None = None  # of its own answers, by the model that gave them, nats


@dataclass(frozen=True)
class Samples:
    """Own answers of the policy (and of the reference) to held-out prompts, drawn at temperature 1 without truncation."""

    n_prompts: int
    n_per_prompt: int
    max_tokens: int
    seed: int
    kl_per_response: Estimate | None  # KL(policy‖reference)
    kl_per_token: Estimate | None  # the same over all tokens, by their number
    implicit_reward: Estimate | None  # β · log π/π_ref
    policy: Answers
    reference: Answers | None


@dataclass(frozen=True)
class Wins:
    """Win rate of the policy's answers against others, by one judge; percent, as `evaluate.winrate` counts it."""

    judge: str
    against: str
    n_total: int
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_unscored: int
    win_rate: Estimate  # bootstrap over prompts
    standard_error: float | None
    length_controlled: Estimate | None
    tokens: float | None  # mean length of the policy's answers that were judged
    tokens_base: float | None
    order_consistency: Estimate | None = None  # fraction of pairs judged alike in both orders
    first_wins: Estimate | None = None  # fraction of verdicts for the answer that was shown first
    by_length: tuple[tuple[float, float, Estimate], ...] = ()  # ratio of lengths from, to: fraction of wins there


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-prob of a text's tokens."""

    name: str
    n_tokens: int
    policy: float
    reference: float | None
    change: Estimate | None  # mean log-prob of the reference less the policy's, nats per token: above 0 the policy is worse
    n_documents: int = 0
    bits_per_byte: float | None = None  # of the text in UTF-8, whatever the tokenizer
    reference_bits_per_byte: float | None = None
    window: int = 0  # tokens that are read together
    stride: int = 0  # tokens that a further window adds


@dataclass(frozen=True)
class Figure:
    """One more figure, in the words of whoever measured it; `before` is the same of the model that is compared with."""

    name: str
    value: Estimate
    before: Estimate | None = None


@dataclass(frozen=True)
class Evaluation:
    """All that one evaluation measured of a policy."""

    policy: str
    against: str | None
    beta: float | None  # of the implicit rewards
    objective: str | None
    at: str  # UTC
    verdict: str  # one sentence with its numbers
    worked: bool | None  # None where what was measured does not say
    held_out: Preferences | None = None
    train: Preferences | None = None  # the same on as many pairs that it was trained on, for the gap
    samples: Samples | None = None
    wins: tuple[Wins, ...] = ()
    perplexity: tuple[Perplexity, ...] = ()
    figures: tuple[Figure, ...] = ()
    benchmarks: dict[str, Any] = field(default_factory=dict)  # results of lm-evaluation-harness, task by task
    notes: tuple[str, ...] = ()  # what was left out, cut or could not be measured, and why
    version: Literal[1] = 1

    @classmethod
    def of(cls, content: Any, place: str = "evaluation.json") -> Evaluation:
        """The record from its JSON. Raises StorageError where it is none."""
        found: Evaluation = revived(cls, content, place)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an estimate is an object with `value`, `low`, `high`, `n`; infinite and undefined numbers are null."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


def short(name: str) -> str:
    """What a sentence calls a model: the last part of its path, for the model of a run the run's."""
    path = Path(name)
    return path.parent.name if path.name == "model" and path.parent.name else path.name or name


def revived(kind: Any, content: Any, place: str) -> Any:
    """An evaluation or a part of one, of the type `kind`, from its JSON. Raises StorageError where it is none."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(_revived(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}." for part in first["loc"])[:-1] or "the whole"
        raise StorageError(f"{place}: not an evaluation: {where}: {first['msg']}; `preftune eval` writes it anew") from None


def plain(value: Any) -> Any:
    """A part of an evaluation for JSON, or other values; what JSON cannot say is null."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Estimate):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _revived(value: Any) -> Any:
    """Estimates as tuples in place of their objects; ends and values that JSON cannot say are infinite and NaN again."""
    if isinstance(value, dict):
        if set(value) == set(Estimate._fields):
            ends = {"value": math.nan, "low": -math.inf, "high": math.inf} if value["value"] is not None else {}
            return tuple(ends.get(name, math.nan) if value[name] is None else value[name] for name in Estimate._fields)
        return {name: _revived(part) for name, part in value.items()}
    return [_revived(part) for part in value] if isinstance(value, list) else value


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
