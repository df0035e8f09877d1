"""The last layer computed only where it is read gives the same log-probs, scores and gradients as one computed whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from preftune.config import Lora
from preftune.data.types import Branch, Tree
from preftune.engine.attention import Forest
from preftune.engine.batch import Batch
from preftune.engine.narrow import use_narrow
from preftune.engine.policy import Path, Policy
from preftune.engine.reward import RewardModel
from preftune.model.checkpointing import checkpoint_layers
from preftune.model.lora import add_lora
from preftune.model.reward import with_scalar_head

LONG = [Tree("", np.arange(9, dtype=np.int32), (Branch(np.arange(4, dtype=np.int32), np.ones(4, np.bool_)),) * 2)]
GAPS = [
    Tree(
        "",
        np.arange(7, dtype=np.int32),
        tuple(Branch(np.arange(n, dtype=np.int32) + 3, np.arange(n) % 3 == 1) for n in (6, 1, 0, 5)),
    )
]
TREES = [*tiny.forest(3, n=3), *LONG, *GAPS]


def adapted(name: str, *, lora: bool) -> Any:
    model = tiny.model(name)
    if not lora:
        return model
    model._preftune_inference_attention = "eager"
    model = add_lora(model, Lora(r=3), base="base", seed=0).double()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_()
    return model


def both(policy: Any, batch: Batch) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Values and gradients, the last layer whole and narrowed."""
    found = []
    for on in (False, True):
        use_narrow(policy.model, on)
        values = policy(batch)
        values.square().sum().backward()
        found.append((values.detach(), tiny.gradients(policy)))
    return found


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma2", "mistral", "phi", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_values_and_gradients_are_those_of_the_whole_layer(name: str, lora: bool) -> None:
    with tiny.Float64():
        policy = Policy(adapted(name, lora=lora), Path("forest", "own"))
        (whole, theirs), (narrow, ours) = both(policy, policy.pack(TREES))
    torch.testing.assert_close(narrow, whole, rtol=0, atol=1e-11)
    assert tiny.relative(ours, theirs) < 1e-12


def test_a_reward_is_that_of_the_whole_layer() -> None:
    with tiny.Float64():
        policy = RewardModel(with_scalar_head(tiny.model("llama"), seed=0).double(), Path("forest", "own"))
        (whole, theirs), (narrow, ours) = both(policy, policy.pack(TREES))
    torch.testing.assert_close(narrow, whole, rtol=0, atol=1e-12)
    assert tiny.relative(ours, theirs) < 1e-12


def rows_seen(policy: Policy, batch: Batch) -> dict[str, int]:
    """How many rows each linear layer of the last layer computes."""
    seen: dict[str, int] = {}
    layer = policy.get_submodule("model.model.layers.1")
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0].shape[1]}))  # type: ignore[misc]
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    policy(batch)
    for hook in hooks:
        hook.remove()
    return {name.rsplit(".", 1)[-1]: n for name, n in seen.items()}


def test_only_what_is_read_is_computed_also_when_it_is_made_again() -> None:
    policy = Policy(tiny.model("llama", dtype=torch.float32), Path("forest", "own")).train()
    batch = policy.pack(TREES)
    n, read = batch.tokens.shape[1], len(set(batch.source.tolist()))
    expected = dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), read) | {"k_proj": n, "v_proj": n}
    assert read < 0.8 * n
    assert rows_seen(policy, batch) == expected
    (whole, theirs), (narrow, ours) = both(policy, batch)
    checkpoint_layers(policy.model)
    (_, _), (again, remade) = both(policy, batch)
    assert torch.equal(again, narrow) and all(torch.equal(remade[k], ours[k]) for k in ours)
    assert rows_seen(policy, batch) == expected
    assert tiny.relative(ours, theirs) < 1e-6
    torch.testing.assert_close(narrow, whole, rtol=0, atol=1e-4)


def test_nothing_scored_is_nothing_to_learn() -> None:
    nothing = [Tree("", np.arange(5, dtype=np.int32), (Branch(np.arange(3, dtype=np.int32), np.zeros(3, np.bool_)),))]
    policy = Policy(tiny.model("llama", dtype=torch.float32), Path("forest", "own"))
    logps = policy(policy.pack(nothing))
    assert logps.shape == (0,)
    logps.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_without_a_forest_all_rows_are_computed() -> None:
    """As where the model generates, or scores padded rows."""
    model = tiny.model("llama", dtype=torch.float32)
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    policy = Policy(model, Path("forest", "own"))
    policy(policy.pack(TREES))
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert not Policy(model, Path("rows", "own")).get_submodule("model.model.layers.1")._forward_pre_hooks


def test_attention_is_asked_for_from_the_first_row_that_is_read_to_the_last() -> None:
    batch = Policy(tiny.model("llama", dtype=torch.float32), Path("forest", "own")).pack(GAPS)
    forest = Forest(batch, batch.source)
    assert forest.asked is None and forest.last() is forest.last()
    assert forest.last().asked.tolist() == sorted(set(batch.source.tolist()))
    assert Forest(batch).last().asked is None
