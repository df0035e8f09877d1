"""`check` finds every planted fault, is silent on clean data and changes nothing; what it writes is accounted for."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_pairs import FAULTS, clean, pair
from worlds import World, cli, write_jsonl

from preftune.data.read import read_examples
from preftune.data.types import Example, Judgment, Pair, Verdict
from preftune.diagnose.check import Check, inspect
from preftune.diagnose.clean import cleaned
from preftune.diagnose.finding import Finding
from preftune.errors import ConfigError, DataError
from preftune.registry import CHECKS

LOUD = ("warning", "error")
CHEAP = [name for name in CHECKS if name not in ("surface", "formatting", "label_noise")]


def finding(found: Check, name: str) -> Finding:
    return next(one for one in found.findings if one.name == name)


def loud(found: Check) -> set[str]:
    return {one.name for one in found.findings if one.severity in LOUD and one.name != "size"}


@pytest.mark.parametrize(("n", "seed"), [(60, 0), (250, 1), (500, 2)])
def test_clean_data_of_any_size_raise_no_alarm(n: int, seed: int) -> None:
    found = inspect(clean(n, seed=seed))
    assert loud(found) == set(), [one.said for one in found.findings if one.severity in LOUD]
    assert {one.name for one in found.findings} == set(CHECKS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(name: str) -> None:
    fault = FAULTS[name]
    strong = fault.rates[-2] if name == "flipped" else fault.rates[-1]
    found = inspect(fault.plant(clean(700 if name == "flipped" else 250, seed=5), strong, random.Random(1)))
    one = finding(found, fault.name)
    assert one.severity in LOUD, one.said
    assert one.remedy and (one.examples or not one.numbers.get("n")), "where to look, and what to do"
    assert loud(found) <= {fault.name, *fault.sides}
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_cleaned_adds_up_and_no_longer_has_what_was_left_out(name: str) -> None:
    fault = FAULTS[name]
    rows = fault.plant(clean(150, seed=6), fault.rates[-1], random.Random(2))
    found = inspect(rows, only=["bad_rows", fault.name] if fault.name != "bad_rows" else ["bad_rows"])
    examples, account = cleaned(found)
    assert sum(account.values()) == len(rows)
    assert account["kept"] == sum(len(e.pairs) for e in examples)
    if account["kept"] < len(rows):
        again = inspect(examples, only=[fault.name])
        assert not finding(again, fault.name).drop
    else:
        assert [e.responses for e in examples] == [e.responses for e in found.corpus.examples]


def test_strength_of_duplicates_and_contradictions_is_counted() -> None:
    rows = clean(100, seed=7)
    rows += [dict(rows[0]), dict(rows[1]), rows[2] | {"chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}]
    found = inspect(rows, only=["duplicates", "contradictions"])
    assert finding(found, "duplicates").numbers["n_copies"] == 2
    assert finding(found, "contradictions").numbers["n_both_ways"] == 2


def test_a_majority_survives_a_contradiction() -> None:
    sides = {"prompt": "p?", "chosen": "yes it is", "rejected": "no it is not"}
    rows = [sides, sides, sides | {"chosen": sides["rejected"], "rejected": sides["chosen"]}]
    found = inspect(rows + clean(50), only=["contradictions"])
    examples, account = cleaned(found)
    assert account == {"contradictions": 1, "kept": 52}
    assert [e.responses[e.pairs[0].winner] for e in examples[:2]] == ["yes it is", "yes it is"]


def test_labels_that_disagree_on_repeated_comparisons_give_the_rate_of_noise() -> None:
    """Every comparison made twice, each label wrong with probability 0.2: two of them disagree in 2 · 0.2 · 0.8 = 0.32."""
    rng = random.Random(3)
    rows = []
    for row in clean(1500, seed=8):
        for _ in range(2):
            wrong = rng.random() < 0.2
            rows.append(row | ({"chosen": row["rejected"], "rejected": row["chosen"]} if wrong else {}))
    numbers = finding(inspect(rows, only=["contradictions"]), "contradictions").numbers
    assert numbers["noise"] == pytest.approx(0.2, abs=0.03)
    assert numbers["disagree_interval"][0] < 0.32 < numbers["disagree_interval"][1]


def test_the_share_of_wrong_labels_is_bounded_where_words_decide() -> None:
    rows = FAULTS["flipped"].plant(clean(1200, seed=9), 0.2, random.Random(4))
    low, high = finding(inspect(rows, only=["label_noise"]), "label_noise").numbers["surest_interval"]
    assert low < 0.2 < high + 0.1


def test_verdicts_of_a_judge_are_held_against_the_labels() -> None:
    rows = [row | {"id": f"e{n}"} for n, row in enumerate(clean(60, seed=12))]
    verdicts: list[Verdict] = ["j"] * 40 + ["i"] * 10 + ["tie"] * 8 + ["unscored"] * 2
    judged = [Judgment(f"e{n}", 0, 1, said, "judge", (0, 1)) for n, said in enumerate(verdicts)]
    one = finding(inspect(rows, judged=judged, only=["audit"]), "audit")
    assert (one.severity, one.numbers["n"], one.numbers["n_opposite"]) == ("error", 58, 40)
    assert one.numbers["against"] == pytest.approx(44 / 58, abs=1e-4)
    right = [replace(j, verdict="i") for j in judged]
    assert finding(inspect(rows, judged=right, only=["audit"]), "audit").severity == "ok"
    elsewhere = [replace(j, example="other") for j in judged]
    assert finding(inspect(rows, judged=elsewhere, only=["audit"]), "audit").severity == "skipped"


def test_questions_of_a_benchmark_are_found_in_prompts_and_responses(tmp_path: Path) -> None:
    rows = clean(80, seed=10)
    asked = [f"{p} extra words" for p in (rows[3]["prompt"], rows[9]["prompt"])] + [
        pair(random.Random(n))["prompt"] for n in range(30)
    ]
    rows.append({"prompt": "short one?", "chosen": f"as asked: {asked[5]}", "rejected": "no"})
    file = tmp_path / "question.jsonl"
    turns = [[q, "And then?"] for q in asked] + [["Short one?"]]
    file.write_text("".join(json.dumps({"question_id": n, "turns": t}) + "\n" for n, t in enumerate(turns)))
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(asked[:1]))
    one = finding(inspect(rows, against=[str(file), str(plain)], only=["leakage"]), "leakage")
    assert one.numbers["by_file"] == {"question.jsonl": 4, "plain.txt": 1} and one.severity == "error"
    assert len(set(one.drop)) == 3
    assert finding(inspect(clean(80), against=[str(file)], only=["leakage"]), "leakage").severity == "ok"
    (tmp_path / "none.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="no question found"):
        inspect(rows, against=[str(tmp_path / "none.jsonl")])


def test_ranked_lists_labels_and_demonstrations_are_checked_too() -> None:
    ranked = [
        Example(f"{n}", f"prompt {n}?", ("a b c", "d e f", "g h"), pairs=(Pair(0, 1), Pair(1, 2), Pair(2, 0))) for n in range(3)
    ]
    assert finding(inspect(ranked), "contradictions").numbers["n_in_longer_circles"] == 9
    labelled = [Example(f"{n}", "same?", ("an answer",), labels=(True,)) for n in range(2)]
    found = inspect(labelled)
    assert finding(found, "duplicates").drop == (1,) and finding(found, "length").severity == "skipped"
    assert finding(inspect([{"prompt": "p", "completion": "c"}]), "size").numbers["n"] == 1


def test_an_unknown_check_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean length"):
        inspect(clean(5), only=["lenght"])


def test_at_the_command_line(tmp_path: Path) -> None:
    rows = FAULTS["duplicates"].plant(clean(120, seed=11), 0.1, random.Random(0))
    rows[0]["chosen"] = ""
    rows[1]["rejected"] += "<script>alert(1)</script> key sk-" + "aB3dE5fG7h" * 4
    file, out, page = write_jsonl(tmp_path / "pairs.jsonl", rows), tmp_path / "clean.jsonl", tmp_path / "check.html"
    before = file.read_bytes()
    left = cli("check", file, "--fix", out, "--html", page, "--strict")
    assert left.code == 1 and "secrets" in left.out and "duplicates" in left.out
    assert "aB3dE5fG7h" not in left.out + page.read_text(), "a secret is never shown whole"
    assert file.read_bytes() == before, "nothing is changed in place"
    assert len(read_examples(out).examples) == 132 - 1 - 1 - 12
    assert "left out: duplicates" in left.err and "left out: bad_rows" in left.err
    html = page.read_text()
    assert "<script>alert" not in html and "http://" not in html and html.count('<script type="application/json">') == 2
    again = cli("check", out, "--strict", "--json")
    assert again.code == 0
    assert {one["name"] for one in json.loads(again.out)["findings"] if one["severity"] in LOUD} == {"size"}
    assert cli("check", file, "--fix", file).code == 2


def test_with_a_model_tokens_are_counted_and_likelihood_is_measured(world: World) -> None:
    left = cli("check", world.file("chat"), "--model", world.base, "--max-length", "64", "--json")
    found: dict[str, Any] = json.loads(left.out)
    by_name = {one["name"]: one for one in found["findings"]}
    assert by_name["truncation"]["numbers"]["n_examples"] == 48
    numbers = by_name["distance"]["numbers"]
    assert 40 < numbers["n_sampled_prompts"] <= 48 and set(numbers["logp_per_token"]) == {"chosen", "rejected", "all"}
    assert numbers["gap"] == pytest.approx(numbers["own_samples"] - numbers["logp_per_token"]["all"], abs=1e-3)
    assert numbers["gap_interval"][0] < numbers["gap"] < numbers["gap_interval"][1]


def test_what_real_data_hold(shared_data: Path) -> None:
    hh = inspect(shared_data / "hh_rlhf" / "harmless-base.test.subset.jsonl.gz")
    assert finding(hh, "bad_rows").numbers["reasons"] == {"chosen is empty": 1}
    assert finding(hh, "turn_markers").numbers["n_found"] == 3
    assert finding(hh, "length").numbers["longer_wins"] == pytest.approx(182 / 393, abs=0.003)
    assert loud(hh) == {"bad_rows", "turn_markers", "same_sides"}
    demo = inspect(shared_data / "dpo_en_demo" / "dpo_en_demo.subset.json.gz", only=CHEAP)
    assert finding(demo, "duplicates").numbers["n_copies"] == 4
    assert loud(demo) == {"duplicates"}
    file, questions = (
        shared_data / "alpaca_eval" / "annotations" / "alpaca-7b.json.gz",
        shared_data / "mt_bench" / "question.jsonl",
    )
    alpaca = inspect(file, against=[str(questions)], only=["length", "leakage"])
    assert finding(alpaca, "length").severity == "error" and finding(alpaca, "leakage").numbers["n_found"] == 2
