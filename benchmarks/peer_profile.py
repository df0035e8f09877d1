"""Where the time of preftune's step goes: shares by kind of work, from torch's profiler (seconds by the clock)."""

from __future__ import annotations

from collections import Counter
from typing import Any

_ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::_addmm_activation")


def profile(ours: Any) -> str:
    """Shares of one step after warm-up, and the largest operations that they are made of."""
    import torch

    vocabulary = _vocabulary(ours)
    ours.step()
    ours.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as recorded:
        ours.step()
    ours.finish()
    shares: Counter[str] = Counter()
    single: Counter[str] = Counter()
    for event in recorded.key_averages(group_by_input_shape=True):
        kind = kind_of(event.key, event.input_shapes, vocabulary)
        shares[kind] += event.self_cpu_time_total
        single[f"{kind}: {event.key} {event.input_shapes} × {event.count}"] += event.self_cpu_time_total
    total = sum(shares.values())
    lines = [f"  {kind:<34} {t / total:6.1%}  {t / 1e6:7.3f} s" for kind, t in shares.most_common()]
    lines += [f"    {t / total:6.1%}  {what[:200]}" for what, t in single.most_common(14)]
    return "\n".join(lines)


def kind_of(name: str, shapes: list[Any], vocabulary: int) -> str:
    """What an operation of the step is for."""
    at_head = any(vocabulary in shape for shape in shapes if shape)
    if "Optimizer" in name or "fused_adamw" in name or "foreach" in name or "norm" in name and "linalg" in name:
        return "optimizer, clipping"
    if any(part in name for part in _ATTENTION):
        return "attention"
    if name in _PRODUCTS:
        return "head: matrix products" if at_head else "layers: matrix products"
    return "head, embedding: everything else" if at_head else "layers: everything else"


def _vocabulary(ours: Any) -> int:
    import json
    from pathlib import Path

    return int(json.loads((Path(ours.config.model) / "config.json").read_text())["vocab_size"])
