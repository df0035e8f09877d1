from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import byte_level

from preftune.errors import ConfigError, ModelError
from preftune.model.attention import own_attention
from preftune.model.load import check_vocabulary, context_length, load, load_model, open_renderer, resolve, stop_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder, float32, vocabulary 420."""
    where = tmp_path / "model"
    tiny.model("llama", dtype=torch.float32, vocab_size=420).save_pretrained(where)
    byte_level().save_pretrained(where)
    return where


def test_a_whole_folder_is_loaded(folder: Path) -> None:
    model, tokenizer = load(folder)
    expected = tiny.model("llama", dtype=torch.float32, vocab_size=420)
    ids = torch.tensor([tokenizer("Hello there").input_ids])
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in load(folder, dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}


# --- what can be wrong -------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def encoder_decoder(folder: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=8, num_layers=1, vocab_size=420).save_pretrained(folder)


def write(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


BROKEN: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"not a model folder: neither config.json nor .*\(found: .*safetens"),
    "config is not JSON": (write("config.json", b'{"model_type": "lla'), r"config.json: not readable as JSON: .*line 1"),
    "config is no text": (write("config.json", b"\xff\xfe\x00"), r"config.json: not readable as JSON"),
    "config is a list": (write("config.json", b"[]"), r"config.json: is a JSON list; expected an object"),
    "config without a type": (write("config.json", b"{}"), r"config.json: transformers does not know this architecture"),
    "unknown architecture": (lambda f: edit(f, model_type="lama"), r"does not know this architecture"),
    "a setting of the wrong type": (lambda f: edit(f, hidden_size="wide"), r"config.json: .*hidden_size"),
    "code of its own": (
        lambda f: edit(f, model_type="mine", auto_map={"AutoConfig": "code.Config"}), r"run code of its own \(auto_map"),
    "an encoder-decoder": (encoder_decoder, r"an encoder-decoder model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no \*.safetensors in it: the weights are missing"),
    "torn weights": (truncate, r"the weights could not be loaded: "),
    "weights that are none": (write("model.safetensors", b"version https://git-lfs"), r"the weights could not be loaded: "),
    "a tensor is missing": (
        lambda f: weights(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"1 weights of LlamaForCausalLM are not in .*first: model.layers.1.mlp.up_proj.weight.*start at random"),
    "a tensor of another shape": (
        lambda f: weights(f, lambda t: t.update({"model.norm.weight": torch.ones(5)})), r"the weights could not be loaded"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_said_to_be(folder: Path, what: str) -> None:
    damage, message = BROKEN[what]
    damage(folder)
    with pytest.raises(ModelError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


def test_weights_that_are_not_used_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, num_hidden_layers=1)
    with caplog.at_level("WARNING", logger="preftune"):
        load(folder)
    assert "9 tensors have no place in LlamaForCausalLM and are not used (first: model.layers.1" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], r"no tokenizer in it \(tokenizer.json is missing\)"),
        (write("tokenizer.json", b"{"), r"the tokenizer could not be loaded: "),
        (write("tokenizer_config.json", b"{"), r"the tokenizer could not be loaded: "),
        (write("tokenizer.json", b"{}"), r"the tokenizer (could not be loaded|is empty): "),
    ],
)
def test_a_broken_tokenizer_is_said_to_be(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_and_never_run(folder: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "it ran"
    (folder / name).write_bytes(pickle.dumps(_Evil(marker)))
    load(folder)  # safetensors are there: the pickle is not looked at
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"the weights are pickles \({name}\), which can run code"):
        load(folder)
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists(), "it would have"


def test_code_beside_a_known_architecture_does_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    edit(folder, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    assert type(load(folder).model).__module__.startswith("transformers.")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/nothing", r"nothing: no such folder, and not a hub id"),
        ("./nothing/here", r"no such folder, and not a hub id"),
        ("{tmp}/file", r"is a file; expected a model folder"),
        ("{tmp}/empty", r"not a model folder: .*\(found: nothing\)"),
        ("{tmp}/run", r"this run has no model yet"),
        ("someone/something", r"the hub did not give it"),
    ],
)
def test_a_path_that_is_no_model(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ModelError, match=message):
        resolve(path.format(tmp=tmp_path))


def test_a_run_stands_for_its_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    folder.rename(tmp_path / "run" / "model")
    assert resolve(tmp_path / "run") == tmp_path / "run" / "model"


# --- what else is read -------------------------------------------------------------------------------------------------


def test_lengths_and_stop_tokens(folder: Path) -> None:
    assert context_length(folder) == 64
    assert open_renderer(folder).max_length == 64
    assert open_renderer(folder, usual=32).max_length == 32
    assert open_renderer(folder, max_length=20, usual=32).max_length == 20
    with pytest.raises(ConfigError, match="batch.max_length: 65 is longer than the model's context of 64"):
        open_renderer(folder, max_length=65)
    file = folder / "generation_config.json"
    for written, expected in ((7, (7,)), ([7, 9], (7, 9)), (None, ())):
        file.write_text(json.dumps({"eos_token_id": written}))
        assert stop_ids(folder) == expected
    file.unlink()
    assert stop_ids(folder) == ()


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"x: the tokenizer knows 420 ids but the model embeds 61"):
        check_vocabulary(tiny.model("llama"), byte_level(), "x")
    check_vocabulary(tiny.model("llama", vocab_size=500), byte_level(), "x")  # rows to spare are usual


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.0}),
        ("bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("gpt-neox", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_the_dropout_of_a_base_model_is_off(tmp_path: Path, name: str, changes: dict[str, float]) -> None:
    tiny.model(name, dtype=torch.float32, **changes).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    expected = model.eval()(ids).logits
    assert torch.equal(model.train()(ids).logits, expected)
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {k: written[k] for k in changes} == changes, "what the configuration says is kept"


def test_the_attention_of_each_kind() -> None:
    found = {name: own_attention(tiny.model(name)) for name in ("llama", "gemma2", "gpt-oss", "gemma3", "mamba")}
    assert found == {"llama": "sdpa", "gemma2": "eager", "gpt-oss": "eager", "gemma3": "sdpa", "mamba": "eager"}
