"""Which attention a packed forest runs on: the fastest that is installed and that is measured to be exact, tried in one order.

    variable-length flash attention of torch, of the package flash-attn; FlexAttention; one call per branch

On a CPU it is one call per branch. On a GPU each of the others is tried on a few real examples, in the precision of the run,
values and gradients: it is taken where it differs from one call per branch by no more than rounding does in this model.
The order and the measure are fixed and nothing is timed, so that a resumed run makes the same choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from preftune.engine.attention import DENSE, FOREST, Unmodelled, compute_dtype, dense_attention, forest_attention
from preftune.engine.flex import flex_forest
from preftune.engine.varlen import attention, flash_has_it, flash_kernel, torch_has_it, torch_kernel

ROUNDED = "preftune_rounded"

CANNOT = (Unmodelled, TypeError, ValueError, AttributeError, RuntimeError, IndexError, NotImplementedError, ImportError)
"""What other people's code raises where it does not serve a model."""


class Backend(NamedTuple):
    """One way to evaluate the forest: its name for transformers, its name in the log, and whether it is installed."""

    name: str
    what: str
    function: Callable[..., tuple[Tensor, None]]
    installed: Callable[[], bool] = lambda: True


BACKENDS = (
    Backend("preftune_varlen", "torch's variable-length flash attention", attention(torch_kernel), torch_has_it),
    Backend("preftune_flash", "flash-attn's variable-length attention", attention(flash_kernel), flash_has_it),
    Backend("preftune_flex", "FlexAttention", flex_forest),
)


def register() -> None:
    """Makes all of them known to transformers, which then builds no mask for them."""
    from transformers import AttentionInterface

    known = {FOREST: forest_attention, DENSE: dense_attention, ROUNDED: rounded_attention}
    for name, function in (known | {b.name: b.function for b in BACKENDS}).items():
        # layers may be compiled around attention, which differs from batch to batch and is no part of their code
        AttentionInterface.register(name, torch.compiler.disable(function))


def available(device: torch.device) -> list[Backend]:
    """What is worth trying on this device before one call per branch, the fastest first."""
    return [backend for backend in BACKENDS if device.type == "cuda" and backend.installed()]


class Measured(NamedTuple):
    """What a model gives on a probe: log-probs [S] in nats, and a gradient with respect to its embeddings."""

    logps: Tensor
    gradient: Tensor


def fastest(backends: list[Backend], measure: Callable[[str], Measured]) -> tuple[str, str]:
    """The name of the first backend that differs from one call per branch by no more than rounding, and why it is that one.

    measure: what the model gives in the precision of the run, with an attention of that name. What rounding does to this
    model is measured as well (`rounded_attention`): twice that is granted, and never less than 1e-4 of a nat and of the
    gradient (root mean squares), so that what a wrong mask does stands out in any precision.
    """
    if not backends:
        return FOREST, "one call per branch"
    try:
        known = measure(FOREST)
        noise = _errors(measure(ROUNDED), known)
    except CANNOT as error:
        return FOREST, f"one call per branch; the others could not be compared with it: {_first_line(error)}"
    reasons = []
    for backend in backends:
        try:
            errors = _errors(measure(backend.name), known)
        except CANNOT as error:
            reasons.append(f"not {backend.what}: {_first_line(error)}")
            continue
        found = f"{errors[0]:.1e} nats a token, gradient {errors[1]:.1e} (rounding: {noise[0]:.1e}, {noise[1]:.1e})"
        if all(error <= max(2 * rounding, 1e-4) for error, rounding in zip(errors, noise, strict=True)):
            return backend.name, "; ".join([f"{backend.what}, which differs from one call per branch by {found}", *reasons])
        reasons.append(f"not {backend.what}: it differs from one call per branch by {found}")
    return FOREST, "; ".join(["one call per branch", *reasons])


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _errors(found: Measured, known: Measured) -> list[float]:
    """Root mean square of the log-probs' difference in nats, and the gradient's relative to itself; inf where not finite."""
    off = (found.logps.double() - known.logps.double()).square().mean().sqrt()
    gradient = known.gradient.double()
    off_gradient = (found.gradient.double() - gradient).norm() / gradient.norm().clamp(min=1e-30)
    return [float(torch.nan_to_num(x, nan=torch.inf)) for x in (off, off_gradient)]


def rounded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any
) -> tuple[Tensor, None]:
    """One call per branch, with as much rounding as a kernel may have: what goes in and out is off by up to one unit."""
    eps = torch.finfo(compute_dtype(query, value)).eps

    def off(x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(x.shape[1])
        error = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return (x * (1 + eps * (2 * error - 1))).to(x.dtype)

    out, _ = forest_attention(module, off(query), off(key), off(value), *given, **named)
    return off(out), None
