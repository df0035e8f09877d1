"""The metric stream, sent to TensorBoard or Weights & Biases as well. Each is an extra and a few lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from preftune.errors import ConfigError
from preftune.run import Run

Tracker = Callable[[int, str, dict[str, float]], None]
"""Takes a step, a split and its metrics by name."""


def open_trackers(names: Sequence[str], run: Run) -> list[Tracker]:
    """A tracker for each name. Raises ConfigError where its package is not installed."""
    return [{"tensorboard": _tensorboard, "wandb": _wandb}[name](run) for name in names]


def _tensorboard(run: Run) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _not_installed("tensorboard") from None
    writer: Any = SummaryWriter(str(run.path / "tensorboard"))

    def track(step: int, split: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(f"{split}/{name}", value, step)
        writer.flush()

    return track


def _wandb(run: Run) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise _not_installed("wandb") from None
    session = wandb.init(dir=str(run.path), name=run.path.name, config=run.config().model_dump(mode="json"), resume="allow")

    def track(step: int, split: str, metrics: dict[str, float]) -> None:
        session.log({f"{split}/{name}": value for name, value in metrics.items()} | {"step": step})

    return track


def _not_installed(name: str) -> ConfigError:
    return ConfigError(f"trackers: {name} is not installed; pip install 'preftune[{name}]'")
