"""Puts a run folder on one HTML page: what came out, how it got there, and how to do it again.

    >>> write_report(Run("runs/first"))
    PosixPath('runs/first/report.html')

The page needs nothing but itself: no script, no other host, no other file. Whatever it shows is escaped by the template. A
file of the run that is missing or cannot be read is said to be so, in its place, and the rest of the page is written.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from preftune.errors import PreftuneError
from preftune.evaluate.record import Evaluation
from preftune.files import read_jsonl, write_atomic
from preftune.report.curves import Curve, curves, series
from preftune.report.text import dicts, flat, number, text
from preftune.run import Run

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATE = "page.html.jinja"
_SHOWN = 6  # answers of an evaluation, where training recorded none
_T = TypeVar("_T")

FIGURES = {
    "loss": "Loss",
    "rewards/accuracies": "Accuracy, fraction of pairs",
    "rewards/margins": "Margin of rewards",
    "rewards/chosen": "Reward of chosen",
    "rewards/rejected": "Reward of rejected",
    "logps/chosen": "Log-probability of chosen, nats",
    "logps/rejected": "Log-probability of rejected, nats",
    "kl": "KL from the reference, nats per response",
}
"""Metrics that the table of first and last values names, in its order."""


class Change(NamedTuple):
    """A metric at the first and at the last step where it was measured."""

    name: str
    split: str
    first_step: int
    first: str
    last_step: int
    last: str


class Sample(NamedTuple):
    """One prompt and its answers; an answer that was not recorded is None."""

    prompt: str
    before: str | None
    after: str | None


class Figure(NamedTuple):
    """One row of the evaluation: a number and its interval."""

    name: str
    before: str
    value: str
    interval: str


class Page(NamedTuple):
    """Everything that the template shows, as text. An empty part is shown as its entry in `missing`."""

    title: str
    verdict: str
    figures: list[Figure]
    samples: list[Sample]
    curves: list[Curve]
    changes: list[Change]
    data: list[tuple[str, str]]
    settings: str
    again: str
    environment: list[tuple[str, str]]
    events: list[tuple[str, str]]
    missing: dict[str, str]


def write_report(run: Run) -> Path:
    """Writes `run.report_file` from the other files of the run, and returns its path. Raises StorageError if it cannot."""
    write_atomic(run.report_file, render(read(run)))
    return run.report_file


def render(page: Page) -> str:
    """The HTML of a page."""
    return templates().get_template(_TEMPLATE).render(page._asdict())


def templates() -> Environment:
    """The page templates of this package; what they show is escaped, and a name that is not given is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def read(run: Run) -> Page:
    """The content of the page, from the files of the run."""
    missing: dict[str, str] = {}

    def part(name: str, file: Path, get: Callable[[], Any], kind: type[_T]) -> _T:
        content, missing[name] = _content(file, get, kind)
        return content

    metrics = [m for m in part("metrics", run.metrics_file, run.metrics, list) if isinstance(m, dict)]
    evaluation = part("evaluation", run.evaluation_file, lambda: _evaluation(run), dict)
    recorded = part("samples", run.samples_file, run.samples, list)
    return Page(
        title=run.path.resolve().name,
        verdict=text(evaluation.get("verdict", "")),
        figures=[_figure(*row) for row in _measured(evaluation)],
        samples=_samples(dicts(recorded))
        or _compared(_content(run.answers_file, lambda: read_jsonl(run.answers_file), list)[0]),
        curves=curves(metrics),
        changes=_changes(metrics),
        data=flat(part("data", run.data_file, lambda: run.read_json(run.data_file), dict)),
        settings=part("settings", run.config_file, run.config_file.read_text, str).strip(),
        again=shlex.join(["preftune", "train", str(run.config_file), f"out={run.path}-again"]),
        environment=flat(part("environment", run.env_file, lambda: run.read_json(run.env_file), dict)),
        events=[
            (text(row.get("kind", "")), text(row.get("message", "")))
            for row in dicts(part("events", run.events_file, run.events, list))
        ],
        missing=missing,
    )


def _content(file: Path, get: Callable[[], Any], kind: type[_T]) -> tuple[_T, str]:
    """What `get` reads from `file`, and ""; or an empty `kind`, and a sentence that says why there is nothing."""
    if not file.exists():
        return kind(), f"{file.name} is not in this run's folder."
    try:
        content = get()
    except (OSError, ValueError, KeyError, TypeError, PreftuneError) as error:
        return kind(), f"{file.name} could not be read: {error}"
    if not isinstance(content, kind):
        return kind(), f"{file.name} could not be read: it does not hold what was expected of it."
    return content, "" if content else f"{file.name} is empty."


def _changes(metrics: Sequence[Mapping[str, Any]]) -> list[Change]:
    changes = []
    for metric, name in FIGURES.items():
        for split, shown in (("eval", "held out"), ("train", "training")):
            points = series(metrics, metric, split)
            if points:
                (first_step, first), (last_step, last) = points[0], points[-1]
                changes.append(Change(name, shown, first_step, number(first), last_step, number(last)))
    return changes


def _evaluation(run: Run) -> dict[str, Any]:
    """The content of evaluation.json. Raises StorageError where it is no evaluation."""
    return Evaluation.of(run.read_json(run.evaluation_file), str(run.evaluation_file)).as_dict()


def _measured(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, estimate, and the same before, of what a table of the evaluation shows."""
    for figure in evaluation.get("figures", ()):
        yield figure["name"], figure["value"], figure["before"]
    for wins in evaluation.get("wins", ()):
        yield f"win rate against {wins['against']} by {wins['judge']}, percent", wins["win_rate"], None
    held_out, samples = evaluation.get("held_out"), evaluation.get("samples")
    if held_out:
        yield "accuracy on held-out pairs", held_out["accuracy"], None
    if samples:
        yield "KL from the reference, nats per response", samples["kl_per_response"], None
        yield "tokens of an answer", samples["policy"]["tokens"], (samples["reference"] or {}).get("tokens")


def _figure(name: str, found: Mapping[str, Any] | None, before: Mapping[str, Any] | None) -> Figure:
    value, low, high = ((found or {}).get(part) for part in ("value", "low", "high"))
    interval = f"{number(low)} to {number(high)}" if low is not None and high is not None else ""
    return Figure(name, "" if before is None else number(before["value"]), "" if value is None else number(value), interval)


def _samples(rows: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """Answers of samples.jsonl, those to the same prompt side by side: the n-th before with the n-th after."""
    answers: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        by_time = answers.setdefault(text(row.get("prompt", "")), {"before": [], "after": []})
        if row.get("when") in by_time:
            by_time[row["when"]].append(text(row.get("response", "")))
    found = []
    for prompt, by_time in answers.items():
        before, after = by_time["before"], by_time["after"]
        for at in range(max(len(before), len(after))):
            found.append(Sample(prompt, before[at] if at < len(before) else None, after[at] if at < len(after) else None))
    return found


def _compared(rows: Sequence[Any]) -> list[Sample]:
    """The first answers that an evaluation compared."""

    def first(row: Mapping[str, Any], side: str) -> str | None:
        said = dicts(row.get(side))
        return text(said[0].get("text", "")) if said else None

    return [Sample(text(row.get("prompt", "")), first(row, "reference"), first(row, "policy")) for row in dicts(rows)[:_SHOWN]]
