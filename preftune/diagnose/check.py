"""Everything that can be said of a data set before a GPU hour is spent on it: counts, findings, and one example as it is read.

    >>> found = inspect("pairs.jsonl")
    >>> found.summary
    '1 error, 2 warnings, 1 note; 20 checks in order, 4 skipped'

Each finding is a function of the registry CHECKS. Nothing is changed; `preftune.diagnose.clean` writes a cleaned copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.data.read import Dataset, read_examples
from preftune.data.template import Renderer, build_trees
from preftune.data.types import Judgment
from preftune.diagnose.corpus import Corpus, Scored
from preftune.diagnose.finding import Finding, show_findings, summary_of, worst_first
from preftune.diagnose.leakage import read_benchmark
from preftune.errors import ConfigError, nearest, printable
from preftune.registry import CHECKS

if TYPE_CHECKING:
    from rich.console import Console

Auditor = Callable[[Corpus], Sequence[Judgment]]
"""Has a sample of a corpus judged (`diagnose.audit.audited`)."""

Scorer = Callable[[Corpus], Scored]
"""Gives the log-probs of a corpus under a model (`diagnose.reference.scorer`)."""


@dataclass(frozen=True)
class Check:
    """What was found in one data set.

    counts:    rows_read = used + quarantined; prompts, pairs, labelled, responses; turns: messages in the prompt -> examples.
    findings:  worst first.
    example:   one example as the model sees it; "" without a model.
    """

    counts: dict[str, Any]
    notes: list[str]
    findings: list[Finding]
    corpus: Corpus
    tokens: dict[str, Any]
    example: str

    @property
    def summary(self) -> str:
        """How many findings of each severity."""
        return summary_of(self.findings)

    @property
    def n_errors(self) -> int:
        """Findings of severity error."""
        return sum(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.counts,
            "notes": self.notes,
            "findings": [finding.as_dict() for finding in self.findings],
            "tokens": self.tokens,
            "example": self.example,
        }

    def show(self, console: Console, *, everything: bool = False) -> None:
        """For a terminal: counts, a table of what was found, what to do about each, and the example."""
        from rich import markup

        def escape(text: str) -> str:
            return markup.escape(printable(text))

        for note in self.notes:
            console.print(escape(note), soft_wrap=True)
        c = self.counts
        console.print(f"{c['rows_read']} rows: {c['used']} examples of {c['prompts']} prompts, {c['quarantined']} set aside")
        console.print(f"{c['pairs']} preferences, {c['labelled']} labelled responses, {c['responses']} responses")
        show_findings(console, self.findings, everything=everything)
        console.print(f"[bold]{self.summary}")
        if self.example:
            console.print("\nOne example as the model sees it; ⟦scored tokens⟧ are those that the loss counts:")
            console.print(escape(self.example), highlight=False)


def inspect(
    data: Any,
    *,
    renderer: Renderer | None = None,
    score: Scorer | None = None,
    against: Sequence[str] = (),
    judged: Sequence[Judgment] = (),
    auditor: Auditor | None = None,
    only: Sequence[str] = (),
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    quarantine: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Check:
    """Reads `data` as training would and runs every check on it, or those that `only` names.

    renderer:  also tokenize; `score`: also ask a model how likely the data are; `against`: files that must not be in the data.
    judged:    verdicts of a judge or of people on some of the examples; `auditor`: has more of them made.

    Bad rows are a finding, unless no row can be used. Raises DataError, ConfigError.
    """
    for name in only:
        if name not in CHECKS:
            raise ConfigError(f"--only {name}: no such check; {nearest(name, CHECKS)}")
    say = on_progress or (lambda text: None)
    say("reading")
    source = read_examples(data, format=format, fields=fields, quarantine=quarantine, stop=False)
    notes, tokens, example = list(source.notes), {}, ""
    if renderer is not None:
        say("tokenizing")
        trees = build_trees(source.examples, renderer)
        notes += [*renderer.describe(), *renderer.report.lines()]
        tokens = asdict(renderer.report) | {"dropped": len(renderer.report.dropped)}
        example = renderer.render(trees[0])
    corpus = Corpus(
        source.examples,
        source.bad,
        against=[read_benchmark(file) for file in against],
        report=renderer.report if renderer else None,
        judged=judged,
    )
    if score is not None:
        say("asking the model")
        corpus = replace(corpus, scored=score(corpus))
    if auditor is not None:
        say("asking the judge")
        corpus = replace(corpus, judged=[*judged, *auditor(corpus)])
    findings = []
    for name in only or CHECKS:
        say(name)
        findings.append(CHECKS[name](corpus))
    return Check(_counts(source), notes, worst_first(findings), corpus, tokens, example)


def _counts(source: Dataset) -> dict[str, Any]:
    examples = source.examples
    return {
        "rows_read": source.n_read,
        "used": len(examples),
        "quarantined": source.n_quarantined,
        "prompts": len({e.prompt_key for e in examples}),
        "pairs": sum(len(e.pairs) for e in examples),
        "labelled": sum(label is not None for e in examples for label in e.labels),
        "responses": sum(len(e.responses) for e in examples),
        "turns": dict(sorted(Counter(0 if isinstance(e.prompt, str) else len(e.prompt) for e in examples).items())),
    }
