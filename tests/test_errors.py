"""Lists of what is wrong: short where it is many times the same, and every problem counted."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from preftune.errors import listing


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
