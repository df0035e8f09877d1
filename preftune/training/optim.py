"""AdamW (Loshchilov & Hutter, 2019, arXiv 1711.05101) with decay on matrices only, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from preftune.config import Optim


def make_optimizer(policy: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable weights; norms and biases are not decayed.

    Gradients are made here and zeroed in place later: made anew in each step they would stand scattered among activations,
    and on a CPU the memory between them would be lost to the next.
    """
    trainable = [p for p in policy.parameters() if p.requires_grad]
    for p in trainable:
        p.grad = torch.zeros_like(p)
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    assert optim.lr is not None, "settings are resolved before training"
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=all(p.dtype != torch.float64 or p.device.type == "cpu" for p in trainable),
    )


def learning_rate(optim: Optim, step: int, n_steps: int) -> float:
    """Learning rate of update `step` (from 0) of `n_steps`: a linear rise, then the schedule down to 0 after the last step."""
    assert optim.lr is not None
    n_warmup = round(optim.warmup * n_steps) if optim.warmup < 1 else round(optim.warmup)
    if step < n_warmup:
        return optim.lr * (step + 1) / n_warmup  # the first update is not wasted on a rate of 0
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    if optim.schedule == "linear":
        return optim.lr * (1 - progress)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr


def clip(policy: nn.Module, largest: float) -> Tensor:
    """Scales the gradient down to norm `largest` (0: leaves it) and returns the norm that it had, on the device."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    return nn.utils.clip_grad_norm_(trainable, largest or math.inf)


class WeightWatch:
    """How many weights have moved from where they started, and how far, on a fixed sample: updates lost to rounding show."""

    def __init__(self, policy: nn.Module, *, n: int = 1 << 20) -> None:
        """Remembers about `n` weights, spread evenly over all trainable tensors."""
        trainable = [p for p in policy.parameters() if p.requires_grad]
        stride = max(1, sum(p.numel() for p in trainable) // n)
        self._watched = [(p, p.detach().flatten()[::stride].clone(), stride) for p in trainable]

    def moved(self) -> tuple[Tensor, Tensor]:
        """Fraction of the watched weights that differ from their start, and ‖θ − θ₀‖ / ‖θ₀‖ over them, on the device."""
        n = sum(len(start) for _, start, _ in self._watched)
        table = torch.stack([_difference(p.detach().flatten()[::s], start) for p, start, s in self._watched]).sum(0)
        return table[0] / n, (table[1] / table[2].clamp(min=torch.finfo(torch.double).tiny)).sqrt()


def _difference(now: Tensor, start: Tensor) -> Tensor:
    """[3] how many weights differ, the square of their way, and of their norm at the start; double."""
    way = now.double() - start.double()
    return torch.stack([(now != start).sum().double(), way.square().sum(), start.double().square().sum()])
