from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from preftune.model import identity as module
from preftune.model.identity import file_digest, identity


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny.model("llama", dtype=torch.float32).save_pretrained(folder)
    return folder


def test_identity_is_that_of_weights_and_configuration(saved: Path, tmp_path: Path) -> None:
    own = identity(saved, "float32")
    copy = tmp_path / "elsewhere"
    shutil.copytree(saved, copy)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    (copy / "README.md").write_text("a note")
    assert identity(copy, "float32") == own, "neither place nor dates"
    assert identity(copy, "float32/bfloat16") != own
    weights = (copy / "model.safetensors").read_bytes()
    for at in (len(weights) // 2, len(weights) - 1):
        (copy / "model.safetensors").write_bytes(weights[:at] + bytes([weights[at] ^ 1]) + weights[at + 1 :])
        assert identity(copy, "float32") != own, "any bit of the weights"
    (copy / "model.safetensors").write_bytes(weights)
    assert identity(copy, "float32") == own
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert identity(copy, "float32") != own


def test_identity_of_an_adapter_includes_its_base(saved: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(saved), "r": 2}))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    found = {identity(saved, "x"), identity(adapter, "x")}
    (adapter / "adapter_model.safetensors").write_bytes(b"weightz")
    found.add(identity(adapter, "x"))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(saved), "r": 3}))
    found.add(identity(adapter, "x"))
    with (saved / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    found.add(identity(adapter, "x"))
    assert len(found) == 5


def test_a_digest_is_that_of_the_content_however_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 8)
    file, found = tmp_path / "file", set()
    contents = [b"", b"a", b"ab", b"12345678", b"123456789", b"12345678" * 2, b"123456781234567", b"87654321" + b"12345678"]
    for content in contents:
        file.write_bytes(content)
        found.add(file_digest(file))
        assert len(file_digest(file)) == 32 and file_digest(file) == file_digest(file)
    assert len(found) == len(contents)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weight files whose bytes are read."""
    read: list[str] = []
    digest = module.file_digest

    def counted(file: Path) -> bytes:
        if file.suffix == ".safetensors":
            read.append(file.name)
        return digest(file)

    monkeypatch.setattr(module, "file_digest", counted)
    return read


def test_a_second_start_reads_no_weights(
    saved: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED", -1e9)  # the file is new: seconds must pass before its digest is kept
    cache, bare = tmp_path / "cache", identity(saved, "x")
    reads.clear()
    assert identity(saved, "x", cache=cache) == bare and reads == ["model.safetensors"]
    assert identity(saved, "x", cache=cache) == bare and reads == ["model.safetensors"]
    assert identity(saved, "y", cache=cache) != bare and reads == ["model.safetensors"], "another precision, the same weights"
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert identity(saved, "x", cache=cache) != bare and reads == ["model.safetensors"], "what is small is read each time"


def test_changed_weights_are_read_again(saved: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where size and date of the file are what they were."""
    monkeypatch.setattr(module, "_SETTLED", -1e9)
    file, cache = saved / "model.safetensors", tmp_path / "cache"
    found, before = [identity(saved, "x", cache=cache)], file.stat()
    whole = file.read_bytes()
    with file.open("r+b") as stream:  # in place
        stream.write(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    found.append(identity(saved, "x", cache=cache))
    copy = tmp_path / "copy"  # another file in its place
    copy.write_bytes(whole[:-1] + bytes([whole[-1] ^ 2]))
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.replace(file)
    found.append(identity(saved, "x", cache=cache))
    assert len(set(found)) == 3 and len(reads) == 3


def test_what_has_just_been_written_is_read_again(saved: Path, tmp_path: Path, reads: list[str]) -> None:
    """Its time of change is too coarse to tell a second change at once."""
    for _ in range(2):
        identity(saved, "x", cache=tmp_path / "cache")
    assert reads == ["model.safetensors"] * 2


def test_a_damaged_cache_is_no_answer(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLED", -1e9)
    own = identity(saved, "x", cache=tmp_path)
    (kept,) = (tmp_path / "weights").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert identity(saved, "x", cache=tmp_path) == own
