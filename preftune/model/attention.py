"""Which attention implementation a model has where nothing is packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from preftune.model.lora import plain


def own_attention(model: Any) -> str:
    """The implementation that knows padding and caches, whatever the model is set to now.

    Who loads a model may name it by the attribute `_preftune_inference_attention`. By default it is "sdpa", or "eager" where
    the architecture has no SDPA or caps its attention logits, which SDPA cannot.
    """
    base = plain(model)
    capped = getattr(base.config.get_text_config(), "attn_logit_softcapping", None) is not None
    default = "eager" if capped or not base._supports_sdpa else "sdpa"
    named: str | None = getattr(model, "_preftune_inference_attention", None)
    return named or default


@contextmanager
def inference_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the model attends by its own implementation; afterwards by the one it had.

    A policy may be set to an implementation for packed training batches, which cannot decode.
    """
    base = plain(model)
    before, wanted = base.config._attn_implementation, own_attention(model)
    if before == wanted or not base._can_set_attn_implementation():
        yield
        return
    base.set_attn_implementation(wanted)
    try:
        yield
    finally:
        base.set_attn_implementation(before)
