"""Before and after: answers to one prompt side by side, the words that differ, and which tokens the policy moved.

    >>> shown = samples(runs)
    >>> [piece.text for piece in shown[0].after[0].pieces if piece.changed]
    ['happily', ' refund', 'ed']

The heat of a token is log π/π_ref in nats: above 0 the policy says it more readily than the reference would.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from preftune.report.loaded import Loaded
from preftune.report.text import dicts, number, text

HEAT = (0.25, 0.75, 1.5, 3.0)  # nats at which a token gets its next colour
_FIRST, _MOVED = 4, 2  # prompts shown: the first of the file, and those whose answers moved most
_LONGEST = 3000  # characters of an answer
_MOVES = 5


class Piece(NamedTuple):
    """A part of an answer within one token and on one side of a difference."""

    text: str
    changed: bool
    heat: int  # from −4 to 4; 0 where the token moved little
    moved: str  # the log-ratio in nats, in words


class Answer(NamedTuple):
    """One answer; `note` says what the text does not: its length, and where it was cut."""

    pieces: list[Piece]
    note: str
    moves: list[tuple[str, str]]  # the tokens that moved most, and how far: what the colours say, for who does not see them


class Sample(NamedTuple):
    """One prompt, the answer before (None where it was not recorded) and that of each run after."""

    prompt: str
    before: Answer | None
    after: list[tuple[str, Answer | None]]
    why: str  # it is shown


class _Said(NamedTuple):
    text: str
    row: dict[str, Any]


class _Asked(NamedTuple):
    before: _Said | None
    after: list[tuple[str, _Said | None]]
    why: str


def samples(runs: Sequence[Loaded]) -> list[Sample]:
    """Answers of the first run's prompts by every run: of its evaluation if there are any, else those that training wrote."""
    tables = [(one.name, _evaluated(one) or _recorded(one)) for one in runs]
    first = tables[0][1]
    shown = []
    for prompt, why in _chosen(first):
        before = first[prompt][0]
        after = [(name, table.get(prompt, (None, None))[1]) for name, table in tables]
        shown.append(_compared(prompt, _Asked(before, after, why)))
    return shown


def _evaluated(one: Loaded) -> dict[str, tuple[_Said | None, _Said | None]]:
    """prompt -> first answer of the reference, first answer of the policy."""
    return {text(row.get("prompt", "")): (_first(row.get("reference")), _first(row.get("policy"))) for row in one.answers}


def _first(answers: Any) -> _Said | None:
    rows = dicts(answers)
    return _Said(text(rows[0].get("text", "")), rows[0]) if rows else None


def _recorded(one: Loaded) -> dict[str, tuple[_Said | None, _Said | None]]:
    """The same of samples.jsonl. Of several answers to one prompt the first before stands beside the first after."""
    found: dict[str, dict[str, _Said]] = {}
    for row in one.samples:
        by_time = found.setdefault(text(row.get("prompt", "")), {})
        by_time.setdefault(str(row.get("when")), _Said(text(row.get("response", "")), row))
    return {prompt: (by_time.get("before"), by_time.get("after")) for prompt, by_time in found.items()}


def _chosen(table: dict[str, tuple[_Said | None, _Said | None]]) -> list[tuple[str, str]]:
    """Prompts to show and why: not picked by hand, nor by how well they turned out."""
    prompts = list(table)
    first = [(prompt, "") for prompt in prompts[:_FIRST]]
    rest = [(abs(sum(_ratios(after.row))), prompt) for prompt in prompts[_FIRST:] if (after := table[prompt][1])]
    moved = sorted((entry for entry in rest if entry[0] > 0), key=lambda entry: -entry[0])[:_MOVED]
    return first + [(prompt, f"among those that moved most: {number(nats)} nats") for nats, prompt in moved]


def _ratios(row: dict[str, Any]) -> list[float]:
    """The log-ratios of an answer's tokens; none where one of them is no number."""
    ratios = row.get("log_ratios")
    if not isinstance(ratios, list) or not all(isinstance(r, int | float) and math.isfinite(r) for r in ratios):
        return []
    return [float(r) for r in ratios]


def _compared(prompt: str, asked: _Asked) -> Sample:
    before = asked.before
    after = [(name, None if said is None else _answer(said, before)) for name, said in asked.after]
    lone = asked.after[0][1] if len(asked.after) == 1 else None
    return Sample(prompt, None if before is None else _answer(before, lone), after, asked.why)


def _answer(said: _Said, other: _Said | None) -> Answer:
    """The answer with the words marked that `other` does not have, and its tokens by how far they moved."""
    tokens, ratios = said.row.get("pieces"), _ratios(said.row)
    whole = isinstance(tokens, list) and all(isinstance(t, str) for t in tokens) and len(tokens) == len(ratios) > 0
    parts: list[str] = tokens if isinstance(tokens, list) and whole else [said.text]
    full = "".join(parts)
    changed = _changed(full, other.text) if other else [False] * len(full)
    pieces, at = [], 0
    for k, token in enumerate(parts):
        ratio = ratios[k] if whole else None
        for piece, differs in _runs(token, changed[at : at + len(token)], max(0, _LONGEST - at)):
            pieces.append(Piece(piece, differs, _heat(ratio), "" if ratio is None else f"{ratio:+.2f} nats"))
        at += len(token)
    most = sorted(range(len(ratios)), key=lambda k: -abs(ratios[k]))[:_MOVES] if whole else []
    moves = [(parts[k].strip() or repr(parts[k]), f"{ratios[k]:+.2f}") for k in most if _heat(ratios[k])]
    return Answer(pieces, _note(said, len(full)), moves)


def _note(said: _Said, n_characters: int) -> str:
    n = said.row.get("n_tokens")
    notes = [f"{n:,} tokens"] if isinstance(n, int) and not isinstance(n, bool) else []
    if said.row.get("ended") is False:
        notes.append("stopped by the token limit")
    if n_characters > _LONGEST:
        notes.append(f"the first {_LONGEST:,} of {n_characters:,} characters")
    return ", ".join(notes)


def _heat(ratio: float | None) -> int:
    if ratio is None:
        return 0
    level = bisect(HEAT, abs(ratio))
    return level if ratio > 0 else -level


def _runs(token: str, changed: list[bool], room: int) -> list[tuple[str, bool]]:
    """A token cut where a difference begins or ends; at most `room` characters of it."""
    runs: list[tuple[str, bool]] = []
    for character, differs in zip(token[:room], changed, strict=False):
        if runs and runs[-1][1] == differs:
            runs[-1] = (runs[-1][0] + character, differs)
        else:
            runs.append((character, differs))
    return runs


def _changed(mine: str, other: str) -> list[bool]:
    """Of each character, whether its word is one that `other` does not have in that place."""
    words, others = (re.findall(r"\w+|\s+|[^\w\s]", full[: 2 * _LONGEST]) for full in (mine, other))
    changed = [False] * len(mine)
    places = [0]
    for word in words:
        places.append(places[-1] + len(word))
    for kind, a, b, *_ in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        if kind in ("replace", "delete"):
            changed[places[a] : places[b]] = [True] * (places[b] - places[a])
    return changed
