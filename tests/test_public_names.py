"""The public surface: adding or removing a name is a decision, made here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
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
    "train",
]


def test_the_exported_names_are_exactly_these() -> None:
    assert preftune.__all__ == ["__version__", *PUBLIC]
    assert dir(preftune) == sorted(preftune.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    home = preftune._HOME[name]
    if importlib.util.find_spec(home.rpartition(".")[0]) is None or importlib.util.find_spec(home) is None:
        pytest.skip(f"{home} is not written yet")
    found = getattr(preftune, name)
    assert found.__doc__
    assert found.__module__ == home


def test_type_checkers_see_the_same_names() -> None:
    text = Path(preftune.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"^    from (\S+) import (\w+) as \2$", text, re.M)) == {(v, k) for k, v in preftune._HOME.items()}
    assert (Path(preftune.__file__).parent / "py.typed").exists()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'preftune' has no attribute 'trian'"):
        _ = preftune.trian


def test_the_version_is_said_once_and_alike() -> None:
    assert importlib.metadata.version("preftune") == preftune.__version__
