"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a layer's activations are made again when needed."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from preftune.errors import ConfigError
from preftune.model.lora import plain


def checkpoint_layers(model: Any) -> None:
    """Keeps each layer's input alone while the model trains; gradients are the same bit for bit, dropout included.

    Raises ConfigError where the architecture has no layers that can be read again.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"batch.activation_checkpointing: {type(plain(model)).__name__} cannot read its layers again; set it to false, and "
            "lower batch.tokens_per_microbatch where memory is short"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = True
