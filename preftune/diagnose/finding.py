"""What one check of data, or of a run, has found: how bad it is, the numbers, places to look at, and what to do.

    >>> Finding("duplicates", "warning", "3 of 400 preferences are copies", remedy="leave them out (--fix)")

Severities: "error", training on this as it is would go wrong; "warning", it would be worse than it need be; "note", worth
knowing; "ok", looked at and found to be in order; "skipped", not looked at, and the sentence says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from preftune.errors import printable
from preftune.evaluate.record import plain

if TYPE_CHECKING:
    from rich.console import Console

Severity = Literal["error", "warning", "note", "ok", "skipped"]

ORDER: tuple[Severity, ...] = ("error", "warning", "note", "ok", "skipped")
"""From worst to least."""

N_EXAMPLES = 3
"""Places that a finding names."""


class Evidence(NamedTuple):
    """One place to look at: `file:line`, and what stands there, short."""

    place: str
    text: str


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    name:      that of its function.
    said:      one sentence with the numbers that matter.
    remedy:    what to do; "" where there is nothing to do.
    numbers:   name -> value, for scripts; shares are fractions, intervals `[low, high]` at 95 %.
    examples:  a few places to look at.
    drop:      indices of units (`Corpus.units`) that a cleaned file would leave out.
    """

    name: str
    severity: Severity
    said: str
    remedy: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[Evidence, ...] = ()
    drop: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that it cannot say, such as the ends of an interval of one prompt, are null."""
        return {
            "name": self.name,
            "severity": self.severity,
            "said": self.said,
            "remedy": self.remedy,
            "numbers": plain(self.numbers),
            "examples": [one._asdict() for one in self.examples],
            "n_dropped_by_fix": len(self.drop),
        }


def skipped(name: str, why: str) -> Finding:
    """A check that could not look."""
    return Finding(name, "skipped", why)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """By severity; those of one severity in the order in which they came."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.severity))


def excerpt(text: str, longest: int = 160) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def summary_of(findings: Iterable[Finding]) -> str:
    """How many findings of each severity."""
    n = Counter(finding.severity for finding in findings)
    bad = [f"{n[s]} {s}{'s'[: n[s] != 1]}" for s in ORDER[:3] if n[s]]
    return f"{', '.join(bad) or 'nothing found'}; {n['ok']} checks in order, {n['skipped']} skipped"


def show_findings(console: Console, findings: Iterable[Finding], *, everything: bool = False) -> None:
    """For a terminal: what was found, what to do about it, and where to look; the quiet ones only if `everything`."""
    from rich import markup
    from rich.table import Table

    def escape(text: str) -> str:
        return markup.escape(printable(text))

    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        if everything or finding.severity not in ("ok", "skipped"):
            table.add_row(f"[{_STYLES[finding.severity]}]{finding.severity}", f"[bold]{finding.name}", escape(finding.said))
            if finding.remedy:
                table.add_row("", "", f"[italic]→ {escape(finding.remedy)}")
            for one in finding.examples:
                table.add_row("", "", f"[dim]{escape(Path(one.place).name)}: {escape(one.text)}")
    if table.rows:
        console.print(table)


_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan", "ok": "green", "skipped": "dim"}
