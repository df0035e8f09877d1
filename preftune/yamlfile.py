"""YAML with numbers as people write them, and with the line that each setting stands on.

PyYAML follows YAML 1.1, where `1e-6` is text, `010` is eight, `1:30` is ninety, `2024-01-01` a date and `no` is False. Here
numbers are decimal (`1e-6` is one), only `true` and `false` are booleans, and all else is text. Safe types only; a key that
stands twice is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from preftune.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_PLAIN = {  # what a word without quotes can be, other than text: its pattern and the characters that it can start with
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"^-?(?:0|[1-9][0-9]*)$", list("-0123456789")),
    "float": (
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$|^[-+]?\.inf$|^\.nan$",
        list("-+.0123456789"),
    ),
}


class Places(dict[str, str]):
    """Dotted setting -> where it was given: `file:line`, or the command line."""

    def of(self, name: str) -> str:
        """Where `name` was given, or a part of it, or what it is a part of; "" where none of them was."""
        within = [where for known, where in self.items() if known.startswith(f"{name}.")]
        while name not in self and "." in name:
            name = name.rpartition(".")[0]
        return self.get(name) or (within[0] if within else "")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # merge keys


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or this module would read as something else."""


for _kind, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), _first)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    breaks = any(c in text for c in "\x85\u2028\u2029")  # YAML takes these for ends of lines, and folds them unless escaped
    return dumper.represent_scalar(_TAG + "str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _text)


def load_yaml(path: Path) -> tuple[dict[str, Any], Places]:
    """The mapping in a file, and the line of each dotted key. Raises ConfigError with `file:line`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe. A recipe is a YAML file; settings are given as key=value") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder, not a recipe. To go on with a run: out={path} --resume") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    places = Places()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _walk(node, "", places, path)
        values = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested without end; expected `setting: value` lines and sections of them") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}:1: expected `setting: value` lines, found {type(values).__name__}")
    return {str(name): value for name, value in (values or {}).items()}, places


def _walk(node: yaml.Node | None, prefix: str, places: Places, path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, f"{prefix}{i}.", places, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        where = f"{path}:{key.start_mark.line + 1}"
        if name in places:
            raise ConfigError(f"{where}: {name} is given twice (first at {places[name]})")
        places[name] = where
        _walk(value, f"{name}.", places, path)


def parse_word(word: str) -> tuple[str, Any]:
    """The name and value of one `key=value` word. The value is a number, true, false, null, a [list], a {mapping}, else text.

    Text is taken as it stands, with every `#`, `:` and space in it. Raises ConfigError for a word that is no setting.
    """
    name, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", name):
        raise ConfigError(f"command line: {word!r} is not a setting; expected key=value, such as loss.beta=0.1")
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    if not quoted and text[:1] not in ("[", "{"):
        if any(re.match(pattern, text) for pattern, _ in _PLAIN.values()) and text:
            return name, yaml.load(text, _Loader)
        return name, text
    try:
        return name, yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"command line: {name}: {text!r} is not a valid YAML list, mapping or quoted text") from None


def dump_yaml(values: Any) -> str:
    """YAML of plain values, in their order, which `load_yaml` reads back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=200)
