"""The registry: names to functions, imported when asked for."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from typing import get_type_hints

import pytest
import yaml

from preftune.errors import ConfigError
from preftune.losses.records import ClippedLoss, PairLoss, RefPairs, ResponseLoss
from preftune.registry import FORMATS, LOSSES, MODIFIERS, Registry


def test_a_name_is_imported_when_asked_for() -> None:
    registry = Registry("thing", {"good": "json:dumps", "broken": "no_such_module:f"})
    assert registry["good"]({"a": 1}) == '{"a": 1}'
    assert list(registry) == ["good", "broken"]
    assert len(registry) == 2
    assert "broken" in registry  # and was not imported for that
    assert "other" not in registry
    with pytest.raises(ModuleNotFoundError):
        registry["broken"]


def test_an_unknown_name_proposes_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"loss 'dpoo' does not exist; did you mean dpo\?"):
        LOSSES["dpoo"]
    with pytest.raises(ConfigError, match="data format 'zzz' does not exist; known: alpaca_eval"):
        FORMATS["zzz"]


OF_TRL = ["sigmoid", "exo_pair", "nca_pair", "sppo_hard", "sigmoid_norm", "aot_pair", "chosen_nll", "kto_pair"]
OF_PAPERS = ["tdpo", "cdpo", "rpo", "wpo", "r_dpo", "tr_dpo", "ld_dpo", "slic"]


@pytest.mark.parametrize("name", OF_TRL + OF_PAPERS)
def test_a_name_from_elsewhere_is_answered_with_what_to_write_here(name: str) -> None:
    with pytest.raises(ConfigError, match=f"loss '{name}' does not exist; here it is (.+)") as refused:
        LOSSES[name]
    meant = str(refused.value).partition("here it is ")[2]
    assert set(re.findall(r"\w+", meant)) & set(LOSSES)


@pytest.mark.parametrize(("written", "name"), [("DPO", "dpo"), ("Plackett-Luce", "plackett_luce"), ("apo-zero", "apo_zero")])
def test_case_and_hyphens_find_the_name(written: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"did you mean {name}\?"):
        LOSSES[written]


def test_what_is_said_of_names_from_elsewhere_runs_as_written() -> None:
    """Settings named there are settings; no such name is one of ours."""
    from preftune.config import Config

    for name, meant in LOSSES.elsewhere.items():
        assert name not in LOSSES
        settings = dict(pair.split("=") for pair in re.findall(r"[a-z]+\.\w+=[\w.]+", meant))
        Config.of({"model": "m", "data": "d", **{k: yaml.safe_load(v) for k, v in settings.items()}})
        for goal in re.findall(r"\[.*\]", meant):
            Config.of({"model": "m", "data": "d", "loss": yaml.safe_load(goal)})


@pytest.mark.parametrize("name", [*LOSSES, *MODIFIERS])
def test_an_objective_is_a_pure_function_with_settings_for_parameters(name: str) -> None:
    function = LOSSES[name] if name in LOSSES else MODIFIERS[name]
    hints = get_type_hints(function, include_extras=True)
    arguments = inspect.signature(function).parameters.values()
    taken = [a for a in arguments if a.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert taken and all(get_type_hints(function)[a.name].__module__ == "preftune.losses.records" for a in taken)
    returned = hints["return"]
    assert returned in (PairLoss, ResponseLoss, ClippedLoss, RefPairs) or "dtype" in dir(returned), (
        "rewards, a record, or a jaxtyping array"
    )
    for parameter in [a for a in arguments if a.kind is inspect.Parameter.KEYWORD_ONLY]:
        assert parameter.default is not inspect.Parameter.empty
        assert hints[parameter.name].__metadata__[0].description, f"{name}.{parameter.name} has no line of help"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_resolves_to_a_documented_function(name: str) -> None:
    assert FORMATS[name].__doc__


def test_reading_the_registry_imports_nothing_heavy() -> None:
    code = "import sys, preftune; preftune.LOSSES, preftune.FORMATS; sys.exit(bool({'torch', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
