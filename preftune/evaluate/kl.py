"""KL(policy‖reference) on the policy's own samples, in nats, with how far each sampled token's log-prob has moved.

    trees = trees_of(prompts, replies)                  # drawn at temperature 1, nothing truncated
    divergence(policy, reference, trees).per_response   # 8.7 [8.2, 9.2]

At each sampled prefix the KL of the two next-token distributions is computed over the whole vocabulary, and these are summed
over the reply. By the chain rule the mean of that sum is

    KL = E_{y ~ policy} Σ_{t ≤ |y|} KL(policy(· | x, y_<t) ‖ reference(· | x, y_<t)),

so the estimate is unbiased; no term is negative, and it varies less than the mean of log π(y|x)/π_ref(y|x), whose noise of
the drawn token it averages out (the Rao-Blackwellised estimator of Amini, Vieira & Cotterell 2025, arXiv 2504.10637). A reply
ends with a stop token, which is one of its tokens, or at `max_tokens`: what is estimated is the KL between the distributions of
replies that are cut there. What either model would do beyond is no part of it, so a larger `max_tokens` can only raise it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from preftune.data.types import Branch, Tree
from preftune.engine.distribution import compare
from preftune.engine.policy import Policy
from preftune.engine.score import by_length
from preftune.errors import ModelError
from preftune.evaluate.estimate import Estimate, mean, ratio
from preftune.generate import Reply


class TokenKL(NamedTuple):
    """Of one reply, for each of its tokens."""

    kl: NDArray[np.float64]  # [L] nats, at the prefix before the token
    log_ratio: NDArray[np.float64]  # [L] log π − log π_ref of the token that was drawn, nats


class KL(NamedTuple):
    """The divergence for a whole reply and for one token of it, and what both are made of, as [prompt][reply]."""

    per_response: Estimate
    per_token: Estimate
    tokens: list[list[TokenKL]]


def trees_of(prompts: Sequence[NDArray[np.int32]], replies: Sequence[Sequence[Reply]]) -> list[Tree]:
    """One tree a prompt, with the replies that were sampled for it as branches. [prompt][reply]."""
    return [
        Tree(str(i), prompt, tuple(Branch(r.ids, np.ones(len(r.ids), np.bool_)) for r in answers))
        for i, (prompt, answers) in enumerate(zip(prompts, replies, strict=True))
    ]


def divergence(policy: Policy, reference: Policy, trees: Sequence[Tree], *, budget: int = 8192) -> KL:
    """The KL of replies y ~ policy that were drawn at temperature 1 without truncation: of others it is none.

    trees: prompts with the policy's own replies (`trees_of`). budget: tokens in one forward pass. Raises ModelError where the
    two models do not speak of the same tokens.
    """
    return summed(compare_all(policy, reference, trees, budget=budget))


def summed(tokens: list[list[TokenKL]]) -> KL:
    """The divergence of replies, [prompt][reply]; an interval cannot reach below 0."""
    sums = [[float(reply.kl.sum()) for reply in replies] for replies in tokens]
    lengths = [[float(len(reply.kl)) for reply in replies] for replies in tokens]
    return KL(mean(sums).not_negative(), ratio(sums, lengths).not_negative(), tokens)


def compare_all(
    policy: Policy,
    reference: Policy,
    trees: Sequence[Tree],
    *,
    budget: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[list[TokenKL]]:
    """Of every reply what its tokens are under both models, [prompt][reply]; `on_progress` counts prompts."""
    found: dict[int, list[TokenKL]] = {}
    lengths = [max(policy.tokens_read(t), reference.tokens_read(t)) for t in trees]
    for group in by_length(range(len(trees)), lengths, budget):
        found.update(zip(group, _compared(policy, reference, [trees[i] for i in group]), strict=True))
        on_progress(len(found))
    return [found[i] for i in range(len(trees))]


@torch.inference_mode()
def _compared(policy: Policy, reference: Policy, trees: Sequence[Tree]) -> list[list[TokenKL]]:
    ours, theirs = (model.pack(trees) for model in (policy, reference))
    p, q = policy.predictions(ours), reference.predictions(theirs)
    if p.n_vocabulary != q.n_vocabulary:
        raise ModelError(
            f"the policy chooses among {p.n_vocabulary} tokens and the reference among {q.n_vocabulary}: there is no KL "
            "between them; compare with a model of the same vocabulary"
        )
    kl, logp, ref_logp = (x.double().cpu().numpy() for x in compare(p, q, ours.target))
    edges = np.cumsum(ours.n_scored.cpu().numpy())[:-1]
    parts = iter(map(TokenKL, np.split(kl, edges), np.split(logp - ref_logp, edges)))
    return [[next(parts) for _ in tree.branches] for tree in trees]
