"""What a model answers by itself: drawn at temperature 1 to held-out prompts, and what those answers look like.

ours = draw(policy.model, renderer, prompts, Sampling(n=2, seed=0))
looks(ours).tokens            # 48.3 [45.1, 51.5]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.data.similarity import distinct
from preftune.data.template import Renderer
from preftune.data.types import Example
from preftune.data.write import plain
from preftune.errors import DataError
from preftune.evaluate.estimate import mean, ratio, share
from preftune.evaluate.kl import KL, TokenKL
from preftune.evaluate.record import Answers, Samples
from preftune.generate import Reply, Sampling, sample
from preftune.model.compile import eager

_REPEATED = 4  # tokens that are said again


class Drawn(NamedTuple):
    """A model's answers, [prompt][reply]."""

    prompts: list[NDArray[np.int32]]
    replies: list[list[Reply]]
    texts: list[list[str]]


def draw(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[NDArray[np.int32]],
    sampling: Sampling,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Drawn:
    """Answers to prompts as ids. Raises DataError for a prompt that leaves no room to answer."""
    with eager(model):
        replies = sample(
            model, prompts, sampling, stop_ids=renderer.stop_ids, pad_id=renderer.end_of_turn, on_progress=on_progress
        )
    return Drawn(list(prompts), replies, [[renderer.decode(r.ids) for r in answers] for answers in replies])


def looks(drawn: Drawn) -> Answers:
    """Length, variety and endings of the answers. Raises DataError where there are none."""
    texts = [text for answers in drawn.texts for text in answers]
    if not texts:
        raise DataError("there is no answer to look at: no prompt was answered")
    return Answers(
        tokens=mean([[float(len(r.ids)) for r in replies] for replies in drawn.replies]),
        characters=mean([[float(len(text)) for text in answers] for answers in drawn.texts]),
        ended=share([[float(r.ended) for r in replies] for replies in drawn.replies]),
        repetition=mean([[_repetition(r.ids) for r in replies] for replies in drawn.replies]).not_negative(),
        distinct_1=distinct(texts, 1) or 0.0,
        distinct_2=distinct(texts, 2) or 0.0,
        unique=len(set(texts)) / len(texts),
        logp_per_token=ratio(
            [[float(r.logp.sum()) for r in replies] for replies in drawn.replies],
            [[float(len(r.ids)) for r in replies] for replies in drawn.replies],
        ),
    )


def record(ours: Drawn, theirs: Drawn | None, kl: KL | None, sampling: Sampling, *, beta: float | None) -> Samples:
    """The record of the answers of a policy, and of the reference to the same prompts where there is one."""
    reward = None
    if kl is not None and beta is not None:
        reward = mean([[beta * float(reply.log_ratio.sum()) for reply in replies] for replies in kl.tokens])
    return Samples(
        n_prompts=len(ours.prompts),
        n_per_prompt=sampling.n,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        kl_per_response=None if kl is None else kl.per_response,
        kl_per_token=None if kl is None else kl.per_token,
        implicit_reward=reward,
        policy=looks(ours),
        reference=None if theirs is None else looks(theirs),
    )


def rows(
    examples: Sequence[Example], renderer: Renderer, ours: Drawn, theirs: Drawn | None, kl: KL | None
) -> Iterator[dict[str, Any]]:
    """Rows of answers.jsonl, a prompt each; `preference` is null until somebody judges."""
    for i, example in enumerate(examples):
        compared: Sequence[TokenKL | None] = kl.tokens[i] if kl is not None else [None] * len(ours.replies[i])
        yield {
            "id": example.id,
            "prompt": plain(example.prompt),
            "policy": [
                _answer(text, reply)
                | {
                    "pieces": renderer.pieces(ours.prompts[i], reply.ids),
                    "log_ratios": [] if moved is None else [round(float(x), 5) for x in moved.log_ratio],
                }
                for text, reply, moved in zip(ours.texts[i], ours.replies[i], compared, strict=True)
            ],
            "reference": []
            if theirs is None
            else [_answer(text, reply) for text, reply in zip(theirs.texts[i], theirs.replies[i], strict=True)],
            "preference": None,
        }


def _answer(text: str, reply: Reply) -> dict[str, Any]:
    return {"text": text, "n_tokens": len(reply.ids), "ended": reply.ended}


def _repetition(ids: NDArray[np.int32]) -> float:
    """Share of the runs of four tokens that stood in the same answer before; 0 for a shorter answer."""
    grams = [tuple(ids[k : k + _REPEATED].tolist()) for k in range(len(ids) - _REPEATED + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
