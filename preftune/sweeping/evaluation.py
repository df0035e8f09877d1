"""How the runs of a sweep are evaluated: as `preftune eval` does it, all against the same reference and by the same judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from preftune.data.types import Example
from preftune.errors import ConfigError, nearest
from preftune.evaluate.job import Settings, evaluate
from preftune.evaluate.judge import By, Who
from preftune.evaluate.models import Models
from preftune.label.opened import scored_by
from preftune.label.scored import Scored
from preftune.run import Run
from preftune.userfile import user_function

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class How:
    """How each run is evaluated.

    against:      the reference; None: each run's own, which is the same for all unless the sweep varies it.
    prompts:      most held-out prompts that are answered; 0: none, and there is no KL.
    per_prompt:   answers to each.
    max_tokens:   longest answer.
    texts:        files whose perplexity is measured.
    by:           who judges first answers against the reference's: a language model, a reward model, a rule; None: nobody.
    judge:        its name: of a model, of a model's folder, or FILE.py:FUNCTION.
    base_url:     server of a language model that judges; None: a local one.
    rubric:       what it is told to look for.
    best_of:      also measure the best of so many answers of the reference, for each number; needs a judge that gives scores.
    seed:         of prompts and answers.
    """

    against: str | None = None
    prompts: int = 128
    per_prompt: int = 2
    max_tokens: int = 256
    texts: tuple[str, ...] = ()
    by: By | None = None
    judge: str | None = None
    base_url: str | None = None
    rubric: str = "helpfulness"
    best_of: tuple[int, ...] = ()
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for what does not go together, and for a rule that is not there."""
        if (self.by is None) != (self.judge is None):
            raise ConfigError(
                "--by and a judge belong together: --by rule FILE.py:FUNCTION, --by reward MODEL, --judge-model NAME"
            )
        if self.by != "llm" and (self.base_url is not None or self.rubric != How.rubric):
            raise ConfigError("--base-url and --rubric: only a language model is asked; name one with --judge-model")
        if self.by is not None and not self.prompts:
            raise ConfigError("--prompts 0: a judge compares answers, and none would be written")
        if self.best_of and self.by not in ("rule", "reward"):
            raise ConfigError("--best-of: keeps the answer that scores best: --by rule or --by reward gives scores")
        if bad := [n for n in self.best_of if n < 1]:
            raise ConfigError(f"--best-of {bad[0]}: expected numbers of answers, 1 or more")
        if self.by == "rule":
            user_function(str(self.judge), what="a rule")


def how_of(given: Mapping[str, Any]) -> How:
    """The same from plain values, valid from any folder. Raises ConfigError."""
    if unknown := sorted(set(given) - {f.name for f in fields(How)}):
        raise ConfigError(f"evaluation: {unknown[0]}: {nearest(unknown[0], [f.name for f in fields(How)])}")
    lists = {"texts": tuple(_whole(text) for text in given.get("texts", ())), "best_of": tuple(given.get("best_of", ()))}
    how = How(**{**given, **lists})
    how.check()
    file, colon, function = (how.judge or "").rpartition(":") if how.by == "rule" else (how.judge or "", "", "")
    judge = _whole(file) + colon + function if how.by in ("rule", "reward") else how.judge
    return replace(how, judge=judge, against=how.against and _whole(how.against))


def _whole(place: str) -> str:
    """A path that exists, whole; other names as they are."""
    path = Path(place).expanduser()
    return str(path.resolve()) if path.exists() else place


def evaluate_run(run: Run, how: How, *, device: str, precision: str, on_progress: Progress) -> None:
    """Writes the run's evaluation.json and answers.jsonl. What is finished of it is not measured again."""
    models = Models.open(str(run.path), against=how.against, device=device, precision=precision)
    texts = tuple(Path(file) for file in how.texts)
    settings = Settings(prompts=how.prompts, per_prompt=how.per_prompt, max_tokens=how.max_tokens, seed=how.seed, texts=texts)
    judge = None
    if how.by is not None:
        who = Who(how.by, (str(how.judge),), base_url=how.base_url, rubric=how.rubric, device=device, seed=how.seed)
        judge = who.judge(on_progress=on_progress)
    evaluate(models, settings, judge=judge, on_progress=on_progress)


def scored(how: How, examples: Sequence[Example], device: str, on_progress: Progress) -> list[Scored]:
    """Scores of all responses by the rule or the reward model. Raises ConfigError where a language model judges."""
    if how.by is None or how.by == "llm":
        raise ConfigError("--best-of: keeps the answer that scores best: --by rule or --by reward gives scores")
    return scored_by(how.by, str(how.judge), examples, device=device, on_progress=on_progress)
