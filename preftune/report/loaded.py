"""What a run's folder holds, read for the page: a file that is missing or damaged is said, and never stops the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from preftune.diagnose.finding import ORDER
from preftune.errors import PreftuneError, StorageError
from preftune.evaluate.record import Evaluation
from preftune.report.text import dicts, flat, text
from preftune.run import Run

_T = TypeVar("_T")


class Found(NamedTuple):
    """A finding as the page shows it."""

    name: str
    severity: str
    said: str
    remedy: str
    examples: list[dict[str, str]]


class Loaded(NamedTuple):
    """The files of one run. What is not there is empty, and `missing` says why, by the name of the field."""

    name: str
    run: Run
    metrics: list[dict[str, Any]]
    evaluation: Evaluation | None
    answers: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    findings: list[Found]
    checked: list[Found]  # what `preftune check --json` said of the data
    data: dict[str, Any]
    environment: dict[str, Any]
    events: list[tuple[str, str]]
    settings: str
    missing: dict[str, str]

    @property
    def values(self) -> dict[str, str]:
        """The settings by their dotted names; none where they cannot be read."""
        try:
            content = yaml.safe_load(self.settings)
        except yaml.YAMLError:
            return {}
        return dict(flat(content)) if isinstance(content, dict) else {}


def load(run: Run, name: str) -> Loaded:
    """Reads what the page shows of a run."""
    missing: dict[str, str] = {}

    def part(name: str, file: Path, get: Callable[[], Any], kind: type[_T]) -> _T:
        content, missing[name] = _content(file, get, kind)
        return content

    def json(name: str, file: Path) -> dict[str, Any]:
        return part(name, file, lambda: run.read_json(file), dict)

    recorded = json("evaluation", run.evaluation_file)
    evaluation = None
    if recorded:
        try:
            evaluation = Evaluation.of(recorded)
        except StorageError as error:
            missing["evaluation"] = str(error)
    return Loaded(
        name=name,
        run=run,
        metrics=dicts(part("metrics", run.metrics_file, run.metrics, list)),
        evaluation=evaluation,
        answers=dicts(part("answers", run.answers_file, run.answers, list)),
        samples=dicts(part("samples", run.samples_file, run.samples, list)),
        findings=_findings(json("findings", run.diagnosis_file)),
        checked=_findings(json("checked", run.check_file)),
        data=json("data", run.data_file),
        environment=json("environment", run.env_file),
        events=[
            (text(row.get("kind", "")), text(row.get("message", "")))
            for row in dicts(part("events", run.events_file, run.events, list))
        ],
        settings=part("settings", run.config_file, run.config_file.read_text, str).strip(),
        missing=missing,
    )


def names_of(runs: Sequence[Run]) -> list[str]:
    """The name of each run's folder, with as many of the folders above it as tell the runs apart."""
    paths = [run.path.resolve().parts for run in runs]
    names = ["/".join(parts[-1:]) for parts in paths]
    depth = 1
    while len(set(names)) < len(names) and depth < max(map(len, paths)):
        depth += 1
        names = ["/".join(parts[-depth:]) for parts in paths]
    return names


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


def _findings(content: dict[str, Any]) -> list[Found]:
    found = []
    for row in dicts(content.get("findings")):
        severity = row.get("severity")
        examples = [{name: text(one.get(name, "")) for name in ("place", "text")} for one in dicts(row.get("examples"))]
        said = [text(row.get(name, "")) for name in ("name", "said", "remedy")]
        found.append(Found(said[0], severity if severity in ORDER else "note", said[1], said[2], examples))
    return found
