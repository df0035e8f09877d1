"""Who judges a policy's answers in an evaluation, in plain words: language models, a reward model, or a rule.

judge = Who("rule", ("my.py:short",)).judge()
evaluate(models, settings, judge=judge)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preftune.asking.askers import Askers
from preftune.asking.records import Ledger
from preftune.asking.replies import Replies
from preftune.data.types import Example
from preftune.evaluate.own_answers import Judge
from preftune.files import default_cache
from preftune.label.job import Job
from preftune.label.opened import judges_of, scored_by
from preftune.model.load import resolve
from preftune.userfile import user_function

By = Literal["llm", "reward", "rule"]


@dataclass(frozen=True)
class Who:
    """Who judges.

    by, names:      language models (one or more), a reward model, or the rule FILE.py:FUNCTION.
    base_url:       server of the language models; None: they are on this machine.
    concurrency, retries, timeout: of the server.
    template, template_name: what they are asked; None: our own words, for `rubric`.
    replies:        file of remembered replies; None: the one that all runs share.
    max_cost:       ask nothing that could bring the cost above it; prices are the ledger's.
    device:         of a model on this machine.
    seed:           of the orders in which two answers are shown, where both are not.
    """

    by: By
    names: tuple[str, ...]
    base_url: str | None = None
    concurrency: int = 8
    retries: int = 6
    timeout: float = 120.0
    template: Path | None = None
    template_name: str | None = None
    rubric: str = "helpfulness"
    replies: Path | None = None
    max_cost: float | None = None
    device: str = "auto"
    seed: int = 0

    def judge(
        self,
        ledger: Ledger | None = None,
        *,
        on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> Judge:
        """Judges what it is given. ledger: where what was asked is counted.

        Raises ConfigError and ModelError at once where a rule, or a model on this machine, is not there.
        """
        if self.by == "rule":
            user_function(self.names[0], what="a rule")
        elif self.base_url is None:
            for name in self.names:
                resolve(name)
        books = Ledger() if ledger is None else ledger

        def judge(examples: Sequence[Example], file: Path) -> list[str]:
            with Replies(self.replies or default_cache() / "replies.sqlite") as replies:
                job = Job(examples, file, replies, books, seed=self.seed, max_cost=self.max_cost, on_progress=on_progress)
                if self.by == "llm":
                    return self._by_models(job, replies, books)
                scores = scored_by(self.by, self.names[0], examples, device=self.device, on_progress=on_progress)
                return [one.annotator for one in job.by_scores(scores).annotators]

        return judge

    def _by_models(self, job: Job, replies: Replies, books: Ledger) -> list[str]:
        with Askers(
            self.base_url, concurrency=self.concurrency, retries=self.retries, timeout=self.timeout, device=self.device
        ) as askers:
            judges = judges_of(
                self.names, askers, replies, books, template=self.template, template_name=self.template_name,
                rubric=self.rubric, max_cost=self.max_cost,
            )  # fmt: skip
            job.by_models(judges)
            return [one.annotator for one in judges]
