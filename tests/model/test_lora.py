from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers_for_tests import byte_level

from preftune.config import Lora
from preftune.errors import ConfigError, ModelError
from preftune.model.export import merged, save_model
from preftune.model.load import load_model
from preftune.model.lora import add_lora, is_lora, plain, quiet_peft

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.model("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, *, dtype: torch.dtype = torch.float32, trained: bool = True, **settings: Any) -> Any:
    model = add_lora(load_model(base, dtype=dtype), Lora(**{"r": 4, **settings}), base=str(base), seed=0).eval()
    if trained:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    return model


def test_fresh_adapters_change_nothing_and_train_alone(base: Path) -> None:
    model = adapted(base, trained=False)
    assert torch.equal(model(IDS).logits, load_model(base).eval()(IDS).logits)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in n for n in trainable)
    assert not any("lm_head" in n for n in trainable)
    assert is_lora(model) and not is_lora(plain(model))


def test_adapter_off_is_the_base_bit_for_bit(base: Path) -> None:
    model, expected = adapted(base), load_model(base).eval()(IDS).logits
    assert not torch.equal(model(IDS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)


def test_the_seed_decides_the_start_and_nothing_else(base: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = adapted(base, trained=False)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    torch.manual_seed(2)
    second = adapted(base, trained=False)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adapters_learn_in_float32_over_a_bf16_base(base: Path) -> None:
    model = adapted(base, dtype=torch.bfloat16, trained=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_saved_adapters_load_with_peft_and_merge(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = adapted(base)
    expected = model(IDS).logits
    save_model(model, byte_level(), tmp_path / "adapter")
    with quiet_peft():
        again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        by_peft = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(by_peft.eval()(IDS).logits, expected)
    torch.testing.assert_close(load_model(tmp_path / "adapter").eval()(IDS).logits, expected, rtol=0, atol=1e-5)
    save_model(model, byte_level(), tmp_path / "merged", merge=True)
    torch.testing.assert_close(load_model(tmp_path / "merged").eval()(IDS).logits, expected, rtol=0, atol=1e-5)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_merging_leaves_the_model_as_it_is(base: Path) -> None:
    model = adapted(base)
    expected = model(IDS).logits
    assert not is_lora(merged(model))
    assert torch.equal(model(IDS).logits, expected) and is_lora(model)


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj", "up_proj"]])
def test_targets(base: Path, targets: Any) -> None:
    names = {
        n.split(".lora_")[0].rsplit(".", 1)[-1] for n, _ in adapted(base, targets=targets).named_parameters() if "lora_" in n
    }
    assert names == ({targets} if isinstance(targets, str) else set(targets))


def test_a_target_that_is_not_there_is_said(base: Path) -> None:
    with pytest.raises(ConfigError, match="lora.targets: 'q_prj' is no linear layer of this model; did you mean q_proj"):
        adapted(base, targets=["q_prj"])


def test_the_linear_layers_of_gpt2_are_targets_too(tmp_path: Path) -> None:
    tiny.model("gpt2", dtype=torch.float32).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    peft = add_lora(model, Lora(r=2, targets=["c_attn"]), base="b", seed=0)
    assert any("c_attn.lora_A" in n for n, _ in peft.named_parameters())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"{", r"adapter_config.json: not readable as JSON"),
        ("adapter_config.json", b"[]", r"adapter_config.json: is a JSON list; expected an object"),
        ("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": null}', r"base_model_name_or_path"),
        ("adapter_model.safetensors", b"torn", r"the adapter could not be loaded"),
        ("adapter_model.safetensors", None, r"adapter_model.safetensors is not in it"),
    ],
)
def test_a_broken_adapter_is_said_to_be(base: Path, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    folder = tmp_path / "adapter"
    save_model(adapted(base), byte_level(), folder)
    if content is None:
        (folder / name).rename(folder / "adapter_model.bin")
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_base_in_half_precision_gives_the_same_bits_under_autocast(tied: bool) -> None:
    from preftune.model.lora import cast_frozen

    base = tiny.model("llama", dtype=torch.float32)
    base._preftune_inference_attention = "sdpa"
    if tied:
        base.lm_head.weight = base.model.embed_tokens.weight
    model = add_lora(base, Lora(r=4), base="base", seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    ids = torch.arange(12)[None]

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits
        learning = [p for p in model.parameters() if p.requires_grad]
        return logits, list(torch.autograd.grad(logits.float().square().sum(), learning))

    before, gradients = run()
    bytes_before = sum(p.numel() * p.element_size() for p in model.parameters())
    cast_frozen(model, torch.bfloat16)
    after, gradients_after = run()
    assert torch.equal(before, after) and all(torch.equal(a, b) for a, b in zip(gradients, gradients_after, strict=True))
    assert sum(p.numel() * p.element_size() for p in model.parameters()) < bytes_before
    kinds = {name.rsplit(".", 2)[-2]: p.dtype for name, p in model.named_parameters()}
    assert kinds["embed_tokens"] == kinds["norm"] == torch.float32, "what autocast leaves alone"
    assert kinds.get("lm_head", torch.float32) == (torch.float32 if tied else torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_what_would_be_rounded_stays_where_adapters_are_to_be_merged() -> None:
    from preftune.model.lora import cast_frozen

    base = tiny.model("llama", dtype=torch.float32)
    base._preftune_inference_attention = "sdpa"
    with torch.no_grad():
        for p in base.model.layers[0].parameters():
            p.copy_(p.bfloat16())  # as a model that was published so
    model = add_lora(base, Lora(r=4), base="base", seed=0)
    expected = merged(model).state_dict()
    cast_frozen(model, torch.bfloat16, exactly=True)
    kinds = [layer.mlp.down_proj.base_layer.weight.dtype for layer in plain(model).model.layers]
    assert kinds == [torch.bfloat16, torch.float32]
    found = merged(model).state_dict()
    assert all(found[n].dtype == x.dtype and torch.equal(found[n], x) for n, x in expected.items())
    assert plain(model).model.layers[0].mlp.down_proj.base_layer.weight.dtype == torch.bfloat16, (
        "the model itself is left alone"
    )


def test_the_head_of_a_reward_model_keeps_its_digits() -> None:
    from preftune.model.lora import cast_frozen
    from preftune.model.reward import with_scalar_head

    base = with_scalar_head(tiny.model("llama", dtype=torch.float32), seed=0)
    base._preftune_inference_attention = "sdpa"
    model = add_lora(base, Lora(r=4), base="base", seed=0)
    cast_frozen(model, torch.bfloat16)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if ".score." in name)
    assert plain(model).model.layers[0].mlp.down_proj.base_layer.weight.dtype == torch.bfloat16
