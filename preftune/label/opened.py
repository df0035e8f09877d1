"""Whoever judges, opened by the words that name them: language models with their templates, a reward model, a rule.

judges = judges_of(["judge-1"], askers, replies, Ledger(), rubric="honesty")
scores = scored_by("rule", "my.py:short", examples)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from preftune.asking.askers import Askers
from preftune.asking.records import Asker, Ledger
from preftune.asking.replies import Replies
from preftune.data.types import Example
from preftune.label.forms import best_form
from preftune.label.judge import Judge
from preftune.label.rule import score_by_rule
from preftune.label.scored import Scored
from preftune.label.template import Kind, Templates, open_template, own_template
from preftune.userfile import user_function


def judges_of(
    names: Sequence[str],
    askers: Askers,
    replies: Replies,
    ledger: Ledger,
    *,
    kind: Kind = "pair",
    template: Path | None = None,
    template_name: str | None = None,
    labels: str | None = None,
    rubric: str = "helpfulness",
    reply: str = "auto",
    temperature: float = 0.0,
    max_tokens: int | None = None,
    max_cost: float | None = None,
    asks: bool = True,
) -> list[Judge]:
    """The judges of these names: by the user's template, or by ours in the form asked for, which "auto" finds out."""

    def templates(asker: Asker, name: str) -> Templates:
        if template is not None:
            words = [label.strip() for label in labels.split(",")] if labels else ()
            return open_template(template, name=template_name, labels=words)
        if reply != "auto":
            return own_template(kind, rubric=rubric, reply=reply)
        return best_form(
            asker, name, kind, rubric=rubric, replies=replies, ledger=ledger, max_tokens=max_tokens, max_cost=max_cost,
            asks=asks,
        )  # fmt: skip

    found = []
    for name in names:
        asker = askers.of(name)
        found.append(Judge(asker, name, templates(asker, name), temperature, max_tokens))
    return found


def scored_by(
    by: Literal["reward", "rule"],
    name: str,
    examples: Sequence[Example],
    *,
    template: str | None = None,
    device: str = "auto",
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Scored]:
    """Scores of all responses by the reward model `name` (template, device: its own), or by the rule FILE.py:FUNCTION."""
    if by == "rule":
        return score_by_rule(examples, user_function(name, what="a rule"))

    from preftune.label.reward import score_by_reward  # torch, which others do without

    def count(done: int, total: int) -> None:
        on_progress(name, done, total)

    return score_by_reward(examples, name, template=template, device=device, on_progress=count)
