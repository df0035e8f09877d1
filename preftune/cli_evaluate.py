"""The verbs that say whether it worked. `preftune.cli` takes them in."""

from __future__ import annotations

from collections.abc import Callable

VERBS: dict[str, Callable[..., None]] = {}
"""Verb -> function, in the order of the help."""
