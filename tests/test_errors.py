"""Lists of what is wrong: short where it is many times the same, and every problem counted."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from preftune.errors import listing, printable


def test_a_reason_is_said_once_and_every_place_named() -> None:
    lines = listing(
        [
            *(f"pairs.jsonl:{i}: nothing says where the prompt of this row ends: add a column" for i in range(3)),
            "pairs.jsonl:9: empty",
            "pairs.jsonl:10: empty",
        ]
    )
    assert lines.splitlines() == [
        "  pairs.jsonl:0: nothing says where the prompt of this row ends: add a column",
        "  pairs.jsonl:1: the same",
        "  pairs.jsonl:2: the same",
        "  pairs.jsonl:9: empty",
        "  pairs.jsonl:10: empty",
    ]


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(1, 12))
def test_every_problem_is_counted(reasons: list[str], shown: int) -> None:
    lines = listing([f"f:{i}: {r}" for i, r in enumerate(reasons)], shown=shown).splitlines()
    more = [int(m[1]) for line in lines if (m := re.match(r"  … and (\d+) more", line))]
    assert len(lines) - len(more) + sum(more) == len(reasons)
    assert len(lines) - len(more) <= shown


@given(st.text())
def test_what_is_shown_drives_no_terminal_and_is_else_as_it_was(text: str) -> None:
    shown = printable(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert shown == text or len(shown) > len(text)
    assert printable("ein Fluß\n\t你\u3000好 👩‍👧") == "ein Fluß\n\t你\u3000好 👩‍👧"
    assert printable("a\x1b[31m\rb\x9b1m") == "a\\x1b[31m\\x0db\\x9b1m"
