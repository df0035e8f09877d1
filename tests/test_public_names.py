"""The public surface: adding or removing a name is a decision, made here."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest

import preftune

PUBLIC = [
    "Config",
    "Example",
    "FORMATS",
    "Judgment",
    "LOSSES",
    "Message",
    "PreftuneError",
    "Run",
    "load",
    "score",
    "sweep",
    "train",
]


def test_the_exported_names_are_exactly_these() -> None:
    assert preftune.__all__ == ["__version__", *PUBLIC]
    assert dir(preftune) == sorted(preftune.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_the_same_thing_whatever_was_imported_before(name: str) -> None:
    home = importlib.import_module(preftune._HOME[name])  # which makes every package above it an attribute of its parent
    found = getattr(preftune, name)
    assert found is getattr(home, name)
    assert found is getattr(preftune, name), "asking once must not change what it is"
    assert found.__doc__
    assert found.__module__ == home.__name__


def test_type_checkers_see_the_same_names() -> None:
    text = Path(preftune.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"^    from (\S+) import (\w+) as \2$", text, re.M)) == {(v, k) for k, v in preftune._HOME.items()}
    assert (Path(preftune.__file__).parent / "py.typed").exists()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'preftune' has no attribute 'trian'"):
        _ = preftune.trian


def test_the_version_is_said_once_and_alike() -> None:
    assert importlib.metadata.version("preftune") == preftune.__version__
