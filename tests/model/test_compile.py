from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from worlds import World, command, finish, spawn

from preftune.api import train
from preftune.errors import ConfigError
from preftune.model.compile import decoder_layers, eager, use_compiled_layers
from preftune.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's compiler imports it


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "bloom"])
def test_the_layers_are_found_and_put_back(name: str) -> None:
    model = tiny.model(name)
    layers = decoder_layers(model)
    assert len(layers) == 2
    names = list(model.state_dict())
    use_compiled_layers(model, True)
    assert all(layer._compiled_call_impl is not None for layer in layers)
    with eager(model):
        assert all(layer._compiled_call_impl is None for layer in layers)
        model(input_ids=torch.arange(4)[None])
    assert all(layer._compiled_call_impl is not None for layer in layers)
    assert list(model.state_dict()) == names, "weights keep their names"
    use_compiled_layers(model, False)
    assert all(layer._compiled_call_impl is None for layer in layers)


def test_a_model_without_layers_is_refused() -> None:
    model = tiny.model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ConfigError, match="compile: LlamaForCausalLM has no plain list of decoder layers"):
        use_compiled_layers(model, True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_layers_train_to_the_same(world: World, tmp_path: Path) -> None:
    """In a process of its own, where no check of annotations stands in the compiler's way."""
    same = {"steps": 3, "batch__tokens_per_microbatch": 100}
    expected = train(world.settings(tmp_path / "eager", **same), quiet=True).metrics(split="train")
    words = world.words(tmp_path / "compiled", compile="true", **same)
    assert finish(spawn(command, ["train", *words], str(tmp_path / "log")), timeout=600) == [0], (tmp_path / "log").read_text()
    found = Run(tmp_path / "compiled").metrics(split="train")
    for eager_step, compiled_step in zip(expected, found, strict=True):
        assert abs(eager_step["loss"] - compiled_step["loss"]) < 1e-5
        assert abs(eager_step["grad_norm"] / compiled_step["grad_norm"] - 1) < 1e-3
