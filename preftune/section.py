"""What the settings are made of: a `Section` is a part of them, `setting` says what one of them means."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


def setting(help: str, *, unit: str = "", **bounds: Any) -> Any:
    """What one setting means: a line of help, its unit, and its bounds (`gt`, `ge`, `lt`, `le`).

    Used inside `Annotated[...]`, both in sections and for the keyword-only parameters of an objective.
    """
    return Field(description=help, json_schema_extra={"unit": unit} if unit else None, **bounds)


class Section(BaseModel):
    """A part of the settings: frozen, strict about types, closed to unknown names."""

    model_config = {"frozen": True, "extra": "forbid", "strict": True, "allow_inf_nan": False, "protected_namespaces": ()}
