"""What a cell of a row may hold: text, messages, labels, numbers; each read or refused with a reason.

A function here takes a value and the name of its column and returns the checked thing, or raises BadRow. The place of the row
is not known here; the reader adds it.

    >>> response_of({"from": "gpt", "value": "Blue."}, "chosen")
    'Blue.'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from preftune.data.types import Message, Pair, Prompt, Response, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""How files spell the roles."""

_KINDS: dict[type, str] = {
    bool: "true/false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


class BadRow(Exception):
    """A row that cannot be used; the message is the reason, without the place."""


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    return _KINDS.get(type(value), type(value).__name__)


def cell(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column that must be there."""
    if name not in row:
        raise BadRow(f"column {name!r} is missing (the row has: {', '.join(map(str, row)) or 'nothing'})")
    if row[name] is None:
        raise BadRow(f"{name} is null")
    return row[name]


def optional(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, None where it is missing, null or an empty CSV cell."""
    value = row.get(name)
    return None if isinstance(value, str) and not value else value


def text_of(value: object, name: str) -> str:
    """Text that can be written as UTF-8; it may be empty."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind(value)}, expected text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise BadRow(
                f"{name} has a lone surrogate (U+{code:04X}) at character {error.start}: half of a character, which no "
                "tokenizer can read; write the whole character or remove it"
            ) from None
    return value


def number_of(value: object, name: str) -> float:
    """A finite number; CSV gives it as text."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise BadRow(f"{name} is {_shown(value)}, expected a number") from None
    if not math.isfinite(number):
        raise BadRow(f"{name} is {number}, expected a finite number")
    return number


def numbers_of(value: object, name: str, n: int) -> tuple[float, ...]:
    """One finite number per response."""
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"{name} is {kind(value)}, expected a list with one number per response")
    if len(value) != n:
        raise BadRow(f"{name} has {len(value)} entries, but there are {n} responses")
    return tuple(number_of(v, f"{name}[{i}]") for i, v in enumerate(value))


def pairs_of(value: object, responses: tuple[Response, ...]) -> tuple[Pair, ...]:
    """Preferences as lists [winner, loser], [winner, loser, confidence] or [winner, loser, confidence, margin]."""
    expected = "[winner, loser], [winner, loser, confidence] or [winner, loser, confidence, margin]"
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"pairs is {kind(value)}, expected a list of [winner, loser]")
    found = []
    for k, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or not 2 <= len(pair) <= 4:
            raise BadRow(f"pairs[{k}] is {_shown(pair)}, expected {expected}")
        winner, loser, confidence, margin = [*pair, 1.0, 0.0][:4] if len(pair) != 3 else [*pair, 0.0]
        for at in (winner, loser):
            if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < len(responses):
                raise BadRow(f"pairs[{k}] names response {_shown(at)}, expected a number from 0 to {len(responses) - 1}")
        if responses[winner] == responses[loser]:
            raise BadRow(f"responses[{winner}] and responses[{loser}] are identical: there is nothing to prefer")
        sure = number_of(confidence, f"pairs[{k}][2]")
        if not 0.5 <= sure <= 1:
            raise BadRow(f"pairs[{k}][2] is {sure}, expected a confidence from 0.5 (a tie) to 1")
        found.append(Pair(winner, loser, sure, number_of(margin, f"pairs[{k}][3]")))
    return tuple(found)


def labels_of(value: object, n: int) -> tuple[bool | None, ...]:
    """One label per response: true, false, or null where nothing is known."""
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"labels is {kind(value)}, expected a list with true, false or null for each response")
    if len(value) != n:
        raise BadRow(f"labels has {len(value)} entries, but there are {n} responses")
    return tuple(None if v is None else label_of(v, f"labels[{i}]") for i, v in enumerate(value))


def label_of(value: object, name: str) -> bool:
    """True (good) or False (bad), from a boolean, 0/1, or such a word."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    word = str(value).strip().lower()
    if not isinstance(value, (bool, int, float, str)) or word not in words:
        raise BadRow(f"{name} is {_shown(value)}, expected true or false (or 1 or 0)")
    return words[word]


def message_of(value: object, name: str) -> Message:
    """One message, {role, content} or {from, value}. Content in parts is joined when all of them are text."""
    if not isinstance(value, Mapping):
        raise BadRow(f"{name} is {kind(value)}, expected a message {{role, content}}")
    keys = ("role", "content") if "role" in value else ("from", "value")
    if any(k not in value for k in keys):
        found = ", ".join(map(str, value)) or "none"
        raise BadRow(f"{name} has the keys {found}; a message has role and content, or from and value")
    spelled = value[keys[0]]
    role = ROLES.get(spelled.strip().lower()) if isinstance(spelled, str) else None
    if role is None:
        raise BadRow(f"{name} has the unknown role {_shown(spelled)}; roles are {', '.join(sorted(ROLES))}")
    return Message(role, _content_of(value[keys[1]], f"{name}.{keys[1]}"))


def _content_of(content: object, name: str) -> str:
    if not isinstance(content, (list, tuple)):
        return text_of(content, name)
    parts = []
    for at, part in enumerate(content):
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise BadRow(f"{name}[{at}] is a part of type {_shown(part['type'])}; only text can be trained on")
        parts.append(text_of(part.get("text") if isinstance(part, Mapping) else part, f"{name}[{at}]"))
    return "".join(parts)


def messages_of(value: object, name: str) -> tuple[Message, ...]:
    """A list of messages, or a single one."""
    if isinstance(value, Mapping):
        return (message_of(value, name),)
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"{name} is {kind(value)}, expected a list of messages")
    if not value:
        raise BadRow(f"{name} is an empty list")
    return tuple(message_of(m, f"{name}[{i}]") for i, m in enumerate(value))


def text_or_messages(value: object, name: str) -> str | tuple[Message, ...]:
    """Text, or a list of messages, or a single one."""
    return messages_of(value, name) if isinstance(value, (list, tuple, Mapping)) else text_of(value, name)


def prompt_of(value: object, name: str) -> Prompt:
    """A prompt as text or messages, checked by `check_prompt`."""
    return check_prompt(text_or_messages(value, name), name)


def check_prompt(prompt: Prompt, name: str) -> Prompt:
    """A prompt must ask something: text that is not blank, or messages of which the last is a user's (or a tool's)."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow(f"{name} is empty")
        return prompt
    if not prompt:
        raise BadRow(f"{name} is empty: nothing stands before the response")
    last = prompt[-1]
    if last.role not in ("user", "tool"):
        raise BadRow(f"{name} ends with a message by the {last.role}; the last before a response must be by the user or a tool")
    if not last.content.strip():
        raise BadRow(f"{name} is empty: its last message has no text")
    return prompt


def response_of(value: object, name: str) -> Response:
    """A response as text, one assistant message or several messages, checked by `check_response`."""
    return check_response(text_or_messages(value, name), name)


def check_response(response: Response, name: str) -> Response:
    """A response must say something. A single assistant message becomes its text; several begin and end with the assistant."""
    if isinstance(response, str):
        if not response.strip():
            raise BadRow(f"{name} is empty")
        return response
    if not response:
        raise BadRow(f"{name} is empty: the dialogue ends with the prompt")
    for which, message in (("begins", response[0]), ("ends", response[-1])):
        if message.role != "assistant":
            raise BadRow(f"{name} {which} with a message by the {message.role}; a response {which} with the assistant")
    if any(not m.content.strip() for m in response if m.role == "assistant"):
        raise BadRow(f"{name} is empty" if len(response) == 1 else f"{name} has an assistant message without text")
    return response[0].content if len(response) == 1 else response


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
