from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from preftune.config import Lora
from preftune.engine.policy import HeadShape, Path, Policy, head_shape, response_sums, tolerance
from preftune.errors import ModelError
from preftune.model.lora import add_lora

TREES = tiny.forest(5, n=4, scored=0.7)


class Doubled(nn.Module):
    """A head that no HeadShape describes."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.weight.T) * 2


def test_every_path_gives_the_same() -> None:
    model = tiny.model("qwen2")
    with tiny.Float64():
        expected = tiny.textbook(tiny.oracle(model), TREES)
    for path in (Path("forest", "own"), Path("rows", "own"), Path("rows", "model"), Path("rows", "model", alone=True),
                 Path("forest", "own", alone=True)):  # fmt: skip
        policy = Policy(model, path)
        with tiny.Float64():
            torch.testing.assert_close(policy(policy.pack(TREES)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
def test_padded_rows_read_little_more_than_is_counted(name: str) -> None:
    """Values and gradients are those of the definition, and no pass is much wider than its rows."""
    rng = np.random.default_rng(0)
    trees = [tiny.random_tree(rng, prompt=p, lengths=n) for p, n in [(12, [12, 11]), (2, [2, 3]), (3, [2, 2]), (2, [9, 3])]]
    model = tiny.model(name)
    twin, policy, read = tiny.oracle(model), Policy(model, Path("rows", "own")), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    with tiny.Float64():
        logps, expected = policy(policy.pack(trees)), tiny.textbook(twin, trees)
        weight = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
        (logps * weight).sum().backward()
        (expected * weight).sum().backward()
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-9)
    assert tiny.relative(tiny.gradients(model), tiny.gradients(twin)) < 1e-7
    assert len(read) > 1 and sum(read) <= sum(policy.tokens_read(t) for t in trees) < policy.pack(trees).tokens.numel()


def test_a_head_that_is_more_than_a_product_is_left_to_the_model() -> None:
    model = tiny.model("llama")
    model.lm_head = Doubled(model.lm_head)
    policy = Policy.choose(model, TREES)
    assert (policy.path.layout, policy.path.head, policy.path.alone) == ("rows", "model", False)
    with tiny.Float64():
        expected = tiny.textbook(tiny.oracle(model), TREES)
        torch.testing.assert_close(policy(policy.pack(TREES)), expected, rtol=0, atol=1e-10)
    assert policy.path.why.count("log-probs differ") == 2


def test_a_model_that_is_wrong_in_batches_is_scored_one_by_one() -> None:
    """It adds something that depends on the other rows."""
    model = tiny.model("llama")
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, out: out + 0.1 * (out - out[:1]) * (out.shape[0] > 1))
    model.model.layers[0].self_attn.is_causal = True
    before = model.set_attn_implementation

    def refuse(name: str) -> None:
        if name.startswith("preftune"):
            raise ValueError("no such attention")
        before(name)

    model.set_attn_implementation = refuse
    policy = Policy.choose(model, TREES)
    assert policy.path.alone and "one response at a time" in policy.path.why and "no such attention" in policy.path.why
    expected = torch.cat([tiny.textbook(model, [tree]) for tree in TREES])
    torch.testing.assert_close(policy(policy.pack(TREES)), expected, rtol=0, atol=1e-10)


def test_a_model_that_is_not_finite_is_refused() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        Policy.choose(model, TREES)


@pytest.mark.parametrize("training", [False, True])
def test_choosing_leaves_the_training_flag(training: bool) -> None:
    model = tiny.model("llama").train(training)
    policy = Policy.choose(model, TREES)
    assert policy.training == model.training == model.model.training == training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_forest_is_chosen_in_low_precision_too(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    policy = Policy.choose(tiny.model("llama", dtype=dtype), TREES, autocast=autocast)
    assert policy.path.layout == "forest", policy.path.why
    assert policy.autocast == autocast
    logps = policy(policy.pack(TREES))
    assert logps.dtype == torch.float32
    assert float((logps - tiny.textbook(tiny.model("llama"), TREES)).detach().abs().max()) < 0.5


def test_tolerance_follows_the_precision_of_the_products() -> None:
    logps = torch.tensor([-1.0, -40.0])
    kinds = (torch.float64, torch.float32, torch.bfloat16)
    assert [tolerance(logps, kind) for kind in kinds] == [1e-9, 2e-3, 0.6]
    assert tolerance(logps[:0], torch.float32) == 1e-3


def test_adapter_off_is_the_base_bit_for_bit() -> None:
    base = tiny.model("llama", dtype=torch.float32)
    base._preftune_inference_attention = "sdpa"
    path = Path("forest", "own")
    plain = Policy(copy.deepcopy(base), path)
    expected = plain(plain.pack(TREES)).detach()
    policy = Policy(add_lora(base, Lora(r=4), base="base", seed=0), path).eval()
    batch = policy.pack(TREES)
    assert torch.equal(policy(batch), expected), "fresh adapters add nothing"
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_()
    assert not torch.equal(policy(batch), expected)
    with policy.adapter_off():
        assert torch.equal(policy(batch), expected)


def test_an_adapter_on_the_head_is_not_passed_over() -> None:
    base = tiny.model("llama")
    base._preftune_inference_attention = "sdpa"
    model = add_lora(base, Lora(r=4, targets=["q_proj", "lm_head"]), base="base", seed=0).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    policy = Policy(model, Path("forest", "own")).eval()
    assert policy.path.head == "model" and "adapter" in policy.path.why
    with tiny.Float64():
        logps = policy(policy.pack(TREES))
        expected = tiny.textbook(tiny.oracle(model.get_base_model()), TREES)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-10)
    logps.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lm_head.lora" in name)


def test_head_shapes() -> None:
    found = {name: head_shape(tiny.config(name)) for name in ("llama", "cohere", "granite", "gemma2")}
    assert found == {
        "llama": HeadShape(1.0, None), "cohere": HeadShape(0.3, None),
        "granite": HeadShape(1 / 1.7, None), "gemma2": HeadShape(1.0, 3.0),
    }  # fmt: skip


def test_response_sums() -> None:
    sums = response_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 0, 2, 2]), 4)
    assert sums.tolist() == [3.0, 0.0, 12.0, 0.0]


def test_a_frozen_score_can_be_followed_by_training() -> None:
    """Masks and rotations that were made in inference mode do not stay in the model."""
    from preftune.engine.score import score

    for name in ("llama", "gemma2", "phi3-longrope"):
        model = tiny.model(name)
        policy = Policy(model, Path("forest", "own"))
        score(policy, TREES)
        policy(policy.pack(TREES)).sum().backward()
        assert all(torch.isfinite(g).all() for g in tiny.gradients(model).values())


@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_bf16_gradients_are_no_further_from_float32_than_the_models_own(name: str) -> None:
    """Under the same autocast, on padded rows by the model's own forward."""
    model = tiny.model(name, dtype=torch.float32)
    paths = {"exact": (Path("rows", "model"), None), "theirs": (Path("rows", "model"), torch.bfloat16),
             "ours": (Path("forest", "own"), torch.bfloat16)}  # fmt: skip
    found = {}
    for key, (path, autocast) in paths.items():
        policy = Policy(model, path, autocast=autocast).train()
        policy(policy.pack(TREES)).square().mean().backward()
        found[key] = torch.cat([g.flatten() for g in tiny.gradients(model).values()])
    theirs, ours = (float((found[key] - found["exact"]).norm()) for key in ("theirs", "ours"))
    assert 0 < ours < 1.5 * theirs
