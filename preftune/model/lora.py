"""Low-rank adapters through PEFT (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from preftune.config import Lora
from preftune.errors import ConfigError, nearest


def add_lora(model: Any, lora: Lora, *, base: str, seed: int) -> Any:
    """`model` with fresh adapters as a PeftModel: the base is frozen, and with the adapter off it is the reference.

    `base` is written into the saved adapter as the model that it belongs to. Raises ConfigError for a target that the model
    does not have.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets: str | list[str] = lora.targets
    if targets != "all-linear":
        targets = [targets] if isinstance(targets, str) else list(targets)
        linear = (torch.nn.Linear, Conv1D)  # the latter is GPT-2's
        names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, linear)}
        for target in targets:
            if target.rsplit(".", 1)[-1] not in names:
                raise ConfigError(f"lora.targets: {target!r} is no linear layer of this model; {nearest(target, names)}")
    kind = TaskType.SEQ_CLS if hasattr(model, "score") else TaskType.CAUSAL_LM  # the former learns its head whole
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type=kind,
    )
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    peft.peft_config["default"].base_model_name_or_path = base  # PEFT overwrites what is given to LoraConfig
    for parameter in peft.parameters():
        if parameter.requires_grad:  # adapters learn in float32 even over a bf16 base
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    peft._preftune_inference_attention = model._preftune_inference_attention
    return peft


def cast_frozen(model: Any, dtype: torch.dtype, *, exactly: bool = False) -> None:
    """Stores the frozen matrices of linear layers in `dtype`, that of autocast, which would cast them before each product.

    Products are the same to the last bit, at half the memory and without the copies. What autocast leaves in float32
    (embeddings, norms, adapters, the head of a reward model) stays, and so does a head that shares its weight with the
    embedding. From now on the model runs under autocast alone (`autocast_of`).

    exactly: only matrices that lose nothing by it, as those of a model that was published in `dtype`, so that adapters can be
    merged into what the base was.
    """
    model._preftune_autocast = dtype
    base = plain(model)
    shared, apart = base.get_input_embeddings().weight, set(base.score.modules()) if hasattr(base, "score") else set()
    for module in model.modules():
        if type(module) is not torch.nn.Linear or module.weight.requires_grad or module.weight is shared or module in apart:
            continue
        for parameter in module.parameters(recurse=False):
            cast = parameter.data.to(dtype)
            if not exactly or torch.equal(cast.to(parameter.dtype), parameter.data):
                parameter.data = cast


def autocast_of(model: Any) -> torch.dtype | None:
    """The dtype of autocast that a model needs after `cast_frozen`; None where it runs as it is."""
    found: torch.dtype | None = getattr(model, "_preftune_autocast", None)
    return found


def uncast_frozen(model: Any) -> None:
    """Undoes `cast_frozen`, so that what is added to the matrices is not rounded to their dtype."""
    usual = plain(model).get_input_embeddings().weight.dtype
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.to(usual)
    model._preftune_autocast = None


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT asks transformers by a name that is deprecated, and says that it knows GPT-2's layers: neither needs the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        yield


def is_lora(model: Any) -> bool:
    """Whether `model` carries adapters."""
    return hasattr(model, "disable_adapter")


def plain(model: Any) -> Any:
    """The Hugging Face model itself, with or without adapters in it."""
    return model.get_base_model() if is_lora(model) else model
