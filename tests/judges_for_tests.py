"""Judges that follow the form of our own templates, as functions of the messages that they are sent."""

from __future__ import annotations

import re

Messages = list[dict[str, str]]


def text_of(messages: Messages, side: str) -> str:
    """The answer that is shown as A or B."""
    found = re.search(rf"\[answer {side} \w+\]\n(.*?)\n\[end of answer", messages[1]["content"], re.DOTALL)
    assert found is not None
    return found[1]


def code_of(messages: Messages) -> str:
    """The code that a verdict has to repeat."""
    found = re.search(r"\[conversation (\w+)\]", messages[1]["content"])
    assert found is not None
    return found[1]


def honest(messages: Messages) -> str:
    """A judge that finds "good" better, and follows the form."""
    return f"{'A' if 'good' in text_of(messages, 'A') else 'B'} {code_of(messages)}"
