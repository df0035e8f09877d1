"""YAML with numbers as people write them, and with the line that each setting stands on.

PyYAML follows YAML 1.1, where `1e-6` is a string and `no` is False. Here numbers are those of YAML 1.2 (`1e-6` is a number) and
only `true` and `false` are booleans. Safe types only; a key that stands twice is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from preftune.errors import ConfigError


class Places(dict[str, str]):
    """Dotted setting -> where it was given (`file:line`, or the word on the command line)."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_yaml(path: Path) -> tuple[dict[str, Any], Places]:
    """The mapping in a file, and the line of each dotted key. Raises ConfigError with `file:line`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe. A recipe is a YAML file; settings are given as key=value") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places = Places()
        _walk(node, "", places, path)
        values = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: expected `setting: value` lines, found {type(values).__name__}")
    return values, places


def _walk(node: yaml.Node | None, prefix: str, places: Places, path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        where = f"{path}:{key.start_mark.line + 1}"
        if name in places:
            raise ConfigError(f"{where}: {name} is given twice (first at {places[name]})")
        places[name] = where
        _walk(value, f"{name}.", places, path)


def parse_scalar(text: str, *, where: str) -> Any:
    """The value of one `key=value` word, read as YAML: numbers, true/false, null, lists in brackets, else text."""
    try:
        return yaml.load(text, _Loader) if text else ""  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        if text[:1] in "[{":
            raise ConfigError(f"{where}: the value is not a valid YAML list or mapping") from None
        return text  # a path or a name with characters that YAML keeps for itself


def dump_yaml(values: Any) -> str:
    """YAML of plain values, in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False, width=200)
