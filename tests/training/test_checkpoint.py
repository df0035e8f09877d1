"""Checkpoints: whole or not there, and never believed without a check."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from preftune.errors import StorageError
from preftune.training import checkpoint


class Net(nn.Module):
    """Two trainable tensors, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def trained(steps: int = 2) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(steps)
    net = Net()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net.a(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return net, optimizer


def save(folder: Path, step: int, *, keep: int = 2, **state: Any) -> Path:
    return checkpoint.save(folder, *trained(), {"step": step, **state}, keep=keep)


def test_it_reads_back_equal(tmp_path: Path) -> None:
    net, optimizer = trained(3)
    checkpoint.save(tmp_path, net, optimizer, {"step": 7, "stopping": {"best": 0.1}}, keep=2)
    found, problems = checkpoint.newest(tmp_path)
    assert found is not None and not problems
    assert found.step == 7 and found.state["stopping"] == {"best": 0.1}
    other, theirs = trained(1)
    checkpoint.restore(found, other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    for model, optim in ((net, optimizer), (other, theirs)):  # the next update is the same, so the moments are
        optim.zero_grad()
        model.a(torch.ones(4, 3)).sum().backward()
        optim.step()
    assert torch.equal(net.a.weight, other.a.weight)


def test_only_the_newest_are_kept_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (5, 10, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1_000_000


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 5, finished=False)
    save(tmp_path, 5, finished=True)
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None and found.state["finished"] is True


@pytest.mark.parametrize("crash_at", [1, 2])
def test_a_crash_while_a_step_is_saved_again_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    save(tmp_path, 5, keep=1, finished=False)
    replace, folders = os.replace, []

    def crashing(source: Any, target: Any) -> None:
        if Path(target).parent == tmp_path:
            folders.append(target)
            if len(folders) == crash_at:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crashing)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 5, keep=1, finished=True)
    monkeypatch.undo()
    found, problems = checkpoint.newest(tmp_path)
    assert found is not None and not problems and found.state["finished"] is False
    save(tmp_path, 5, keep=1, finished=True)
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None and found.state["finished"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"], "no litter"


@given(name=st.sampled_from(["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]),
       how=st.sampled_from(["flip", "cut", "gone", "empty"]), where=st.floats(0, 0.999))  # fmt: skip
def test_any_damage_is_found(tmp_path_factory: pytest.TempPathFactory, name: str, how: str, where: float) -> None:
    folder = tmp_path_factory.mktemp("damage")
    save(folder, 1)
    file = save(folder, 2) / name
    content = bytearray(file.read_bytes())
    at = int(where * len(content))
    if how == "flip":
        content[at] ^= 0x10
        file.write_bytes(content)
    elif how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: at if how == "cut" else 0])
    found, problems = checkpoint.newest(folder)
    assert found is not None and found.step == 1
    assert len(problems) == 1 and f"{file.parent}: not used: " in problems[0]


@pytest.mark.parametrize("manifest", ["{}", "[]", "null", "{", '{"weights.safetensors": 3}'])
def test_a_manifest_that_says_nothing_is_not_believed(tmp_path: Path, manifest: str) -> None:
    (save(tmp_path, 1) / "manifest.json").write_text(manifest)
    found, problems = checkpoint.newest(tmp_path)
    assert found is None and "manifest" in problems[0]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") == (None, [])


def test_a_crash_at_any_system_call_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that change the disk fail one after the other; whatever fails, what is found is whole."""
    save(tmp_path, 1)
    seen: list[str] = []
    limit = 0

    def failing(name: str, real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if len(seen) >= limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            seen.append(name)
            return real(*arguments, **named)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
    for limit in range(50):  # noqa: B007
        seen.clear()
        try:
            save(tmp_path, 2)
        except StorageError as error:
            assert "the disk is full" in str(error)
            found, problems = checkpoint.newest(tmp_path)
            assert found is not None and found.step in (1, 2) and not problems
        else:
            break
    assert 5 < limit < 49
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {*manifest, "manifest.json"} == {p.name for p in folder.iterdir()}
    assert all(entry["bytes"] == (folder / name).stat().st_size for name, entry in manifest.items())
