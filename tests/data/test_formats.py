"""Each format: what its rows become, and which rows it refuses, with what reason."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.rows import BadRow
from preftune.data.types import Message, Pair, content_id
from preftune.registry import FORMATS


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED = (Message("user", "Colour?"),)
GOOD: list[tuple[str, dict[str, Any], Any, Any]] = [
    ("prompt_chosen_rejected", {"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "2+2=", ("4", "5")),
    (
        "prompt_chosen_rejected",
        {
            "prompt": [{"role": "system", "content": "Be brief."}, user("Colour?")],
            "chosen": [reply("Red")],
            "rejected": reply("Dog"),
        },
        (Message("system", "Be brief."), *ASKED),
        ("Red", "Dog"),
    ),
    ("prompt_chosen_rejected", {"prompt": [user("Colour?")], "chosen": "Red", "rejected": "Dog"}, ASKED, ("Red", "Dog")),
    (
        "prompt_chosen_rejected",
        {"prompt": "Colour?", "chosen": [reply("Red")], "rejected": [reply("Dog")]},
        ASKED,
        ("Red", "Dog"),
    ),
    (  # whole dialogues that open with the prompt
        "prompt_chosen_rejected",
        {"prompt": "Colour?", "chosen": [user("Colour?"), reply("Red")], "rejected": [user("Colour?"), reply("Dog")]},
        ASKED,
        ("Red", "Dog"),
    ),
    (
        "prompt_chosen_rejected",
        {"prompt": [user("Colour?")], "chosen": [reply("Red"), user("Sure?"), reply("Yes")], "rejected": "Dog"},
        ASKED,
        ((Message("assistant", "Red"), Message("user", "Sure?"), Message("assistant", "Yes")), "Dog"),
    ),
    (
        "hh",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nI listen.\n\nHuman: Colour?\n\nAssistant: Red",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nI listen.\n\nHuman: Colour?\n\nAssistant: Dog ",
        },
        (Message("user", "Hi"), Message("assistant", "Hello.\n\nI listen."), *ASKED),
        ("Red", "Dog"),
    ),
    (
        "chosen_rejected",
        {"chosen": [user("Colour?"), reply("Red")], "rejected": [user("Colour?"), reply("Dog")]},
        ASKED,
        ("Red", "Dog"),
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Colour?"}],
            "chosen": {"from": "gpt", "value": "Red"},
            "rejected": {"from": "gpt", "value": "Dog"},
        },
        ASKED,
        ("Red", "Dog"),
    ),
    (
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [
                user("Colour?"),
                {"from": "function_call", "value": "look()"},
                {"from": "observation", "value": "red"},
            ],
            "chosen": "Red",
            "rejected": reply("Dog"),
        },
        (Message("system", "Be brief."), *ASKED, Message("assistant", "look()"), Message("tool", "red")),
        ("Red", "Dog"),
    ),
    ("two_outputs", {"input": "Colour?", "output_1": "Red", "output_2": "Dog"}, ASKED, ("Red", "Dog")),
    ("two_outputs", {"instruction": "Colour?", "input": "", "output_1": "Red", "output_2": "Red"}, ASKED, ("Red", "Red")),
    ("prompt_completion_label", {"prompt": "2+2=", "completion": "4", "label": True}, "2+2=", ("4",)),
    ("prompt_completion_label", {"prompt": [user("Colour?")], "completion": [reply("Red")], "label": "0"}, ASKED, ("Red",)),
    ("prompt_responses", {"prompt": "2+2=", "responses": ["4", "5", "four"]}, "2+2=", ("4", "5", "four")),
    ("prompt_completion", {"prompt": "2+2=", "completion": "4"}, "2+2=", ("4",)),
    ("prompt_completion", {"prompt": "Colour?", "completion": [reply("Red")]}, ASKED, ("Red",)),
    ("messages", {"messages": [user("Colour?"), reply("Red")]}, ASKED, ("Red",)),
    (
        "messages",
        {"messages": [user("Colour?"), reply("Red"), user("Sure?"), reply("Yes")]},
        ASKED,
        ((Message("assistant", "Red"), Message("user", "Sure?"), Message("assistant", "Yes")),),
    ),
    (
        "conversations",
        {"conversations": [{"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "Red"}]},
        ASKED,
        ("Red",),
    ),
    (
        "messages",
        {
            "messages": [
                user("Colour?"),
                {"role": "assistant", "content": [{"type": "text", "text": "R"}, {"type": "text", "text": "ed"}]},
            ]
        },
        ASKED,
        ("Red",),
    ),
    (
        "alpaca_eval",
        {"instruction": "Colour?", "output_1": "Red", "output_2": "Dog", "preference": 1.25},
        ASKED,
        ("Red", "Dog"),
    ),
    (
        "ultrafeedback",
        {"instruction": "Colour?", "completions": [{"response": "Red", "annotations": {"help": {"Rating": "4"}}}]},
        ASKED,
        ("Red",),
    ),
    (
        "preference_strength",
        {"prompt": "Colour?", "response_1": "Red", "response_2": "Dog", "preference_strength": -2},
        "Colour?",
        ("Red", "Dog"),
    ),
    ("helpsteer", {"prompt": "Colour?", "response": "Red", "helpfulness": 4, "verbosity": 0}, "Colour?", ("Red",)),
]


@pytest.mark.parametrize(("name", "row", "prompt", "responses"), GOOD)
def test_row_becomes_example(name: str, row: dict[str, Any], prompt: Any, responses: Any) -> None:
    example = FORMATS[name](row)
    assert (example.prompt, example.responses) == (prompt, responses)
    assert example.id == content_id(prompt, responses)


@pytest.mark.parametrize(("name", "row", "prompt", "responses"), GOOD)
def test_columns_say_the_format(name: str, row: dict[str, Any], prompt: Any, responses: Any) -> None:
    first = next(n for n in FORMATS if FORMATS[n].fits(row))  # type: ignore[attr-defined]
    assert first == name


def test_every_good_format_is_covered() -> None:
    assert {name for name, *_ in GOOD} == set(FORMATS)


@pytest.mark.parametrize(
    ("extra", "pair"),
    [
        ({}, Pair(0, 1)),
        ({"margin": 0.5}, Pair(0, 1, margin=0.5)),
        ({"confidence": "0.75"}, Pair(0, 1, confidence=0.75)),
        ({"score_chosen": 8, "score_rejected": 6.5}, Pair(0, 1, margin=1.5)),
        ({"score_chosen": 8, "score_rejected": None, "margin": ""}, Pair(0, 1)),
    ],
)
def test_strength_of_a_preference(extra: dict[str, Any], pair: Pair) -> None:
    assert FORMATS["prompt_chosen_rejected"]({"prompt": "a", "chosen": "b", "rejected": "c"} | extra).pairs == (pair,)


@pytest.mark.parametrize(
    ("preference", "pairs", "scores"),
    [
        (1, (Pair(0, 1, 1.0),), (1.0, 0.0)),
        (2, (Pair(1, 0, 1.0),), (0.0, 1.0)),
        (1.25, (Pair(0, 1, 0.75),), (0.75, 0.25)),
        ("1.75", (Pair(1, 0, 0.75),), (0.25, 0.75)),
        (1.5, (), (0.5, 0.5)),
        (0, (), (0.5, 0.5)),
    ],
)
def test_alpaca_eval_preference(preference: Any, pairs: Any, scores: Any) -> None:
    example = FORMATS["alpaca_eval"]({"instruction": "a", "output_1": "b", "output_2": "c", "preference": preference})
    assert example.pairs == pairs
    assert example.scores == scores


@pytest.mark.parametrize(
    ("label", "good"), [(True, True), (False, False), (1, True), (0.0, False), ("true", True), ("FALSE", False), (" 1 ", True)]
)
def test_labels(label: Any, good: bool) -> None:
    assert FORMATS["prompt_completion_label"]({"prompt": "a", "completion": "b", "label": label}).labels == (good,)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=6), st.booleans())
def test_pairs_are_all_that_differ(values: list[int], ranked: bool) -> None:
    responses = [f"r{i}" for i in range(len(values))]
    example = FORMATS["prompt_responses"]({"prompt": "p", "responses": responses, "ranks" if ranked else "scores": values})
    sign = -1 if ranked else 1
    assert example.scores == tuple(sign * v for v in values)
    better = {(i, j) for i, j in itertools.product(range(len(values)), repeat=2) if sign * values[i] > sign * values[j]}
    assert {(p.winner, p.loser) for p in example.pairs} == better
    assert len(example.pairs) == len(better)
    assert all(p.margin == abs(values[p.winner] - values[p.loser]) and p.confidence == 1 for p in example.pairs)


@pytest.mark.parametrize(
    ("own", "kept"), [("a7", "a7"), (7, "7"), ("", None), ("  ", None), (None, None), (True, None), (1.5, None), (["x"], None)]
)
def test_own_id(own: Any, kept: str | None) -> None:
    row = {"prompt": "p", "completion": "c"}
    assert FORMATS["prompt_completion"](row | {"id": own}).id == (kept or FORMATS["prompt_completion"](row).id)


def test_verdicts_do_not_rename_an_example() -> None:
    row = {"prompt": "p", "responses": ["a", "b"]}
    ids = {
        FORMATS["prompt_responses"](row | extra).id for extra in ({}, {"scores": [1, 2]}, {"scores": [2, 1]}, {"ranks": [1, 1]})
    }
    assert len(ids) == 1


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
OUTPUTS = {"instruction": "a", "output_1": "b", "output_2": "c"}
ALPACA = {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.0}
RANKED = {"prompt": "p", "responses": ["a", "b"]}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("prompt_chosen_rejected", {"prompt": "p", "chosen": "a"}, "column 'rejected' is missing (the row has: prompt, chosen)"),
    ("prompt_chosen_rejected", PAIR | {"chosen": None}, "chosen is null"),
    ("prompt_chosen_rejected", PAIR | {"chosen": 4}, "chosen is a number, expected text"),
    ("prompt_chosen_rejected", PAIR | {"prompt": True}, "prompt is true/false, expected text"),
    ("prompt_chosen_rejected", PAIR | {"prompt": " \n"}, "prompt is empty"),
    ("prompt_chosen_rejected", PAIR | {"prompt": []}, "prompt is an empty list"),
    ("prompt_chosen_rejected", PAIR | {"rejected": "\t"}, "rejected is empty"),
    ("prompt_chosen_rejected", PAIR | {"rejected": "a"}, "chosen and rejected are identical"),
    ("prompt_chosen_rejected", PAIR | {"chosen": "x\ud83d"}, "chosen has a lone surrogate (U+D83D) at character 1"),
    ("prompt_chosen_rejected", PAIR | {"confidence": 1.2}, "confidence is 1.2, expected a probability"),
    ("prompt_chosen_rejected", PAIR | {"confidence": 0.3}, "better, from 0.5 (a tie) to 1"),
    ("prompt_chosen_rejected", PAIR | {"margin": "wide"}, "margin is 'wide', expected a number"),
    ("prompt_chosen_rejected", PAIR | {"margin": math.inf}, "margin is inf, expected a finite number"),
    ("prompt_chosen_rejected", PAIR | {"prompt": [{"role": "system", "content": "x"}]}, "ends with a message by the system"),
    ("prompt_chosen_rejected", PAIR | {"prompt": [user("x"), reply("y")]}, "ends with a message by the assistant"),
    ("prompt_chosen_rejected", PAIR | {"prompt": [user(" ")]}, "its last message has no text"),
    (
        "prompt_chosen_rejected",
        PAIR | {"prompt": [{"role": "wizard", "content": "x"}]},
        "prompt[0] has the unknown role 'wizard'",
    ),
    ("prompt_chosen_rejected", PAIR | {"prompt": [{"text": "x"}]}, "a message has role and content"),
    ("prompt_chosen_rejected", PAIR | {"prompt": ["x"]}, "prompt[0] is text, expected a message"),
    (
        "prompt_chosen_rejected",
        PAIR | {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "part of type 'image_url'; only text",
    ),
    (
        "prompt_chosen_rejected",
        PAIR | {"chosen": {"role": "assistant", "content": None}},
        "chosen.content is null, expected text",
    ),
    ("prompt_chosen_rejected", PAIR | {"chosen": [user("p"), reply("a")]}, "chosen begins with a message by the user"),
    ("prompt_chosen_rejected", PAIR | {"chosen": [reply("a"), user("b")]}, "chosen ends with a message by the user"),
    (
        "prompt_chosen_rejected",
        {"prompt": "other", "chosen": [user("p"), reply("a")], "rejected": [user("p"), reply("b")]},
        "prompt column is not what the dialogues",
    ),
    ("hh", {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "chosen is empty"),
    (
        "hh",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: c"},
        "prompts of chosen and rejected differ from turn 1",
    ),
    ("hh", {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: b"}, "identical"),
    ("hh", {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "x"}, "chosen begins with a message by the user"),
    ("hh", {"chosen": "Well.\n\nHuman: a\n\nAssistant: b", "rejected": "x"}, "chosen does not begin with 'Human:'"),
    ("hh", {"chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"}, "nothing stands before the response"),
    ("chosen_rejected", {"chosen": "a", "rejected": "b"}, "add a prompt column"),
    ("chosen_rejected", {"chosen": [user("a"), reply("b")], "rejected": [user("a"), reply("b")]}, "identical"),
    (
        "chosen_rejected",
        {"chosen": [user("a"), reply("b")], "rejected": [user("a")]},
        "rejected is empty: the dialogue ends with",
    ),
    (
        "chosen_rejected",
        {"chosen": [user("a"), reply("b")], "rejected": [user("z"), reply("c")]},
        "differ at message 1, which is by",
    ),
    ("chosen_rejected", {"chosen": [reply("b")], "rejected": [reply("c")]}, "nothing stands before the response"),
    ("sharegpt", {"conversations": [], "chosen": "a", "rejected": "b"}, "conversations is an empty list"),
    (
        "sharegpt",
        {"conversations": "hello", "chosen": "a", "rejected": "b"},
        "conversations is text, expected a list of messages",
    ),
    (
        "sharegpt",
        {"conversations": [user("x")], "chosen": user("a"), "rejected": "b"},
        "chosen begins with a message by the user",
    ),
    ("prompt_completion_label", {"prompt": "a", "completion": "b", "label": "yes"}, "label is 'yes', expected true or false"),
    ("prompt_completion_label", {"prompt": "a", "completion": "b", "label": 2}, "label is 2, expected true or false"),
    ("prompt_completion_label", {"prompt": "a", "completion": "", "label": 1}, "completion is empty"),
    ("prompt_responses", RANKED | {"scores": [1]}, "scores has 1 entries, but there are 2 responses"),
    ("prompt_responses", RANKED | {"scores": [1, math.nan]}, "scores[1] is nan, expected a finite number"),
    ("prompt_responses", RANKED | {"scores": [1, None]}, "scores[1] is None, expected a number"),
    ("prompt_responses", RANKED | {"scores": 3}, "scores is a number, expected a list"),
    ("prompt_responses", RANKED | {"scores": [1, 2], "ranks": [2, 1]}, "both scores and ranks"),
    ("prompt_responses", {"prompt": "p", "responses": []}, "responses is an empty list"),
    ("prompt_responses", {"prompt": "p", "responses": "a"}, "responses is text, expected a list"),
    ("prompt_responses", {"prompt": "p", "responses": ["a", ""]}, "responses[1] is empty"),
    (
        "prompt_responses",
        {"prompt": "p", "responses": ["a", "a"], "scores": [1, 2]},
        "identical but do not have the same score",
    ),
    ("messages", {"messages": [user("a")]}, "no assistant turn"),
    ("messages", {"messages": [reply("a")]}, "nothing stands before the response"),
    ("messages", {"messages": [user("a"), reply("b"), user("c")]}, "messages ends with a message by the user"),
    ("messages", {"messages": [user("a"), reply(""), user("c"), reply("d")]}, "assistant message without text"),
    ("alpaca_eval", ALPACA | {"preference": None}, "preference is null"),
    ("alpaca_eval", ALPACA | {"preference": ""}, "preference is empty"),
    ("alpaca_eval", ALPACA | {"preference": 3}, "preference is 3, expected a number from 1 to 2"),
    ("alpaca_eval", ALPACA | {"preference": math.nan}, "preference is nan"),
    ("alpaca_eval", ALPACA | {"output_2": "b"}, "output_1 and output_2 are identical"),
    ("alpaca_eval", ALPACA | {"instruction": " "}, "instruction is empty"),
    ("two_outputs", OUTPUTS | {"label": 3}, "label is 3, expected 1 or 2 for the better output, or 0 for a tie"),
    ("two_outputs", OUTPUTS | {"output_2": "b", "label": 1}, "output_1 and output_2 are identical"),
    ("prompt_responses", RANKED | {"reference": [reply(" ")]}, "reference"),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_bad_row_has_its_reason(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as error:
        FORMATS[name](row)
    assert reason in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_no_row_gets_through_but_as_an_example_or_a_bad_row(name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    row = {c: data.draw(JSON, label=c) for c in (*form.required, *form.optional)}  # type: ignore[attr-defined]
    try:
        example = form(row)
    except BadRow as reason:
        assert str(reason)
    else:
        assert example.responses
        assert example.id


@pytest.mark.parametrize(("label", "expected"), [(1, (Pair(0, 1),)), ("2", (Pair(1, 0),)), (0, ()), (None, ())])
def test_a_label_names_the_better_output(label: object, expected: tuple[Pair, ...]) -> None:
    example = FORMATS["two_outputs"](OUTPUTS | {"label": label})
    assert example.pairs == expected
    assert example.scores == ((0.5, 0.5) if label == 0 else ())


def test_identical_outputs_are_a_tie_and_nothing_else() -> None:
    same = ALPACA | {"output_2": "b"}
    assert FORMATS["alpaca_eval"](same | {"preference": 1.5}).pairs == ()
    with pytest.raises(BadRow, match="identical"):
        FORMATS["alpaca_eval"](same | {"preference": 2})


def test_a_reference_answer_is_read() -> None:
    assert FORMATS["prompt_responses"](RANKED | {"reference": "four"}).reference == "four"
    assert FORMATS["two_outputs"](OUTPUTS | {"reference": "four"}).reference == "four"
    assert FORMATS["two_outputs"](OUTPUTS).reference is None
