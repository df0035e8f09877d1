"""Settings in words: each mistake with what was expected, each setting with its line of help. Knows pydantic, no setting."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from preftune.errors import nearest
from preftune.yamlfile import dump_yaml


def problems(
    model: type[BaseModel], error: ValidationError, *, elsewhere: Callable[[str], str | None]
) -> list[tuple[str, str]]:
    """Each wrong setting once: its dotted name, and what was expected. A union reports every arm: the deepest ones count.

    `elsewhere` says of a name that does not exist what it would belong to, where it knows.
    """
    found: dict[str, list[Any]] = {}
    for e in error.errors():
        found.setdefault(_name(model, e["loc"]), []).append(e)
    deepest = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    said = []
    for name in deepest:
        what = " or ".join(dict.fromkeys(_expected(model, name, e, elsewhere) for e in found[name]))
        kind, value = found[name][0]["type"], found[name][0]["input"]
        said.append((name, what if kind in ("extra_forbidden", "value_error") else f"expected {what}; got {_short(value)}"))
    return said


def _name(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """The dotted name of what pydantic complains about, without the arms of unions: `data.1`, `fields.prompt`."""
    parts: list[str] = []
    at: Any = model
    for part in loc:
        if is_section(at):
            field = at.model_fields.get(part)
            at = field.annotation if field else None
            parts.append(str(part))
        elif isinstance(part, int) and get_origin(at) is tuple:
            at = get_args(at)[part]
            parts.append(str(part))
        elif isinstance(part, int) or get_origin(at) is dict and not str(part).startswith("["):
            parts.append(str(part))
    return ".".join(parts)


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (a number or true as text goes in quotes)",
    "too_short": "text that is not empty (null: none)",
    "list_type": "a list, [like, this]",
    "dict_type": "a mapping, {like: this}",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def _expected(model: type[BaseModel], name: str, error: Any, elsewhere: Callable[[str], str | None]) -> str:
    if error["type"] == "extra_forbidden":
        return elsewhere(name) or _unknown(model, name)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "model_type":
        return f"a section with settings such as {next(n for n in names(model) if n.startswith(name + '.'))}"
    expected: str = _EXPECTED.get(error["type"], error["msg"])
    return expected.format(**error.get("ctx", {}))


def _unknown(model: type[BaseModel], name: str) -> str:
    same = [n for n in names(model) if n.rpartition(".")[2] == name.rpartition(".")[2]]  # `lr` means optim.lr, not lora
    hint = f"did you mean {' or '.join(same)}?" if same else nearest(name, names(model))
    return f"no such setting; {hint if hint.startswith('did') else '`preftune config` lists them all'}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_section(annotation: Any) -> bool:
    """Whether a setting of this type has settings of its own."""
    return inspect.isclass(annotation) and issubclass(annotation, BaseModel)


def names(model: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings and sections."""
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            yield from names(field.annotation, f"{prefix}{name}.")
        yield prefix + name


def described(model: type[BaseModel], values: BaseModel, indent: str = "") -> list[str]:
    """A line for each setting: its value as YAML, one line of help, its [unit], its choices."""
    lines = []
    for name, field in model.model_fields.items():
        value = getattr(values, name)
        if isinstance(value, BaseModel):
            title = inspect.cleandoc(type(value).__doc__ or "").splitlines()[0]
            lines += ["", f"{indent}{name}:  # {title}", *described(type(value), value, indent + "  ")]
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        unit = f" [{extra['unit']}]" if "unit" in extra else ""
        choices = _choices(field.annotation)
        help = f"{field.description}{unit}" + (f" ({' | '.join(choices)})" if choices else "")
        shown = dump_yaml({name: value}).strip()
        lines.append(f"{indent}{shown:<{34 - len(indent)}}  # {help}")
    return lines


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(a) for a in get_args(annotation)] if len(get_args(annotation)) > 1 else []
    return [c for a in get_args(annotation) for c in _choices(a)]
