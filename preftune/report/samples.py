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
from itertools import accumulate
from typing import Any, NamedTuple

from preftune.report.loaded import Loaded
from preftune.report.text import dicts, number, text

HEAT = (0.25, 0.75, 1.5, 3.0)  # nats at which a token gets its next colour
_FIRST, _MOVED = 4, 2  # prompts shown: the first of the file, and those whose answers moved most
_LONGEST = 3000  # characters of an answer
_MOVES = 5
_ALIKE = 0.3  # share of words in common from which differences are marked


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
    """The answers with what differs marked: in each after, and in the before where it is compared with one alone."""
    before = asked.before
    first = "" if before is None else _words_of(before)
    marks: list[bool] = []
    after: list[tuple[str, Answer | None]] = []
    for name, said in asked.after:
        if before is None or said is None:
            after.append((name, None if said is None else _answer(said, [])))
        else:
            marks, theirs = _differences(first, _words_of(said))
            after.append((name, _answer(said, theirs)))
    shown = None if before is None else _answer(before, marks if len(asked.after) == 1 else [])
    return Sample(prompt, shown, after, asked.why)


def _parts(said: _Said) -> list[str]:
    """The tokens of an answer where each has its log-ratio, else the text as a whole."""
    tokens = said.row.get("pieces")
    whole = isinstance(tokens, list) and all(isinstance(t, str) for t in tokens) and len(tokens) == len(_ratios(said.row)) > 0
    if not isinstance(tokens, list) or not whole:
        return [said.text]
    return tokens if said.text[:1].isspace() else [tokens[0].lstrip(), *tokens[1:]]


def _words_of(said: _Said) -> str:
    """What is compared: the text, without the token that ends it."""
    full = "".join(_parts(said))
    return said.text if full.startswith(said.text) else full


def _answer(said: _Said, changed: list[bool]) -> Answer:
    """The answer in pieces. `changed`: of each character, whether it differs; those that it does not reach do not."""
    parts, ratios = _parts(said), _ratios(said.row)
    heated = len(parts) == len(ratios)
    n_characters = sum(map(len, parts))
    changed = changed + [False] * (n_characters - len(changed))
    pieces, at = [], 0
    for k, token in enumerate(parts):
        ratio = ratios[k] if heated else None
        for piece, differs in _runs(token, changed[at : at + len(token)], max(0, _LONGEST - at)):
            pieces.append(Piece(piece, differs, _heat(ratio), "" if ratio is None else f"{ratio:+.2f} nats"))
        at += len(token)
    most = sorted(range(len(ratios)), key=lambda k: -abs(ratios[k]))[:_MOVES] if heated else []
    moves = [(parts[k].strip() or repr(parts[k]), f"{ratios[k]:+.2f}") for k in most if _heat(ratios[k])]
    return Answer(pieces, _note(said, n_characters), moves)


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


def _differences(before: str, after: str) -> tuple[list[bool], list[bool]]:
    """Of each character of both, whether its word is one that the other text does not have in that place.

    Where the two have little in common, nothing: all of it would be marked.
    """
    texts = before[: 2 * _LONGEST], after[: 2 * _LONGEST]
    words = [re.findall(r"\w+\s*|[^\w\s]\s*|\s+", text) for text in texts]
    places = [list(accumulate(map(len, side), initial=0)) for side in words]
    changed = [False] * len(before), [False] * len(after)
    bare = [[word.strip() for word in side] for side in words]
    matcher = SequenceMatcher(None, bare[0], bare[1], autojunk=False)
    for kind, *spans in matcher.get_opcodes() if matcher.ratio() >= _ALIKE else ():
        if kind != "equal":
            for marks, at, (a, b) in zip(changed, places, (spans[:2], spans[2:]), strict=True):
                marks[at[a] : at[b]] = [True] * (at[b] - at[a])
    return changed
