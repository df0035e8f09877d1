"""Differences and heat: every character is shown once, what differs is marked, and colours follow the log-ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from preftune.report.loaded import Loaded, load
from preftune.report.samples import Answer, samples
from preftune.run import Run

WORDS = st.lists(st.sampled_from(["a", "bee", " ", ", ", "é", "語", "\n", "<b>", "🙂"]), max_size=12).map("".join)


def loaded(path: Path, rows: list[dict[str, Any]]) -> Loaded:
    run = Run(path)
    run.path.mkdir(exist_ok=True)
    run.answers_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(run, "first")


def row(after: str, before: str, pieces: list[str] | None = None, ratios: list[float] | None = None) -> dict[str, Any]:
    policy = {"text": after, "pieces": pieces, "log_ratios": ratios, "n_tokens": 3, "ended": False}
    return {"id": "1", "prompt": "p", "policy": [policy], "reference": [{"text": before}]}


def said(answer: Answer | None) -> str:
    assert answer is not None
    return "".join(piece.text for piece in answer.pieces)


def marked(answer: Answer | None) -> str:
    assert answer is not None
    return "".join(piece.text for piece in answer.pieces if piece.changed)


@given(before=WORDS, after=WORDS, cut=st.integers(0, 20))
def test_every_character_is_shown_once_and_what_is_not_marked_is_common(before: str, after: str, cut: int) -> None:
    pieces = [piece for piece in (after[:cut], after[cut:]) if piece]
    run = load(Run("nowhere"), "first")._replace(answers=[row(after, before, pieces, [1.0] * len(pieces))])
    [sample] = samples([run])
    [(_, shown)] = sample.after
    assert said(shown) == (after if after[:1].isspace() else after.lstrip()) and said(sample.before) == before
    assert shown is not None and sample.before is not None
    if marked(shown) or marked(sample.before):
        common = ["".join(piece.text for piece in side.pieces if not piece.changed) for side in (shown, sample.before)]
        assert "".join(common[0].split()) == "".join(common[1].split())


def test_words_that_differ_are_marked_on_both_sides_and_tokens_are_coloured(tmp_path: Path) -> None:
    pieces, ratios = ["We", " refund", "ed", " it", " gladly"], [0.1, 0.5, 1.0, -2.0, 3.5]
    [sample] = samples([loaded(tmp_path, [row("We refunded it gladly", "We lost it", pieces, ratios)])])
    [(name, after)] = sample.after
    assert name == "first" and marked(after) == "refunded gladly" and marked(sample.before) == "lost "
    assert after is not None and [piece.heat for piece in after.pieces if piece.text.strip()] == [0, 1, 2, -3, 4]
    assert after.moves == [("gladly", "+3.50"), ("it", "-2.00"), ("ed", "+1.00"), ("refund", "+0.50")]
    assert after.note == "3 tokens, stopped by the token limit"


def test_pieces_that_do_not_fit_leave_the_text(tmp_path: Path) -> None:
    [sample] = samples([loaded(tmp_path, [row("a b", "a", ["a"], [0.1, 0.2])])])
    [(_, after)] = sample.after
    assert said(after) == "a b" and after is not None and not after.moves


def test_the_first_prompts_are_shown_and_those_that_moved_most(tmp_path: Path) -> None:
    rows = [row("a", "b", ["a"], [float(k % 7)]) | {"prompt": f"p{k}"} for k in range(20)]
    shown = samples([loaded(tmp_path, rows)])
    assert [sample.prompt for sample in shown] == ["p0", "p1", "p2", "p3", "p6", "p13"]
    assert [bool(sample.why) for sample in shown] == [False] * 4 + [True] * 2


def test_a_long_answer_is_cut_and_says_so(tmp_path: Path) -> None:
    [sample] = samples([loaded(tmp_path, [row("word " * 5000, "word")])])
    [(_, after)] = sample.after
    assert len(said(after)) == 3000 and after is not None and "the first 3,000 of 25,000 characters" in after.note


def test_the_token_that_ends_an_answer_is_shown_and_is_no_difference(tmp_path: Path) -> None:
    [sample] = samples([loaded(tmp_path, [row("we will", "we did", [" we", " will", "<end>"], [0.0, 1.0, -4.0])])])
    [(_, after)] = sample.after
    assert after is not None and said(after) == "we will<end>" and marked(after) == "will"
    assert after.pieces[-1].heat == -4 and after.moves[0] == ("<end>", "-4.00")


def test_where_nearly_all_differs_nothing_is_marked(tmp_path: Path) -> None:
    [sample] = samples([loaded(tmp_path, [row("one two three four.", "five six seven eight.")])])
    assert not marked(sample.before) and not marked(sample.after[0][1])
