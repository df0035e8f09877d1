"""What a sweep varies: words of the command line become values, ranges, combinations and names of folders."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.errors import ConfigError
from preftune.sweeping.grid import Range, checked_axes, combinations, parse, run_name


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("loss.beta=0.01,0.1,0.5", (0.01, 0.1, 0.5)),
        ("optim.lr=1e-4,1e-3", (1e-4, 1e-3)),
        ("loss.name=dpo,ipo", ("dpo", "ipo")),
        ("optim.lr=null,1e-3", (None, 1e-3)),
        ("data=[a,b],[c]", (["a", "b"], ["c"])),
        ("data='a,b.jsonl',c.jsonl", ("a,b.jsonl", "c.jsonl")),
        ("fields={prompt: q,chosen: a},{}", ({"prompt": "q", "chosen": "a"}, {})),
        ("loss.beta=0.01..1..3", (0.01, 0.1, 1.0)),
        ("lora.r=4..64..5", (4, 8, 16, 32, 64)),
        ("lora.r=1..3..9", (1, 2, 3)),
        ("optim.lr=1e-5..1e-3", Range(1e-5, 1e-3)),
        ("epochs=1..4", Range(1, 4)),
    ],
)
def test_words_say_values(word: str, values: object) -> None:
    fixed, axes = parse([word])
    name = word.partition("=")[0]
    assert fixed == [] and axes == {name: values}
    assert all(type(a) is type(b) for a, b in zip(axes[name], values, strict=True))  # type: ignore[call-overload]


@pytest.mark.parametrize("word", ["loss.beta=0.1", "data=[a,b]", "data='a,b'", "model=../base", "out=runs/1..2x"])
def test_one_value_is_a_setting_of_all_runs(word: str) -> None:
    assert parse([word]) == ([word], {})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.beta=0.1,"], "a value between commas is empty"),
        (["loss.beta=0.1,0.2", "loss.beta=0.3,0.4"], "given twice"),
        (["loss.beta=0.1,0.2", "loss.beta=0.3"], "given twice"),
        (["loss.beta=1..0.1..3"], "smaller and a larger"),
        (["loss.beta=0..1..3"], "above 0"),
        (["loss.beta=0.1..1..1"], "2 values or more"),
    ],
)
def test_what_is_no_axis_is_said(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(words)


@given(st.floats(1e-9, 1e3), st.floats(1.5, 1e6), st.integers(2, 30))
def test_a_range_is_spread_by_equal_factors(low: float, factor: float, n: int) -> None:
    values = Range(low, low * factor).spread(n)
    assert values[0] == low and values[-1] == low * factor and len(values) == n
    steps = [math.log(b / a) for a, b in zip(values, values[1:], strict=False)]
    assert max(steps) - min(steps) < 3e-3, "as far as four digits go"


def test_the_last_axis_varies_fastest_and_a_range_is_no_grid() -> None:
    axes = checked_axes({"loss.beta": [0.1, 0.2], "seed": (0, 1)})
    assert [tuple(s.values()) for s in combinations(axes)] == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
    assert combinations({}) == [{}]
    with pytest.raises(ConfigError, match=r"--optuna N.*loss.beta=0.1..1..5"):
        combinations({"loss.beta": Range(0.1, 1)})


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"a": "0.1"}, "a list of values"),
        ({"a": []}, "got none"),
        ({"a": [1, 2, 1]}, "1 is given twice"),
        ({"a": Range(2, 1)}, "larger"),
    ],
)
def test_axes_from_python_are_checked(axes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked_axes(axes)


def test_a_run_is_called_by_its_settings() -> None:
    assert run_name({"loss.beta": 0.1, "optim.lr": 1e-4}) == "beta-0.1_lr-0.0001"
    assert run_name({"data": "x.jsonl", "eval.data": "y.jsonl"}) == "data-x.jsonl_eval.data-y.jsonl"
    assert run_name({}) == "run"


_VALUES = st.one_of(
    st.floats(allow_nan=False), st.integers(), st.text(max_size=200), st.lists(st.text(max_size=3), max_size=3), st.none()
)


@given(st.lists(st.fixed_dictionaries({"loss.beta": _VALUES, "data": _VALUES}), min_size=2, max_size=2))
def test_different_settings_have_different_folders_that_are_safe(both: list[dict[str, object]]) -> None:
    names = [run_name(settings) for settings in both]
    assert all(name not in ("", ".", "..") and "/" not in name and len(name.encode()) < 255 for name in names)
    assert both[0] == both[1] or names[0] != names[1]
