"""Other states of the trainable weights, held beside those that learn: a live reference, and a moving average.

With LoRA they are copies of the adapters alone. A `Shadow` is put in the place of the weights for as long as something is
computed with it, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from preftune.config import Average
from preftune.engine.policy import Policy
from preftune.training.checkpoint import trainable


class Shadow:
    """The trainable weights as they are now, kept apart."""

    def __init__(self, policy: nn.Module) -> None:
        """Copies what is trainable of `policy`."""
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in trainable(policy).items()}

    def mix(self, policy: nn.Module, share: float) -> None:
        """Moves them towards the policy's by `share` (a fraction; 1: they become the policy's)."""
        with torch.no_grad():
            for name, p in trainable(policy).items():
                self.weights[name].lerp_(p, share)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes on weights that were saved."""
        for name, kept in self.weights.items():
            kept.copy_(weights[name])

    def put_into(self, policy: nn.Module) -> None:
        """Gives the policy these weights for good."""
        with torch.no_grad():
            for name, p in trainable(policy).items():
                p.copy_(self.weights[name])

    @contextmanager
    def in_place(self, policy: Policy) -> Iterator[None]:
        """The policy has these weights, and no dropout, within the context. Without gradients."""
        was_training = policy.training
        own = {name: p.data for name, p in trainable(policy).items()}
        policy.eval()
        with torch.no_grad():
            try:
                for name, p in trainable(policy).items():
                    p.data = self.weights[name]
                yield
            finally:
                for name, p in trainable(policy).items():
                    p.data = own[name]
                policy.train(was_training)


class Averaged:
    """A moving average of the policy: what the run saves and evaluates, while the policy itself learns as ever.

    `ema`:  θ̄ ← θ̄ + (1 − decay)(θ − θ̄) after every step.
    `bema`: Block & Zhang, 2025, arXiv 2508.00180, algorithm 1: an average of growing length, μ ← μ + (ρ + t)^−κ (θ − μ), whose
    lag is corrected by the way that the weights have come, θ̄ = μ + (ρ + t)^−η (θ − θ₀).
    """

    def __init__(self, policy: Policy, settings: Average) -> None:
        """`policy` as it starts."""
        self.settings = settings
        self.mean = Shadow(policy)
        self._start = Shadow(policy) if settings.kind == "bema" else None
        self._step = 0

    def update(self, policy: Policy, step: int) -> None:
        """Takes in the weights after `step` updates."""
        self._step = step
        s = self.settings
        self.mean.mix(policy, 1 - s.decay if s.kind == "ema" else (s.lag + step) ** -s.power)

    def load(self, weights: dict[str, Tensor], step: int) -> None:
        """The average that was saved after `step` updates."""
        self._step = step
        self.mean.load(weights)

    def result(self, policy: Policy) -> Shadow:
        """The average as weights."""
        if self._start is None:
            return self.mean
        corrected = Shadow(policy)
        share = (self.settings.lag + self._step) ** -self.settings.bias if self._step else 0.0
        for name, weights in corrected.weights.items():
            weights.sub_(self._start.weights[name]).mul_(share).add_(self.mean.weights[name])
        return corrected
