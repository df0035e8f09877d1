"""The last layer of a forest on a CPU computes only what is read of it.

Of its output nothing is read but the hidden states that predict a scored token (or carry a score). Its keys and values are
needed of every token; its queries, its attention's output and its MLP only there. They are computed at these rows, and
the others are 0, which nothing reads: values and gradients are the same.

What is narrowed are modules that treat each row by itself: the linear layers `q_proj` and `o_proj`, with or without adapters,
and a gated MLP that `fused` serves. Other architectures compute their last layer whole.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from preftune.engine.fused import is_gated_mlp
from preftune.errors import ConfigError
from preftune.model.compile import decoder_layers

_HOOKS = "_preftune_narrow"  # of a layer


def use_narrow(model: nn.Module, on: bool) -> None:
    """Narrows the last layer of a model, or lets it compute all rows again. After `use_fused`."""
    try:
        layer = decoder_layers(model)[-1]
    except ConfigError:  # it has no plain list of them
        return
    for hook in layer.__dict__.pop(_HOOKS, []):
        hook.remove()
    attention = getattr(layer, "self_attn", None)
    narrowed = [m for name, m in layer.named_modules() if _by_row(name, m)] if on else []
    if narrowed and attention is not None:
        setattr(layer, _HOOKS, _LastLayer().hooks(layer, attention, narrowed))


def _by_row(name: str, module: nn.Module) -> bool:
    if name in ("self_attn.q_proj", "self_attn.o_proj"):
        return isinstance(getattr(module, "base_layer", module), nn.Linear)
    return name == "mlp" and is_gated_mlp(module)


class _LastLayer:
    """What the hooks of one layer share: from the call of its attention on they know which rows are read.

    Attention is told of the forest, and is called again where activation checkpointing makes the layer again; the layer is not.
    """

    def __init__(self) -> None:
        self._rows: Int[Tensor, "S"] | None = None
        self._n = 0  # rows in all

    def hooks(self, layer: nn.Module, attention: nn.Module, narrowed: list[nn.Module]) -> list[RemovableHandle]:
        return [
            layer.register_forward_pre_hook(self.forget),
            attention.register_forward_pre_hook(self.enter, with_kwargs=True),
            *(module.register_forward_pre_hook(self.gather) for module in narrowed),
            *(module.register_forward_hook(self.scatter) for module in narrowed),
        ]

    def forget(self, *_: Any) -> None:
        self._rows = None

    def enter(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        forest = kwargs.get("forest")
        self._rows = None
        if forest is None or torch.compiler.is_compiling():  # compiled code is shared with the other layers
            return None
        last = forest.last()
        self._rows, self._n = last.asked, forest.batch.tokens.shape[1]
        return args, kwargs | {"forest": last}

    def gather(self, module: nn.Module, args: tuple[Float[Tensor, "N T k"]]) -> tuple[Tensor] | None:
        (x,) = args
        if self._rows is None or x.shape[:-1] != (1, self._n):
            return None
        return (x.index_select(1, self._rows),)

    def scatter(self, module: nn.Module, args: tuple[Tensor], out: Float[Tensor, "N S n"]) -> Float[Tensor, "1 T n"] | None:
        if self._rows is None or out.shape[:-1] != (1, len(self._rows)):
            return None
        return out.new_zeros(1, self._n, out.shape[-1]).index_copy(1, self._rows, out)
