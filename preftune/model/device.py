"""Where a model runs, and in which precision."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from preftune.errors import ConfigError, nearest

PRECISIONS = ("auto", "fp32", "bf16", "pure_bf16")


class Precision(NamedTuple):
    """Type of the stored weights, and of matrix products in the forward pass (None: the same)."""

    weights: torch.dtype
    autocast: torch.dtype | None

    def __str__(self) -> str:
        kinds = [str(d).removeprefix("torch.") for d in (self.weights, self.autocast) if d is not None]
        return "/".join(kinds)


def precision_of(setting: str, device: torch.device) -> Precision:
    """What `precision=` means on this device. On a CPU auto is float32: bf16 moves log-prob sums by tenths of a nat there.

    Raises ConfigError for a precision that does not exist.
    """
    if setting not in PRECISIONS:
        raise ConfigError(f"precision: {setting!r} does not exist; {nearest(setting, PRECISIONS)}")
    if setting == "pure_bf16":
        return Precision(torch.bfloat16, None)
    if setting == "bf16" or (setting == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return Precision(torch.float32, torch.bfloat16)
    return Precision(torch.float32, None)


def pick_device(name: str) -> torch.device:
    """The device that `device=` names; auto is this rank's GPU where there is one, else the CPU. Raises ConfigError."""
    if name == "auto":
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}") if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the device meta holds no values
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def use_deterministic(on: bool) -> None:
    """Only kernels that add in a fixed order from here on (a CPU's do); one that cannot raises RuntimeError and says so.

    Before the first product on a GPU: cuBLAS reads its setting then.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    # nothing here reads memory before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. From the host to a GPU through pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and x.device.type == "cpu" and x.numel():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
