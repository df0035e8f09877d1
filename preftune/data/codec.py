"""Text to ids and back, for one tokenizer, with nothing added that nobody asked for.

>>> codec = Codec(tokenizer)
>>> codec.ids(["Hello"], chat=False)        # with the tokenizer's BOS, where it has one
[[1, 9906]]
>>> codec.alone(["Hello"])                  # as it continues another text: no BOS, no space before it
{'Hello': [9906]}
"""

from __future__ import annotations

import re
from typing import Any

Tokenizer = Any
"""A `transformers.PreTrainedTokenizerBase`; transformers itself is not imported here."""

ANCHORS = ("", "\n", ".", "a", " ")
"""Texts put before a reply that is tokenized alone, in the order in which they are tried."""


class Codec:
    """Encodes and decodes with one tokenizer.

    lead:  what the tokenizer puts before a plain text: its BOS, or nothing.
    bos:   id of the BOS token, None where there is none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Probes what the tokenizer adds to a text."""
        self.tokenizer = tokenizer
        self.lead = leading_ids(tokenizer)
        self.bos: int | None = tokenizer.bos_token_id
        self._anchors = self._anchors_by_use()

    def ids(self, texts: list[str], *, chat: bool) -> list[list[int]]:
        """Ids of each text with exactly one BOS, if any: the template writes it, or the tokenizer adds it to plain text."""
        found = []
        for ids in token_ids(self.tokenizer, texts):
            if not chat:
                ids = self.lead + ids
            run = next((i for i, token in enumerate(ids) if token != self.bos), len(ids))
            found.append(ids[run - 1 :] if run > 1 else ids)
        return found

    def continuing(self, before: list[int], text: str, whole: list[int], known: dict[str, list[int]]) -> list[int]:
        """Ids of `text` such that they continue `before` and read the same as `whole`, the canonical ids of both."""
        expected = self.text(whole)
        first = known[text] if text in known else self.alone([text])[text]
        if self.text(before + first) == expected:
            return first
        for anchor in self._anchors[1:]:
            found = self.alone([text], anchor)[text]
            if self.text(before + found) == expected:
                return found
        return first  # a normalizer changes text at the boundary: no tokens of this text alone read the same

    def alone(self, texts: list[str], anchor: str | None = None) -> dict[str, list[int]]:
        """Ids of each text on its own.

        A tokenizer may put a space before any text that it is given; an anchor before the text takes that space, and goes.
        """
        anchor = self._anchors[0] if anchor is None else anchor
        texts = list(dict.fromkeys(texts))
        head = token_ids(self.tokenizer, [anchor])[0] if anchor else []
        found = {}
        for text, ids in zip(texts, token_ids(self.tokenizer, [anchor + text for text in texts]), strict=True):
            found[text] = ids[len(head) :] if ids[: len(head)] == head else token_ids(self.tokenizer, [text])[0]
        return found

    def _anchors_by_use(self) -> tuple[str, ...]:
        """ANCHORS, those first after which a word is tokenized without a space that nobody wrote."""
        word, before = "Hello", token_ids(self.tokenizer, ["."])[0]
        expected = self.text(before) + word
        return tuple(sorted(ANCHORS, key=lambda a: self.text(before + self.alone([word], a)[word]) != expected))

    def text(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of the ids; special tokens as they are written."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return text


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without the tokens that the tokenizer adds around it; special tokens written in it are tokens."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return ids


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """What this tokenizer puts before every text: its BOS, or nothing. What it puts behind a text does not count."""
    bare = token_ids(tokenizer, ["a"])[0]
    dressed: list[int] = tokenizer(["a"], add_special_tokens=True, padding=False, truncation=False)["input_ids"][0]
    at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
    return dressed[:at]


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches the text of any special token; None where the tokenizer has none."""
    tokens = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted((t for t in tokens if t), key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
