"""preftune aligns a language model with preferences, end to end.

    import preftune
    run = preftune.train({"model": "base", "data": "pairs.jsonl", "loss.beta": 0.1})

Importing this costs milliseconds: torch is loaded when something needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preftune.api import train as train
    from preftune.config import Config as Config
    from preftune.data.types import Example as Example
    from preftune.data.types import Judgment as Judgment
    from preftune.data.types import Message as Message
    from preftune.errors import PreftuneError as PreftuneError
    from preftune.model.load import load as load
    from preftune.registry import FORMATS as FORMATS
    from preftune.registry import LOSSES as LOSSES
    from preftune.run import Run as Run
    from preftune.scoring import score as score
    from preftune.sweeping.job import sweep as sweep

__version__ = "0.1.0"

_HOME = {
    "Config": "preftune.config",
    "Example": "preftune.data.types",
    "FORMATS": "preftune.registry",
    "Judgment": "preftune.data.types",
    "LOSSES": "preftune.registry",
    "Message": "preftune.data.types",
    "PreftuneError": "preftune.errors",
    "Run": "preftune.run",
    "load": "preftune.model.load",
    "score": "preftune.scoring",
    "sweep": "preftune.sweeping.job",
    "train": "preftune.api",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'preftune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
