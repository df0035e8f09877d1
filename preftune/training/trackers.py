"""The metric stream, sent to TensorBoard or Weights & Biases as well. Each is an extra and a few lines."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from preftune.errors import ConfigError
from preftune.run import Run

Tracker = Callable[[int, str, dict[str, float]], None]
"""Takes a step, a split and its metrics by name."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError where the package of a tracker is not installed."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is not the package
            raise ConfigError(f"trackers: {name} is not installed; pip install 'preftune[{name}]'")


def open_trackers(names: Sequence[str], run: Run, *, step: int) -> list[Tracker]:
    """A tracker for each name, for a run that begins or goes on at `step`."""
    return [{"tensorboard": _tensorboard, "wandb": _wandb}[name](run, step) for name in names]


def _tensorboard(run: Run, first: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # what an interrupted run wrote at `first` and later comes again
    writer: Any = SummaryWriter(str(run.path / "tensorboard"), purge_step=first)

    def track(step: int, split: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(f"{split}/{name}", value, step)
        writer.flush()

    return track


def _wandb(run: Run, first: int) -> Tracker:
    import wandb

    began = (run.read_json(run.env_file) or {}).get("started", "")  # written once: a resumed run is the same run there, too
    name = hashlib.blake2b(f"{run.path.resolve()} {began}".encode(), digest_size=8).hexdigest()
    settings = run.config().model_dump(mode="json")
    session = wandb.init(dir=str(run.path), id=name, name=run.path.name, config=settings, resume="allow")

    def track(step: int, split: str, metrics: dict[str, float]) -> None:
        session.log({f"{split}/{name}": value for name, value in metrics.items()} | {"step": step})

    return track
