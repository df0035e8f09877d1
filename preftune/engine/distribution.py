"""What needs the whole distribution over the next token at each scored token, and not its target's log-prob alone.

    log_collision   log Σ_v π(v)², how likely two samples are to agree (WPO)
    kl              KL(p ‖ q), differentiable in q (TDPO)
    compare         KL(p ‖ q) and both log-probs of the target, without gradients

Logits are made in blocks of rows, and for gradients made again, so that [rows, vocabulary] is never held beyond a fixed budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from preftune.engine.head import HeadShape

_BLOCK_ELEMENTS = 1 << 22  # logits made at once: 16 MiB in float32, a few times over for what follows from them
_GPU_BLOCK_ELEMENTS = 1 << 26


class Predictions(NamedTuple):
    """Distributions over the next token, by the hidden states that predict it and the head that reads them.

    Where the head is the model's own there is no weight, and `hidden` are the logits that the model made.
    """

    hidden: Float[Tensor, "S D"]
    weight: Float[Tensor, "V D"] | None
    bias: Float[Tensor, "V"] | None
    shape: HeadShape

    @property
    def n_vocabulary(self) -> int:
        """Tokens that each distribution is over."""
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    def detach(self) -> Predictions:
        """The same distributions, as they are now, whatever becomes of the weights."""
        hidden, weight, bias = (None if x is None else x.detach() for x in self[:3])
        assert hidden is not None
        return Predictions(hidden, weight, bias, self.shape)

    def blocks(self) -> Iterator[slice]:
        """Rows in blocks whose logits fit."""
        size = max(1, (_GPU_BLOCK_ELEMENTS if self.hidden.is_cuda else _BLOCK_ELEMENTS) // self.n_vocabulary)
        return (slice(at, at + size) for at in range(0, len(self.hidden), size))


@torch.no_grad()
def log_collision(policy: Predictions) -> Float[Tensor, "S"]:
    """log Σ_v π(v)² at every scored token, nats, without gradient."""
    parts = []
    for rows in policy.blocks():
        logps = _logps(policy.hidden[rows], policy.weight, policy.bias, policy.shape)
        parts.append((2 * logps).logsumexp(1))
    return torch.cat(parts) if parts else policy.hidden.new_zeros(0)


def kl(p: Predictions, q: Predictions) -> Float[Tensor, "S"]:
    """Σ_v p(v) (log p(v) − log q(v)) at every scored token, nats, with the gradient of q alone."""

    def block(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, rows: slice) -> Tensor:
        logps = _logps(hidden, weight, bias, q.shape)
        with torch.no_grad():
            frozen = _logps(p.hidden[rows], p.weight, p.bias, p.shape)
        return _divergence(frozen, logps)

    parts = [checkpoint(block, q.hidden[rows], q.weight, q.bias, rows, use_reentrant=False) for rows in q.blocks()]
    return torch.cat(parts) if parts else q.hidden.sum(1)


class Compared(NamedTuple):
    """Two distributions at every scored token: KL(p ‖ q), and the target's log-prob under both, nats."""

    kl: Float[Tensor, "S"]
    logp: Float[Tensor, "S"]
    other_logp: Float[Tensor, "S"]


@torch.no_grad()
def compare(p: Predictions, q: Predictions, target: Int[Tensor, "S"]) -> Compared:
    """KL(p ‖ q) over the whole vocabulary and both log-probs of the target, block by block. Never negative."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in p.blocks():
        ours, theirs = (_logps(x.hidden[rows], x.weight, x.bias, x.shape) for x in (p, q))
        at = target[rows, None]
        # what rounding leaves of two distributions that are nearly one may lie below 0
        found.append((_divergence(ours, theirs).clamp(min=0), ours.gather(1, at)[:, 0], theirs.gather(1, at)[:, 0]))
    if not found:
        return Compared(*(p.hidden.new_zeros(0) for _ in range(3)))
    return Compared(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _divergence(p: Float[Tensor, "R V"], q: Float[Tensor, "R V"]) -> Float[Tensor, "R"]:
    """Σ_v p (log p − log q) of log-probs."""
    return (p.exp() * (p - q)).sum(1)


def _logps(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, shape: HeadShape) -> Float[Tensor, "R V"]:
    if weight is None:  # logits already, whatever the model does to them
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(1)
    logits = linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * shape.scale
    if shape.softcap is not None:
        logits = (logits / shape.softcap).tanh() * shape.softcap
    return logits.log_softmax(1)
