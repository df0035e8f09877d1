"""The one page that lists everything that a setting can name: objectives and data formats.

An entry is a name and the place of a function, imported when somebody asks for it, so that this page costs nothing to read
and `preftune --help` never imports torch:

    >>> sorted(LOSSES)
    ['dpo', 'sft']
    >>> LOSSES["dpo"]            # imports preftune.losses.dpo
    <function dpo ...>

A new objective is one function and one line here; so is a new data format.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from preftune.errors import ConfigError, nearest


class Registry(Mapping[str, Callable[..., Any]]):
    """Names mapped to functions that are imported on first use."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        """`entries` maps a name to "module:function"; `kind` is how errors call such a thing."""
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """The function called `name`; raises ConfigError with the nearest known name."""
        if name not in self._entries:
            raise ConfigError(f"{self.kind} {name!r} does not exist: {nearest(name, self._entries)}")
        module, function = self._entries[name].split(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:  # Mapping's would import the entry
        return name in self._entries


LOSSES = Registry(
    "loss",
    {
        "dpo": "preftune.losses.dpo:dpo",
        "sft": "preftune.losses.sft:sft",
    },
)
"""Objectives: a pure function from named log-probs to one value per unit. The record it takes says what is computed."""

FORMATS = Registry(
    "data format",
    {  # order matters: a row is read as the first format whose columns it has
        "alpaca_eval": "preftune.data.formats:alpaca_eval",
        "sharegpt": "preftune.data.formats:sharegpt",
        "prompt_chosen_rejected": "preftune.data.formats:prompt_chosen_rejected",
        "hh": "preftune.data.formats:hh",
        "chosen_rejected": "preftune.data.formats:chosen_rejected",
        "prompt_completion_label": "preftune.data.formats:prompt_completion_label",
        "prompt_responses": "preftune.data.formats:prompt_responses",
        "prompt_completion": "preftune.data.formats:prompt_completion",
        "messages": "preftune.data.formats:messages",
        "conversations": "preftune.data.formats:conversations",
    },
)
"""Data formats: a function from one row of a file to one Example."""
