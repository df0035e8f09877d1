"""Decoder layers through torch.compile, each on its own: they share one piece of code, so it is compiled once.

Lengths are no constants of that code, so another batch is not compiled again. Attention stays outside: its sequences differ
from batch to batch, and its kernels are compiled already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from preftune.errors import ConfigError
from preftune.model.lora import plain


def use_compiled_layers(model: Any, on: bool) -> None:
    """Compiles the model's decoder layers, or makes them as they were. Raises ConfigError where it has no list of layers."""
    for layer in decoder_layers(model):
        if on:
            layer.compile(dynamic=True)
        else:
            layer._compiled_call_impl = None


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Inside, no layer is compiled: decoding has another shape at every token."""
    compiled = [(module, code) for module in model.modules() if (code := module._compiled_call_impl) is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, code in compiled:
            module._compiled_call_impl = code


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers. Raises ConfigError where there is none."""
    base = plain(model)
    wanted = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    for module in base.base_model.children():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ConfigError(f"compile: {type(base).__name__} has no plain list of decoder layers; set compile=false")
