"""A judge looks at a sample: what stands against the labels, how much of it is the judge's own, and again for nothing."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from judges_for_tests import code_of, honest
from tape_server import TapeServer, serving
from worlds import Left, cli, save_model, write_jsonl

from preftune.data.types import Example, Judgment, Pair
from preftune.diagnose.audit import _explained, audit, audited
from preftune.diagnose.corpus import Corpus

ROWS = [{"prompt": f"Question {k}?", "chosen": f"good answer {k}", "rejected": f"poor reply {k}"} for k in range(60)]
WRONG = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]


def torn(messages: list[dict[str, str]]) -> str:
    """Likes whatever comes first in every second question."""
    number = int(re.findall(r"Question (\d+)", messages[1]["content"])[0]) if "Question" in messages[1]["content"] else 0
    return f"A {code_of(messages)}" if number % 2 else honest(messages)


def check(file: Path, url: str, *more: str) -> Left:
    return cli("check", file, "--audit", "20", "--base-url", url, "--judge-model", "m", "--cache", file.parent / "r.sqlite",
               "--only", "audit", "--reply", "letter", "--json", *more)  # fmt: skip


def found(left: Left) -> dict[str, Any]:
    assert left.code == 0, left.err
    return {"ledger": json.loads(left.out)["audit_ledger"], **json.loads(left.out)["findings"][0]}


def test_wrong_labels_are_told_from_right_ones_and_a_second_run_asks_nothing(tmp_path: Path) -> None:
    right, wrong = write_jsonl(tmp_path / "right.jsonl", ROWS), write_jsonl(tmp_path / "wrong.jsonl", WRONG)
    with serving(TapeServer(reply=honest)) as state:
        good = found(check(right, state.url))
        assert state.n_requests == good["ledger"]["n_requests"] == 40
        bad = found(check(wrong, state.url, "--price-in", "1", "--price-out", "1"))
        again = found(check(wrong, state.url))
        other = found(check(wrong, state.url, "--seed", "1"))
    assert (good["severity"], good["numbers"]["n"], good["numbers"]["against"]) == ("ok", 20, 0.0)
    assert good["numbers"]["against_interval"][1] == pytest.approx(1.96**2 / (20 + 1.96**2), abs=1e-3)  # Wilson, by hand
    assert (bad["severity"], bad["numbers"]["n_opposite"], bad["numbers"]["order_consistency"]) == ("error", 20, 1.0)
    assert len(bad["examples"]) == 3 and "wrong.jsonl:" in bad["examples"][0]["place"] and bad["ledger"]["n_requests"] == 0
    assert bad["ledger"]["cost"] == 0 < bad["ledger"]["cost_of_all_answers"], "the same comparisons, whatever the label says"
    assert again["ledger"]["n_requests"] == 0 and again["numbers"] == bad["numbers"]
    assert other["ledger"]["n_requests"] > 0, "another seed, another sample"


def test_a_judge_that_contradicts_itself_is_not_taken_for_wrong_labels(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", ROWS)
    with serving(TapeServer(reply=torn)) as state:
        one = found(check(file, state.url))
    with serving(TapeServer(reply=lambda m: f"A {code_of(m)}")) as state:
        blind = found(check(file, state.url))
    with serving(TapeServer(reply=lambda m: "I cannot say.")) as state:
        mute = found(check(file, state.url))
    assert one["severity"] == "ok" and one["numbers"]["against"] == 0.0
    assert one["numbers"]["n"] + one["numbers"]["n_contradictory"] == 20 and one["numbers"]["n_contradictory"] > 3
    assert "contradicts itself" in one["said"] and "by that alone" in one["said"]
    assert blind["severity"] == "note" and blind["numbers"]["n"] == 0 and "contradicts itself" in blind["said"]
    assert mute["severity"] == "note" and mute["numbers"]["n_unscored"] == 20 and "no verdict that can be read" in mute["said"]


@pytest.mark.parametrize("error", [0.05, 0.2, 0.35])
def test_what_a_judges_own_errors_explain_is_what_they_make(error: float) -> None:
    rng = random.Random(0)
    seen = Counter((rng.random() < error, rng.random() < error) for _ in range(200_000))
    both_wrong, both_right = seen[True, True], seen[False, False]
    differ = (seen[True, False] + seen[False, True]) / 200_000
    assert _explained(differ) == pytest.approx(both_wrong / (both_wrong + both_right), rel=0.1)
    assert _explained(0.0) == 0 and _explained(0.5) == _explained(0.9) == 0.5


def test_the_sample_is_of_preferences_and_names_them_as_the_data_do() -> None:
    ranked = Example("r", "p", ("a", "b", "c"), pairs=(Pair(2, 0), Pair(1, 0), Pair(2, 1)))
    same = Example("s", "p", ("x", "x"), pairs=(Pair(0, 1),))
    asked: list[Example] = []

    def ask(examples: Any) -> list[Judgment]:
        asked.extend(examples)
        return [Judgment(e.id, 0, 1, "j", "judge", (1, 0)) for e in examples]

    corpus = Corpus([ranked, same])
    judged = audited(corpus, ask, 50)
    assert {(j.example, j.i, j.j, j.shown_order, j.verdict) for j in judged} == {
        ("r", 0, 2, (2, 0), "j"), ("r", 0, 1, (1, 0), "j"), ("r", 1, 2, (2, 1), "j")
    }  # fmt: skip
    assert not any(e.pairs for e in asked) and {e.responses for e in asked} == {("a", "c"), ("a", "b"), ("b", "c")}
    one = audit(Corpus([ranked, same], judged=judged))
    assert (one.severity, one.numbers["against"]) == ("ok", 0.0)
    assert audited(corpus, ask, 2, seed=3) == audited(corpus, ask, 2, seed=3) and len(audited(corpus, ask, 2)) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--audit", "5"], "name who judges"),
        (["--base-url", "http://127.0.0.1:1/v1"], "--base-url: is for --audit N"),
        (["--judge-model", "m"], "--judge-model: is for --audit N"),
        (["--audit", "5", "--judge-model", "m", "--only", "length"], "add --only audit"),
        (["--audit", "5", "--judge-model", "m", "--max-cost", "1"], "--price-in"),
        (["--chat-template", "chatml"], "whose tokenizer it is for"),
    ],
)
def test_options_that_lead_nowhere_are_said(tmp_path: Path, words: list[str], reason: str) -> None:
    left = cli("check", write_jsonl(tmp_path / "d.jsonl", ROWS), *words)
    assert left.code == 2 and reason in left.err


def test_money_that_does_not_last_ends_it_and_a_local_model_costs_none(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", ROWS)
    with serving(TapeServer(reply=honest)) as state:
        left = check(file, state.url, "--price-in", "1000", "--max-cost", "5")
        assert left.code == 2 and "not whole because of --max-cost" in left.err and 0 < state.n_requests < 40
        before = state.n_requests
        assert found(check(file, state.url))["ledger"]["n_requests"] == 40 - before
    folder = save_model(tmp_path / "m", positions=2048)
    one = cli(
        "check", file, "--audit", "4", "--judge-model", folder, "--cache", tmp_path / "l.sqlite", "--only", "audit", "--json"
    )
    assert json.loads(one.out)["findings"][0]["numbers"]["n_judged"] == 4, one.err
