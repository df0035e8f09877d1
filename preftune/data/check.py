"""What training would make of a preference file: counts, what is dropped and why, and one example as the model sees it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from preftune.data.read import read_examples
from preftune.data.template import Renderer, build_trees
from preftune.data.types import Example


@dataclass
class Check:
    """The counts and the rendered example of one data set."""

    rows_read: int
    used: int
    quarantined: int
    prompts: int
    pairs: int
    labelled: int
    responses: int
    turns: dict[int, int]  # messages in the prompt -> examples; 0 for text prompts
    longer_chosen: float | None  # fraction of pairs whose chosen response has more characters; None without pairs
    notes: list[str] = field(default_factory=list)
    tokens: dict[str, Any] = field(default_factory=dict)
    example: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """For a terminal."""
        lines = [*self.notes]
        lines.append(f"{self.rows_read} rows: {self.used} examples of {self.prompts} prompts, {self.quarantined} quarantined")
        lines.append(f"{self.pairs} preferences, {self.labelled} labelled responses, {self.responses} responses")
        if self.longer_chosen is not None:
            lines.append(f"the chosen response is the longer one in {self.longer_chosen:.1%} of the preferences")
        if self.example:
            lines += ["", "One example as the model sees it; ⟦scored tokens⟧ are those that the loss counts:", self.example]
        return "\n".join(lines)


def inspect(
    data: Any,
    *,
    renderer: Renderer | None = None,
    format: str = "auto",
    quarantine: Path | None = None,
) -> Check:
    """Reads `data` as training would, and with a renderer tokenizes it too. Raises DataError, ConfigError."""
    source = read_examples(data, format=format, quarantine=quarantine)
    examples = source.examples
    found = Check(
        rows_read=source.n_read,
        used=len(examples),
        quarantined=source.n_quarantined,
        prompts=len({e.prompt_key for e in examples}),
        pairs=sum(len(e.pairs) for e in examples),
        labelled=sum(label is not None for e in examples for label in e.labels),
        responses=sum(len(e.responses) for e in examples),
        turns=dict(sorted(Counter(0 if isinstance(e.prompt, str) else len(e.prompt) for e in examples).items())),
        longer_chosen=_longer_chosen(examples),
        notes=list(source.notes),
    )
    if renderer is not None:
        _tokenized(found, examples, renderer)
    return found


def _longer_chosen(examples: list[Example]) -> float | None:
    lengths = [[len(r) if isinstance(r, str) else sum(len(m.content) for m in r) for r in e.responses] for e in examples]
    longer = [n[p.winner] > n[p.loser] for e, n in zip(examples, lengths, strict=True) for p in e.pairs]
    return sum(longer) / len(longer) if longer else None


def _tokenized(found: Check, examples: list[Example], renderer: Renderer) -> None:
    trees = build_trees(examples, renderer)
    found.notes += [*renderer.describe(), *renderer.report.lines()]
    found.tokens = {k: v for k, v in asdict(renderer.report).items() if k != "dropped"} | {
        "dropped": len(renderer.report.dropped)
    }
    found.example = renderer.render(trees[0])
