"""Supervised fine-tuning: the likelihood of demonstrations."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from preftune.losses.records import Tokens


def sft(tokens: Tokens) -> Float[Tensor, "token"]:
    """Negative log-likelihood, one value per scored token: the mean over a step is the usual cross-entropy, in nats."""
    return -tokens.logp
