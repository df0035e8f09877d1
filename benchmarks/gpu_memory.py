"""What a model shape takes of a GPU's memory, found without one: bytes of its weights, and of what a token leaves for backward.

    python benchmarks/gpu_memory.py 8B lora

Weights are counted on the device "meta". What backward needs is counted on a CPU, under bf16 autocast, as the difference
between a model of two layers and one of one: all tensors that autograd holds on to, and apart from them copies of weights.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from gpu_inputs import LENGTHS, MODELS, make_model, make_trees, with_adapters
from torch import Tensor, nn

from preftune.engine.fused import use_fused
from preftune.engine.policy import Path, Policy

GIB, MIB = 2**30, 2**20
VOCABULARY = 2000  # the head and the embedding are no part of a layer


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in MODELS or sys.argv[2] not in ("full", "lora"):
        sys.exit(f"usage: gpu_memory.py {'|'.join(MODELS)} full|lora")
    name, lora = sys.argv[1], sys.argv[2] == "lora"
    shape = MODELS[name]
    model = make_model(shape, torch.device("meta"), longest=1024)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} weights, {size(model) / GIB:.1f} GiB in float32")
    if lora:
        model = with_adapters(model)
        print(f"with adapters over matrices in bf16: {size(model) / GIB:.1f} GiB")
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{learning:,} weights learn: gradients and AdamW take {12 * learning / GIB:.1f} GiB more")
    one, two = (saved(replace(shape, layers=n, vocabulary=VOCABULARY), lora=lora) for n in (1, 2))
    n_tokens, activations, copies = one[0], two[1] - one[1], two[2] - one[2]
    a_token = shape.layers * activations / n_tokens
    print(
        f"a token leaves {activations / n_tokens / 1024:.0f} KiB a layer, {a_token / MIB:.2f} MiB in {shape.layers} layers; "
        f"8192 tokens {8192 * a_token / GIB:.0f} GiB"
    )
    print(f"copies of weights that wait for backward: {shape.layers * copies / GIB:.1f} GiB")


def size(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def saved(shape: object, *, lora: bool) -> tuple[int, int, int]:
    """Tokens read, bytes that autograd holds on to after a forward pass, and bytes of copies of weights among them."""
    model = make_model(shape, torch.device("cpu"), longest=1024)  # type: ignore[arg-type]
    model = with_adapters(model) if lora else model
    policy = Policy(model, Path("forest", "own"), autocast=torch.bfloat16).train()
    use_fused(model, False)  # a CPU's own way of keeping less
    batch = policy.pack(make_trees(LENGTHS["long"], 1, vocabulary=VOCABULARY, longest=1024))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    as_large = {2 * p.numel() for p in model.parameters() if p.ndim == 2}
    held: dict[int, int] = {}
    kept = []

    def note(x: Tensor) -> Tensor:
        if (place := x.untyped_storage().data_ptr()) not in own:
            held[place] = x.untyped_storage().nbytes()
            kept.append(x)  # so that no other tensor gets its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        policy.predictions(batch)
    copies = sum(n for n in held.values() if n in as_large)
    return batch.tokens.numel(), sum(held.values()) - copies, copies


if __name__ == "__main__":
    main()
