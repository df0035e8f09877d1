from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers_for_tests import CHATML, byte_level

from preftune.engine.policy import Path as ScoringPath
from preftune.engine.policy import Policy
from preftune.errors import StorageError
from preftune.model import export
from preftune.model.export import save_model
from preftune.model.load import load, load_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gpt2", "mixtral"])
def test_a_round_trip_keeps_every_logit(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.model(name, dtype=torch.float32)
    expected = model(IDS).logits
    Policy(model, ScoringPath("forest", "own"))  # as it is after training
    save_model(model, byte_level(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out").eval()(IDS).logits, load_model(tmp_path / "out").eval()(IDS).logits)
        torch.testing.assert_close(load_model(tmp_path / "out").eval()(IDS).logits, expected, rtol=0, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(plain.eval()(IDS).logits, expected, rtol=0, atol=1e-5)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    assert b"preftune" not in (tmp_path / "out" / "config.json").read_bytes(), "nothing of the training's attention stays"


def test_the_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    save_model(tiny.model("llama", dtype=torch.float32), byte_level(), tmp_path / "out", chat_template=CHATML)
    names = set(contents(tmp_path / "out"))
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt"))]
    assert load(tmp_path / "out").tokenizer.chat_template == CHATML
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o755
    assert os.listdir(tmp_path) == ["out"], "nothing is left beside it"


@pytest.mark.parametrize("when", ["weights", "tokenizer", "rename", "second rename"])
def test_a_failure_leaves_the_old_model(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny.model("llama", dtype=torch.float32), byte_level(), tmp_path / "out")
    before = contents(tmp_path / "out")
    new, tokenizer = tiny.model("llama", dtype=torch.float32, seed=1), byte_level()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    if when == "weights":
        monkeypatch.setattr(new, "save_pretrained", full)
    elif when == "tokenizer":
        monkeypatch.setattr(tokenizer, "save_pretrained", full)
    else:
        renames, real = [when == "rename"], os.replace

        def replace(source: Any, target: Any) -> None:
            if Path(target) == tmp_path / "out" and len(renames) == 1 or renames[0]:
                renames.append(True)
                renames[0] = False
                full()
            real(source, target)

        monkeypatch.setattr(export.os, "replace", replace)
    with pytest.raises(StorageError, match="cannot save the model: the disk is full"):
        save_model(new, tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"], "nothing is left beside it"


@pytest.mark.parametrize("moment", ["before the renames", "between the renames", "after the renames"])
def test_what_a_kill_leaves_is_cleared_up_without_loss(tmp_path: Path, moment: str) -> None:
    out = tmp_path / "out"
    save_model(tiny.model("llama", dtype=torch.float32), byte_level(), out)
    before = contents(out)
    (tmp_path / ".out.abc").mkdir()
    (tmp_path / ".out.abc" / "model.safetensors").write_bytes(b"half")
    if moment != "before the renames":
        (tmp_path / ".out.old.xyz").mkdir()
        out.rename(tmp_path / ".out.old.xyz" / "out")
        if moment == "after the renames":
            out.mkdir()
    failing = tiny.model("llama", dtype=torch.float32, seed=1)
    failing.save_pretrained = None  # nothing new takes its place
    with pytest.raises(TypeError):
        save_model(failing, byte_level(), out)
    assert contents(out) == ({} if moment == "after the renames" else before)
    assert os.listdir(tmp_path) == ["out"]


def test_a_new_model_takes_the_place_of_the_old(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_model(tiny.model("llama", dtype=torch.float32, seed=seed), byte_level(), tmp_path / "out")
        (tmp_path / "out" / "note").write_text("of the old")
    save_model(tiny.model("llama", dtype=torch.float32, seed=2), byte_level(), tmp_path / "out")
    assert not (tmp_path / "out" / "note").exists()
    expected = tiny.model("llama", dtype=torch.float32, seed=2)(IDS).logits
    assert torch.equal(load_model(tmp_path / "out").eval()(IDS).logits, expected)


def test_a_generation_config_that_contradicts_itself_is_saved(tmp_path: Path) -> None:
    """Published models come with a temperature beside do_sample=false, which transformers refuses to save."""
    model = tiny.model("llama", dtype=torch.float32)
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = False
    save_model(model, byte_level(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6
