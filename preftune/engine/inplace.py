"""Gradients that are added where they end up, instead of through a buffer of their own.

Autograd gives each use of a weight a gradient of the weight's size, and adds it to `.grad` afterwards. For a vocabulary that is
hundreds of MiB a micro-batch, twice where embedding and head are one. Inside `gradients_in_place` the head and the embedding
add to `.grad` themselves. That is right where `.grad` is what a backward pass is for: not for `torch.autograd.grad`, and not
where somebody waits for the gradient on its way (hooks, DistributedDataParallel), so the caller has to say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_allowed = False  # not of a thread: backward passes of a GPU run on a thread of autograd's own


@contextmanager
def gradients_in_place(on: bool = True) -> Iterator[None]:
    """Backward passes inside add to `.grad` directly where they can."""
    global _allowed
    before, _allowed = _allowed, on
    try:
        yield
    finally:
        _allowed = before


class Sum:
    """The gradient of one weight, to which an operation adds its part; `result` is what its backward pass returns."""

    def __init__(self, weight: Tensor) -> None:
        """Where allowed, the sum is the weight's own `.grad`, which is made where there is none."""
        self._into_grad = _allowed and weight.is_leaf and weight.requires_grad
        if self._into_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        self.value: Tensor = weight.grad if self._into_grad and weight.grad is not None else torch.zeros_like(weight)

    @property
    def result(self) -> Tensor | None:
        """None where the sum has been added already."""
        return None if self._into_grad else self.value
