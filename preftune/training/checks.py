"""What a run must not go on with: a policy that is not its reference at the start, a number that is not finite."""

from __future__ import annotations

import math

import torch

from preftune.engine.policy import Policy
from preftune.errors import TrainingError


def check_step_zero(metrics: dict[str, float], expected: float, *, precise: bool) -> None:
    """Before any update the policy is the reference: no KL, and the loss that the objective gives there. Raises TrainingError.

    expected: the loss with the policy for its own reference; dpo's is ln 2. Only rounding may differ, since the reference was
    scored in other batches: up to 2e-4 nats a token, and 2e-4 of the loss. Where products are in bf16, 0.5 nats of KL.
    """
    if "kl" not in metrics:
        return
    n_tokens = max((metrics[f"lengths/{side}"] for side in ("chosen", "rejected") if f"lengths/{side}" in metrics), default=1.0)
    near = abs(metrics["loss"] - expected) <= 2e-4 * max(1.0, abs(expected))
    if metrics["kl"] <= (0.5 * 2e-4**2 * max(n_tokens, 1.0) if precise else 0.5) and (near or not precise):
        return
    raise TrainingError(
        f"step 0: the policy should equal its reference before the first update, but differs by {metrics['kl']:.3g} nats "
        f"a response (loss {metrics['loss']:.6f}, expected {expected:.6f}). Likely causes: reference "
        "log-probs of another model or template (delete the cache folder), dropout in the base model, or a model whose "
        "forward pass is not deterministic"
    )


def is_precise(policy: Policy) -> bool:
    """Whether log-probs are the same to float32 however a batch is cut; where products are in bf16 they are not."""
    return (policy.autocast or next(policy.parameters()).dtype) in (torch.float32, torch.float64)


def not_finite(metrics: dict[str, float]) -> str:
    """What is not finite among the metrics, the loss first; "" for nothing."""
    bad = [f"{name} is {metrics[name]}" for name in ("loss", *sorted(metrics)) if not math.isfinite(metrics[name])]
    return bad[0] + (f" (the loss is {metrics['loss']:.4g})" if math.isfinite(metrics["loss"]) else "") if bad else ""
