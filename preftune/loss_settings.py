"""The section `loss`: made from the signatures of the chosen objective and its modifiers; several objectives are a list.

>>> list(loss_section("sft").model_fields)
['name']
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import create_model

from preftune.errors import ConfigError
from preftune.registry import LOSSES, MODIFIERS
from preftune.section import Section, setting


def first_record(function: Callable[..., Any]) -> type:
    """The record of an objective's units: the type of its first argument, whether of a micro-batch or of the whole step."""
    record: type = get_type_hints(function)[next(iter(inspect.signature(function).parameters))]
    return record


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Default values of a function's keyword-only arguments, by name."""
    arguments = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in arguments if p.kind is inspect.Parameter.KEYWORD_ONLY}


def modifiers(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The modifiers that compose with an objective: those of the same record."""
    return {name: m for name in MODIFIERS if first_record(m := MODIFIERS[name]) is first_record(function)}


@cache
def loss_section(name: str, *, weighted: bool = False) -> type[Section]:
    """The section `loss` for one objective: its parameters and those of its modifiers, with defaults, help and bounds.

    weighted: it is one of several in a list, and has a weight.
    """
    own: dict[str, Any] = {"name": (Annotated[Literal[name], setting(f"objective: {', '.join(sorted(LOSSES))}")], name)}
    if weighted:
        own["weight"] = (Annotated[float, setting("factor of its mean in the sum of objectives", gt=0)], 1.0)
    objective = LOSSES[name]
    for function in (objective, *modifiers(objective).values()):
        hints = get_type_hints(function, include_extras=True)
        own |= {p: (hints[p], default) for p, default in parameters(function).items()}
    title = (inspect.getdoc(objective) or "The objective: its name, then its own parameters.").splitlines()[0]
    return create_model(f"Loss_{name}", __base__=Section, __doc__=title, **own)


def objectives_in(tree: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Names of the objectives in `tree`, and what is wrong with them. In `tree` each becomes a mapping with a name."""
    given = tree.get("loss", {})
    if isinstance(given, Section | tuple):  # of a Config that is there already
        given = [g.model_dump() for g in given] if isinstance(given, tuple) else given.model_dump()
    entries = given if isinstance(given, list) else [given]
    usual = {} if isinstance(given, list) else {"name": "dpo"}
    entries = [{"name": e} if isinstance(e, str) else {**usual, **e} if isinstance(e, Mapping) else e for e in entries]
    tree["loss"] = entries if isinstance(given, list) else entries[0]
    wrong: list[tuple[str, str]] = [] if entries else [("loss", "an empty list: expected at least one objective")]
    for i, entry in enumerate(entries):
        place = f"loss.{i}" if isinstance(given, list) else "loss"
        if not isinstance(entry, dict):
            wrong.append(
                (place, f"expected the name of an objective or a section such as {{name: dpo, beta: 0.1}}; got {entry!r}")
            )
            continue
        try:
            entry["name"] = LOSSES.whole_name(entry.get("name"))
            LOSSES[entry["name"]]  # a user's own is checked when it is loaded
        except ConfigError as error:
            wrong.append((f"{place}.name", str(error)))
    return () if wrong else tuple(e["name"] for e in entries), wrong


def of_another_objective(name: str, losses: tuple[str, ...], listed: bool) -> str | None:
    """What the parameter `loss.beta` (in a list `loss.1.beta`) belongs to, where it is not one of this objective."""
    section, _, rest = name.partition(".")
    if section != "loss":
        return None
    *index, parameter = rest.split(".")
    own = loss_section(losses[int(index[0]) if index else 0], weighted=listed).model_fields
    others = [loss for loss in LOSSES if parameter in loss_section(loss).model_fields]
    if parameter == "weight":
        return "an objective by itself has no weight; in a list each has one, as in loss: [dpo, {name: sft, weight: 0.2}]"
    if not others:
        return None
    has = ", ".join(f"loss.{p}" for p in own if p != "name") or "no parameters"
    theirs = ", ".join(others) if len(others) <= 3 else f"{', '.join(others[:2])} and {len(others) - 2} others"
    return f"a parameter of {theirs}; the objective {own['name'].default} has {has}"


def entry_of(losses: list[Any], path: list[str]) -> dict[str, Any]:
    """The objective that `loss.1.weight` speaks of, as a mapping in the list."""
    if len(path) < 3 or not path[1].isdigit() or int(path[1]) >= len(losses):
        raise ConfigError(
            f"{'.'.join(path)}: there are {len(losses)} objectives; name one as loss.0.{path[-1]}, counted from 0"
        )
    i = int(path[1])
    losses[i] = {"name": losses[i]} if isinstance(losses[i], str) else losses[i]
    entry: dict[str, Any] = losses[i]
    return entry
