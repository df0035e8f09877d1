"""Which examples make which step, and how a step is cut. Sees lengths only, so it scales to millions of examples.

The order of an epoch comes from (seed, epoch) alone. A step is the next `pairs_per_step` examples of it; how the step is cut
into micro-batches and ranks changes nothing but speed, because the loss is a sum over units divided by one global count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Plan:
    """The examples of every step of a run.

    n_examples:      rows of the training set.
    pairs_per_step:  examples a step; the last step of an epoch takes what is left.
    n_steps:         optimizer steps of the whole run.
    """

    n_examples: int
    pairs_per_step: int
    n_steps: int
    seed: int

    @classmethod
    def of(cls, n_examples: int, *, pairs_per_step: int, epochs: float, steps: int | None, seed: int) -> Plan:
        """`steps` counts if it is given, else `epochs` (a fraction of an epoch is rounded up to whole steps)."""
        per_epoch = -(-n_examples // pairs_per_step)
        return cls(n_examples, pairs_per_step, steps or max(1, int(np.ceil(per_epoch * epochs - 1e-9))), seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return -(-self.n_examples // self.pairs_per_step)

    def examples(self, step: int) -> NDArray[np.int64]:
        """Indices of the examples of step `step` (from 0), in the epoch's order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.n_examples, self.seed, epoch)
        return order[within * self.pairs_per_step : (within + 1) * self.pairs_per_step]


_last: dict[tuple[int, int, int], NDArray[np.int64]] = {}


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(n) that depends on nothing but (seed, epoch), the same on every machine."""
    key = (n, seed, epoch)
    if key not in _last:
        _last.clear()  # one epoch at a time is asked for
        _last[key] = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
    return _last[key]


def cut(examples: NDArray[np.int64], lengths: NDArray[np.int64], *, budget: int, world: int = 1) -> list[list[list[int]]]:
    """[rank][micro-batch][example]: the step's examples under `budget` tokens each, every rank the same number of them.

    examples:  indices of the step's examples;  lengths: tokens of each example of the data set.
    An example longer than the budget stands alone. A rank may get an empty micro-batch; it weighs nothing. Longest first, each
    into the emptiest micro-batch, so that all cost about the same.
    """
    order = sorted(examples.tolist(), key=lambda i: (-int(lengths[i]), i))
    total = sum(min(int(lengths[i]), budget) for i in order)  # an example beyond the budget fills one micro-batch, not several
    n_bins = max(world, -(-total // budget))
    n_bins = -(-n_bins // world) * world
    while True:
        bins = _spread(order, lengths, n_bins, budget)
        if bins is not None:
            break
        n_bins += world
    per_rank: list[list[list[int]]] = [[] for _ in range(world)]
    for i, members in enumerate(bins):  # bins are dealt out in turn, so that ranks cost about the same too
        per_rank[i % world].append(sorted(members))
    return per_rank


def _spread(order: list[int], lengths: NDArray[np.int64], n_bins: int, budget: int) -> list[list[int]] | None:
    """Longest-processing-time-first over `n_bins`; None where a bin would overflow."""
    import heapq

    bins: list[list[int]] = [[] for _ in range(n_bins)]
    emptiest = [(0, b) for b in range(n_bins)]
    for i in order:
        n, b = heapq.heappop(emptiest)
        if n and n + int(lengths[i]) > budget:
            return None
        bins[b].append(i)
        heapq.heappush(emptiest, (n + int(lengths[i]), b))
    return bins
