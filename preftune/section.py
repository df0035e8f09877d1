"""What the settings are made of: a `Section` is a part of them, `setting` says what one of them means."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field


def setting(help: str, *, unit: str = "", **bounds: Any) -> Any:
    """What one setting means: a line of help, its unit, and its bounds (`gt`, `ge`, `lt`, `le`).

    Used inside `Annotated[...]`, both in sections and for the keyword-only parameters of an objective.
    """
    return Field(description=help, json_schema_extra={"unit": unit} if unit else None, **bounds)


class Section(BaseModel):
    """A part of the settings: frozen, strict about types, closed to unknown names."""

    model_config = {"frozen": True, "extra": "forbid", "strict": True, "allow_inf_nan": False, "protected_namespaces": ()}


def _as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value) if type(value) is int else value  # a folder called 3; a float would not keep its spelling


Text = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]
"""A name or a path."""
