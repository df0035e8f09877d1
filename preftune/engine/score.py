"""Many trees through a frozen model: longest first, packed under a budget of tokens, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from preftune.data.types import Tree
from preftune.engine.policy import Policy

Logps = list[NDArray[np.floating]]
"""Per response of a tree the log-probs of its scored tokens, in nats."""


def score_all(policy: Policy, trees: Sequence[Tree], *, budget: int) -> Iterator[tuple[list[int], list[Logps]]]:
    """(indices of trees, their log-probs) batch by batch, the longest trees first: what does not fit fails at once."""
    lengths = [policy.tokens_read(t) for t in trees]
    for group in by_length(range(len(trees)), lengths, budget):
        yield group, score(policy, [trees[i] for i in group])


def logps_of_all(
    policy: Policy, trees: Sequence[Tree], budget: int, *, on_progress: Callable[[int], None] | None = None
) -> list[Logps]:
    """Log-probs of all trees, in their order; `on_progress` is told how many are done."""
    found: dict[int, Logps] = {}
    for group, scored in score_all(policy, trees, budget=budget):
        found.update(zip(group, scored, strict=True))
        if on_progress:
            on_progress(len(found))
    return [found[i] for i in range(len(trees))]


def score(policy: Policy, trees: Sequence[Tree]) -> list[list[NDArray[np.floating]]]:
    """Per tree and response the log-probs of the scored tokens, in nats, without gradients and without dropout."""
    was_training = policy.training
    policy.eval()
    try:
        with torch.inference_mode():
            batch = policy.pack(trees)
            flat = policy(batch).cpu().numpy()
    finally:
        policy.train(was_training)
    parts = iter(np.split(flat, np.cumsum(batch.n_scored.cpu().numpy())[:-1]))
    return [[next(parts) for _ in tree.branches] for tree in trees]


def by_length(items: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """`items` in groups of about equal length under `budget` tokens, longest first; `lengths` is indexed by item."""
    order = sorted(items, key=lambda i: -lengths[i])
    return groups(order, [lengths[i] for i in order], budget)


def groups(items: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive items under `budget` tokens; an item longer than the budget stands alone."""
    group: list[int] = []
    n = 0
    for item, length in zip(items, lengths, strict=True):
        if group and n + length > budget:
            yield group
            group, n = [], 0
        group.append(item)
        n += length
    if group:
        yield group
