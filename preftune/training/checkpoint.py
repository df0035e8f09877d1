"""What an interrupted run goes on from: safetensors and JSON, whole or not there, and checked before it is believed.

    checkpoints/step-000100/
        weights.safetensors      the trainable weights, by name
        optimizer.safetensors    "exp_avg.NAME", "exp_avg_sq.NAME"
        reference.safetensors    a reference that moves, and average.safetensors a moving average, where there are such
        critic-….safetensors     weights and moments of a critic, and replies.safetensors those that are still learnt from
        state.json               step, early stopping, what the run must find again
        manifest.json            size and sha256 of each file

A checkpoint is written to a hidden folder, synced, and renamed; one that does not match its manifest is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preftune.files import storage, sync_folder, write_atomic


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk that has been checked against its manifest."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates done when it was written; the next step to run."""
        return int(self.state["step"])

    def weights(self, name: str) -> dict[str, Tensor]:
        """Further tensors that were saved with it."""
        from safetensors.torch import load_file

        return load_file(self.folder / f"{name}.safetensors")


def trainable(policy: nn.Module) -> dict[str, Tensor]:
    """The trainable weights by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def save(
    folder: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Writes checkpoint step-N of `state["step"]` into `folder` and removes all but the newest `keep`. Raises StorageError.

    beside: further tensors by the name of their file: other states of the weights, a critic, replies that are in hand.
    """
    final = folder / f"step-{state['step']:06d}"
    with storage(final, "write this checkpoint"):
        for stale in folder.glob(".step-*.tmp"):  # a crash left it
            shutil.rmtree(stale)
        temporary = folder / f".{final.name}.tmp"
        temporary.mkdir(parents=True)
        write_weights(temporary / "weights.safetensors", trainable(policy))
        write_weights(temporary / "optimizer.safetensors", moments_of(policy, optimizer))
        for name, weights in (beside or {}).items():
            write_weights(temporary / f"{name}.safetensors", weights)
        write_atomic(temporary / "state.json", json.dumps(state))
        manifest = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(temporary.iterdir())}
        write_atomic(temporary / "manifest.json", json.dumps(manifest))
        _put_back(folder)
        aside = folder / f".{final.name}.old"
        if final.exists():  # never a moment without a whole checkpoint: a crash from here on is mended by `newest`
            os.replace(final, aside)
        os.replace(temporary, final)
        sync_folder(folder)
        shutil.rmtree(aside, ignore_errors=True)
        for old in _in_order(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each newer one that is not."""
    problems: list[str] = []
    _put_back(folder)
    for candidate in reversed(_in_order(folder)):
        problem = _damage(candidate)
        if problem is None:
            return Checkpoint(candidate, json.loads((candidate / "state.json").read_text())), problems
        problems.append(f"{candidate}: not used: {problem}")
    return None, problems


def _put_back(folder: Path) -> None:
    """Undoes a replacement that a crash broke off: the former checkpoint returns, unless the new one is in its place."""
    for aside in folder.glob(".step-*.old"):
        final = folder / aside.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            shutil.rmtree(aside)
        else:
            os.replace(aside, final)


def _in_order(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda p: (len(p.name), p.name))  # step-1000000 comes after step-999999


def restore(checkpoint: Checkpoint, policy: nn.Module, optimizer: torch.optim.Optimizer, *, prefix: str = "") -> None:
    """Puts weights and optimizer moments back as they were. prefix: of the files' names, of a model beside the policy."""
    from safetensors.torch import load_file

    load_weights(checkpoint.folder / f"{prefix}weights.safetensors", policy)
    moments = load_file(checkpoint.folder / f"{prefix}optimizer.safetensors")
    fused = optimizer.defaults.get("fused", False)  # it counts steps on the device
    for name, parameter in trainable(policy).items():
        if f"exp_avg.{name}" not in moments:
            continue  # no update has touched it yet
        optimizer.state[parameter] = {
            "step": moments[f"step.{name}"].to(parameter.device if fused else "cpu"),
            "exp_avg": moments[f"exp_avg.{name}"].to(parameter.device),
            "exp_avg_sq": moments[f"exp_avg_sq.{name}"].to(parameter.device),
        }


def write_weights(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors as one safetensors file, handed to the disk."""
    from safetensors.torch import save_file

    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, file)
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def load_weights(file: Path, policy: nn.Module) -> None:
    """Trainable weights from a file that `write_weights` wrote."""
    from safetensors.torch import load_file

    stored = load_file(file)
    with torch.no_grad():
        for name, parameter in trainable(policy).items():
            parameter.copy_(stored[name])


def moments_of(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments of the trainable weights, as a checkpoint names them."""
    found = {}
    for name, parameter in trainable(policy).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}.{name}"] = value
    return found


def _damage(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            file = folder / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            if _sha256(file) != expected["sha256"]:
                return f"{name} is not what was written (sha256 differs)"
        return (
            None
            if {"weights.safetensors", "optimizer.safetensors", "state.json"} <= set(manifest)
            else "its manifest is incomplete"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
