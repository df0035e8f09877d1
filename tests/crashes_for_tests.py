"""Processes that kill themselves at a given moment of a run; the product has no hook for this, its functions are wrapped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from worlds import command


def killed_at(words: list[str], log: str, moment: str, nth: int) -> None:
    """`preftune WORDS`, killed by SIGKILL just before the `nth` (from 1) time that `moment` is reached."""
    act_at(moment, nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
    command(words, log)


def signalled_at(
    words: list[str], log: str, moment: str, nth: int, number: int, environment: dict[str, str] | None = None
) -> None:
    """`preftune WORDS`, which receives signal `number` just before the `nth` time that `moment` is reached."""
    act_at(moment, nth, lambda: os.kill(os.getpid(), number))
    command(words, log, environment)


def act_at(moment: str, nth: int, act: Callable[[], None]) -> None:
    """Calls `act` in this process just before the `nth` (from 1) time that `moment` is reached."""
    owner, name = MOMENTS[moment]()
    wrapped, seen = getattr(owner, name), 0

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == nth:
            act()
        return wrapped(*arguments, **named)

    setattr(owner, name, watched)


def _optimizer() -> tuple[Any, str]:
    import torch

    return torch.optim.AdamW, "step"


def _weights() -> tuple[Any, str]:
    from preftune.training import checkpoint

    return checkpoint, "write_weights"


def _manifest() -> tuple[Any, str]:
    from preftune.training import checkpoint

    return checkpoint, "write_atomic"  # state.json, then manifest.json


def _rename() -> tuple[Any, str]:
    """The rename that makes a checkpoint one, and each file in it."""
    from preftune.training import checkpoint

    class Renaming:
        replace, fsync = staticmethod(os.replace), staticmethod(os.fsync)

    checkpoint.os = Renaming
    return Renaming, "replace"


def _removal() -> tuple[Any, str]:
    from preftune.training import checkpoint

    class Removing:
        import shutil as _real

        rmtree = staticmethod(_real.rmtree)

    checkpoint.shutil = Removing
    return Removing, "rmtree"


def _evaluation() -> tuple[Any, str]:
    from preftune.training import loop

    return loop, "held_out_metrics"


def _reference() -> tuple[Any, str]:
    from preftune.engine import score

    return score, "score"


def _samples() -> tuple[Any, str]:
    from preftune.training import job

    return job, "sample"


def _replies() -> tuple[Any, str]:
    from preftune.training import rollouts

    return rollouts, "sample"


def _replies_kept() -> tuple[Any, str]:
    from preftune.training import written

    return written, "write_weights"


def _model() -> tuple[Any, str]:
    from preftune.training import job

    return job, "save_model"


def _model_in_place() -> tuple[Any, str]:
    from preftune.model import export

    return export, "replace_folder"


def _report() -> tuple[Any, str]:
    from preftune import api

    return api, "write_report"


MOMENTS: dict[str, Callable[[], tuple[Any, str]]] = {
    "update": _optimizer,
    "weights of a checkpoint": _weights,
    "state and manifest of a checkpoint": _manifest,
    "rename of a checkpoint": _rename,
    "removal of a checkpoint": _removal,
    "evaluation": _evaluation,
    "reference log-probs": _reference,
    "samples": _samples,
    "replies": _replies,
    "replies on disk": _replies_kept,
    "saving the model": _model,
    "model into its place": _model_in_place,
    "report": _report,
}
