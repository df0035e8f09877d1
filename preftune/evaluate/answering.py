"""A model's answers to the prompts of a benchmark, each asked once and remembered: what was answered is not asked again.

>>> given = answers(asker, [(messages, 0.7), …], Drawing("mine", max_tokens=1024), replies=replies, ledger=Ledger())
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from preftune.asking.records import Answer, Asker, Failed, Ledger
from preftune.asking.replies import Replies, ask
from preftune.data.types import Message
from preftune.errors import ServerError
from preftune.sampling.responses import Plan, Way


class Drawing(NamedTuple):
    """How answers are drawn; as in `sampling.responses.Plan`. `temperature` None leaves it to the benchmark."""

    model: str
    temperature: float | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 1024
    seed: int = 0

    def plan(self, temperature: float) -> Plan:
        """The plan of one answer a prompt. Raises ConfigError for values out of range."""
        at = temperature if self.temperature is None else self.temperature
        return Plan((Way(self.model, at),), 1, self.top_p, self.min_p, self.max_tokens, (), self.seed)


def answers(
    asker: Asker,
    prompts: Sequence[tuple[tuple[Message, ...], float]],
    drawing: Drawing,
    *,
    replies: Replies,
    ledger: Ledger,
    max_cost: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """One answer to each (messages, temperature that the benchmark asks for), in their order.

    Raises ServerError where some have none: it says how many and why, and what was answered is remembered.
    """
    requests = [drawing.plan(temperature).request(messages, 0, place=asker.place) for messages, temperature in prompts]
    found: list[Answer | None] = [None] * len(requests)
    failed: Counter[str] = Counter()

    def keep(index: int, answer: Answer) -> bool:
        return bool(answer.text.strip())  # who said nothing may do better next time

    asked = ask(asker, requests, replies=replies, ledger=ledger, keep=keep, max_cost=max_cost)
    for n, (index, answer) in enumerate(asked, 1):
        on_progress(n, len(requests))
        if isinstance(answer, Failed):
            failed[answer.reason] += 1
        else:
            found[index] = answer
    if failed:
        reasons = "; ".join(f"{n} × {reason}" for reason, n in failed.most_common(3))
        raise ServerError(
            f"{drawing.model}: {failed.total()} of {len(requests)} prompts have no answer ({reasons}); the same command asks "
            "for what is missing alone"
        )
    return [answer for answer in found if answer is not None]
