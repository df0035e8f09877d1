"""Micro-batches made ahead of time: while the device still computes a step, the host packs the beginning of the next.

feed = Feed(micros_of_step)
for micro in feed.step(0): ...      # launches work on the device
feed.prepare(1)                     # packed and sent meanwhile
...                                 # only now is the device waited for
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from preftune.training.step import Micro


class Feed:
    """The micro-batches of each step; what is prepared is what would be made later, so nothing depends on it."""

    def __init__(self, make: Callable[[int], Iterator[Micro]]) -> None:
        """`make` yields the micro-batches of a step, one at a time; every step has at least one."""
        self._make = make
        self._ready: tuple[int, Iterator[Micro]] | None = None

    def prepare(self, index: int) -> None:
        """Makes the first micro-batch of step `index` now."""
        rest = self._make(index)
        self._ready = index, chain([next(rest)], rest)

    def step(self, index: int) -> Iterator[Micro]:
        """The micro-batches of step `index`."""
        if self._ready is None or self._ready[0] != index:
            self.prepare(index)
        assert self._ready is not None
        (_, micros), self._ready = self._ready, None
        return micros
