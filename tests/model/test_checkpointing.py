from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from preftune.config import Lora
from preftune.engine.policy import Path, Policy
from preftune.errors import ConfigError
from preftune.model import checkpointing
from preftune.model.checkpointing import checkpoint_layers
from preftune.model.lora import add_lora

TREES = tiny.forest(3, n=6, longest=20)


@pytest.mark.parametrize("layout", ["forest", "rows"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gpt-neox"])
def test_gradients_are_the_same_bit_for_bit_and_less_is_kept(name: str, lora: bool, layout: str) -> None:
    model = tiny.model(name, dtype=torch.float32)
    if lora:
        model._preftune_inference_attention = "eager"
        model = add_lora(model, Lora(r=3, dropout=0.1), base="base", seed=0)
    policy = Policy(model, Path(layout, "own")).train()  # type: ignore[arg-type]
    batch = policy.pack(TREES)

    def step() -> tuple[int, dict[str, Tensor]]:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logps = policy(batch)
        logps.square().mean().backward()
        return sum(sizes.values()), tiny.gradients(policy)

    kept, expected = step()
    checkpoint_layers(model)
    lean, found = step()
    assert lean < 0.8 * kept
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "GradientCheckpointingLayer", type("None", (), {}))
    with pytest.raises(ConfigError, match="activation_checkpointing: LlamaForCausalLM"):
        checkpoint_layers(tiny.model("llama"))
