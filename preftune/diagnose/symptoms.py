"""What a run's own files say of it: whether it worked, why not, and what to do.

    >>> found = diagnose(Run.open("runs/first"))
    >>> found.summary
    '1 error, 1 warning; 12 checks in order, 4 skipped'

Each finding is a function of the registry SYMPTOMS from a Case to one Finding. Files are read, nothing is trained or sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preftune.diagnose.case import Case
from preftune.diagnose.finding import Finding, show_findings, summary_of, worst_first
from preftune.errors import ConfigError, nearest
from preftune.registry import SYMPTOMS
from preftune.run import Run

if TYPE_CHECKING:
    from rich.console import Console

LIVE = ("reference_mismatch", "no_effect", "spikes", "lost_updates", "trivial_pairs", "overfitting", "drifted", "displacement")
"""Findings that metrics alone make certain, so that they can be told while a run goes on."""

LOUD = ("error", "warning")


@dataclass(frozen=True)
class Diagnosis:
    """What was found in a run, worst first. `at` is when, UTC."""

    findings: list[Finding]
    at: str

    @property
    def summary(self) -> str:
        """How many findings of each severity."""
        return summary_of(self.findings)

    @property
    def n_errors(self) -> int:
        """Findings of severity error."""
        return sum(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the content of diagnosis.json."""
        return {"at": self.at, "findings": [finding.as_dict() for finding in self.findings]}

    def show(self, console: Console, *, everything: bool = False) -> None:
        """For a terminal: what was found, and what to do about each."""
        show_findings(console, self.findings, everything=everything)
        console.print(f"[bold]{self.summary}")


def diagnose(run: Run, *, only: Sequence[str] = (), on_progress: Callable[[str], None] = lambda text: None) -> Diagnosis:
    """Reads the run and writes what was found into its diagnosis.json, unless `only` asked for some findings alone.

    Raises ConfigError for a name in `only` that there is not, StorageError for files that cannot be read or written.
    """
    for name in only:
        if name not in SYMPTOMS:
            raise ConfigError(f"--only {name}: no such finding; {nearest(name, SYMPTOMS)}")
    on_progress("reading")
    case = Case.of(run)
    findings = []
    for name in only or SYMPTOMS:
        on_progress(name)
        findings.append(SYMPTOMS[name](case))
    found = Diagnosis(worst_first(findings), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    if not only:
        run.write_json(run.diagnosis_file, found.as_dict())
    return found


class Watch:
    """Tells of a run what its metrics make certain, while it goes on: each finding once, when it becomes true."""

    def __init__(self, run: Run, *, step: int = 0) -> None:
        """`run` goes on at `step`: what was logged before is read, and what was said before is not said again."""
        self.run = run
        self._case = replace(Case.of(run), evaluation=None, finished=False)
        self._train, self._held_out = (
            [r for r in rows if r["step"] < step] for rows in (self._case.train, self._case.held_out)
        )
        said = (event["message"] for event in run.events() if event["kind"] == "diagnosis")
        self._told = {message.split(":", 1)[0] for message in said}

    def step(self, row: Mapping[str, Any]) -> None:
        """Takes in the metrics of a step."""
        self._train.append(row)

    def evaluated(self, row: Mapping[str, Any]) -> list[Finding]:
        """Takes in metrics on held-out examples; what they make certain for the first time."""
        self._held_out.append(row)
        case = replace(self._case, train=self._train, held_out=self._held_out)
        new = []
        for name in LIVE:
            finding = SYMPTOMS[name](case)
            if finding.severity in LOUD and name not in self._told:
                self._told.add(name)
                new.append(finding)
        return new
