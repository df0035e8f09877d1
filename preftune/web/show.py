"""Texts of strangers as HTML that carries nothing but text and its layout: Markdown by a library, differences, turns.

Raw HTML in a text is shown as it is written. Links and pictures are not made, so that a page loads nothing and leads nowhere.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from preftune.data.types import Prompt, Response

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

_LONGEST = 200_000  # characters: beyond it a text is shown as it is written
_MOST_WORDS = 6_000  # both texts together: comparing takes time that grows with the square of it


class Turn(NamedTuple):
    """One message of a prompt."""

    role: str
    html: str


@cache
def _markdown() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return (
        MarkdownIt("commonmark", {"html": False, "breaks": True, "linkify": False})
        .enable(["table", "strikethrough"])
        .disable(["link", "image", "autolink", "reference"])
    )


def rendered(text: str) -> str:
    """A text read as Markdown, as HTML."""
    if len(text) > _LONGEST:
        return plain(text)
    html: str = _markdown().render(text)
    return html


def plain(text: str) -> str:
    """A text as it is written, as HTML."""
    return f"<pre>{escape(text)}</pre>"


def text_of(response: Response) -> str:
    """The text of a response; several turns with their roles before them."""
    if isinstance(response, str):
        return response
    return "\n\n".join(f"{m.role}:\n{m.content}" for m in response)


def turns(prompt: Prompt) -> list[Turn]:
    """The messages of a prompt, oldest first."""
    if isinstance(prompt, str):
        return [Turn("user", rendered(prompt))]
    return [Turn(m.role, rendered(m.content)) for m in prompt]


def differences(left: str, right: str) -> tuple[str, str] | None:
    """Both texts with the words marked that the other has not; None where they are too long to compare."""
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (left, right))
    if len(a) + len(b) > 2 * _MOST_WORDS:
        return None
    parts: tuple[list[str], list[str]] = ([], [])
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for side, words in ((0, a[a0:a1]), (1, b[b0:b1])):
            html = escape("".join(words))
            parts[side].append(html if kind == "equal" or not html else f"<mark>{html}</mark>")
    return f"<pre>{''.join(parts[0])}</pre>", f"<pre>{''.join(parts[1])}</pre>"
