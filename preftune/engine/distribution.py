"""What needs the whole distribution over the next token at each scored token, and not its target's log-prob alone.

    log_collision   log Σ_v π(v)², how likely two samples are to agree (WPO)
    kl              KL(reference ‖ policy), differentiable in the policy (TDPO)

Logits are made in blocks of rows, and for gradients made again, so that [rows, vocabulary] is never held beyond a fixed budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from preftune.engine.head import HeadShape

_BLOCK_ELEMENTS = 1 << 22  # logits made at once: 16 MiB in float32, a few times over for what follows from them


class Predictions(NamedTuple):
    """Distributions over the next token, by the hidden states that predict it and the head that reads them."""

    hidden: Float[Tensor, "S D"]
    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None
    shape: HeadShape

    def detach(self) -> Predictions:
        """The same distributions, as they are now, whatever becomes of the weights."""
        bias = None if self.bias is None else self.bias.detach()
        return Predictions(self.hidden.detach(), self.weight.detach(), bias, self.shape)

    def blocks(self) -> Iterator[slice]:
        """Rows in blocks whose logits fit."""
        size = max(1, _BLOCK_ELEMENTS // self.weight.shape[0])
        return (slice(at, at + size) for at in range(0, len(self.hidden), size))


@torch.no_grad()
def log_collision(policy: Predictions) -> Float[Tensor, "S"]:
    """log Σ_v π(v)² at every scored token, nats, without gradient."""
    parts = []
    for rows in policy.blocks():
        logps = _logps(policy.hidden[rows], policy.weight, policy.bias, policy.shape)
        parts.append((2 * logps).logsumexp(1))
    return torch.cat(parts) if parts else policy.hidden.new_zeros(0)


def kl(reference: Predictions, policy: Predictions) -> Float[Tensor, "S"]:
    """Σ_v π_ref(v) (log π_ref(v) − log π(v)) at every scored token, nats, with the gradient of the policy alone."""

    def block(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        logps = _logps(hidden, weight, bias, policy.shape)
        with torch.no_grad():
            frozen = _logps(reference.hidden[rows], reference.weight, reference.bias, reference.shape)
        return (frozen.exp() * (frozen - logps)).sum(1)

    parts = [
        checkpoint(block, policy.hidden[rows], policy.weight, policy.bias, rows, use_reentrant=False)
        for rows in policy.blocks()
    ]
    return torch.cat(parts) if parts else policy.hidden.sum(1)


def _logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> Float[Tensor, "R V"]:
    logits = linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * shape.scale
    if shape.softcap is not None:
        logits = (logits / shape.softcap).tanh() * shape.softcap
    return logits.log_softmax(1)
