from __future__ import annotations

import pytest

from preftune.diagnose.content import card, iban, masked
from preftune.diagnose.corpus import canonical, says_something, words
from preftune.diagnose.features import difference, flatters, formatting, language, opening, refuses


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request.",
        "I’m afraid I won’t be able to do this, since I can't.",
        "Sorry, I am not able to do that.",
        "As an AI language model, I cannot have opinions.",
        "I won't do that.",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    ["I'm sorry to hear that. Here is what to do.", "You can't do that in C; use a pointer.", "Sure, here you go.",
     "I can help.", "Unfortunately it rained, so we walked.", ""],
)  # fmt: skip
def test_no_refusals(text: str) -> None:
    assert not refuses(text)


@pytest.mark.parametrize(("text", "yes"), [
    ("Great question! It depends.", True), ("What a wonderful idea.", True), ("You're absolutely right, I erred.", True),
    ("Certainly! Here it is.", True), ("I'd be happy to help.", True), ("Certainly not a bad idea.", False),
    ("The great question of our time is open.", False), ("Sure enough it broke.", False),
])  # fmt: skip
def test_flattery(text: str, yes: bool) -> None:
    assert flatters(text) is yes


@pytest.mark.parametrize(("text", "name"), [
    ("The house is on the hill, and that is where you were.", "English"),
    ("Das Haus ist auf dem Hügel und nicht für die Katze.", "German"),
    ("Les maisons sont sur la colline, avec des arbres pour nous.", "French"),
    ("Это дом на холме, и там никто не живёт.", "CYRILLIC"),
    ("这座房子在山上。", "CJK"),
    ("print(x + 1)", ""), ("", ""), ("12345 67890", ""), ("ok", ""),
])  # fmt: skip
def test_language(text: str, name: str) -> None:
    assert language(text) == name


def test_formatting_and_openings() -> None:
    found = formatting("## Title\n- one\n- two!")
    assert {"headings", "bullets", "exclamations", "lines", "ends_with_!"} == set(found)
    assert formatting(" ends ") == {"begins_with_space": 1.0, "ends_with_space": 1.0, "ends_with_letter": 1.0}
    assert opening("Well, it is so") == {"first:well": 1.0, "first:well it": 1.0} and opening("") == {}
    assert difference({"a": 1.0, "b": 2.0}, {"b": 2.0, "c": 1.0}) == {"a": 1.0, "c": -1.0}


def test_words_and_forms() -> None:
    assert words("Ünï-code, it's 3") == ["ünï", "code", "it", "s", "3"] and words("你好 ok") == ["你", "好", "ok"]
    assert canonical("  Ａ\n b ") == "a b"
    assert [says_something(t) for t in ("...", " — ", "😀", "+", "a")] == [False, False, True, True, True]


def test_numbers_with_check_sums() -> None:
    assert card("4111 1111 1111 1111") and card("378282246310005") and not card("4111 1111 1111 1112")
    assert not card("1646615806005"), "no issuer has such numbers"
    assert not card("41 1111 1111 1111 11"), "nobody writes it that way"
    assert iban("DE89 3704 0044 0532 0130 00") and not iban("DE88 3704 0044 0532 0130 00")
    assert masked("someone@somewhere.net") == "so… (21 characters)"
