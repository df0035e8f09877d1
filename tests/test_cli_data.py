"""import, agree and pairs at the command line: from judgments to a file that training reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds import World, cli, read_jsonl, write_jsonl

from preftune.data.read import read_examples


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Path, Path]:
    """Twenty examples of three responses, and two annotators who disagree on every fifth."""
    data = write_jsonl(
        tmp_path / "responses.jsonl", [{"id": f"e{n}", "prompt": f"{n}?", "responses": ["x", "y", "z"]} for n in range(20)]
    )
    rows = [
        {"example": f"e{n}", "i": 0, "j": j, "verdict": said, "annotator": by, "shown_order": [j, 0]}
        for n in range(20)
        for j in (1, 2)
        for by, said in (("anna", "i"), ("bob", "i" if n % 5 else "j"))
    ]
    return data, write_jsonl(tmp_path / "judgments.jsonl", rows)


def test_agree_prints_figures_for_people_and_for_scripts(judged: tuple[Path, Path]) -> None:
    left = cli("agree", judged[1])
    assert left.code == 0 and "anna and bob: same 0.800 (n = 40); kappa 0.000" in left.out
    found = json.loads(cli("agree", judged[1], "--json").out)
    assert found["pairs"][0]["percent"] == {"value": 0.8, "n": 40, "why": "", "low": None, "high": None}
    assert {"alpha", "fleiss", "annotators", "n_units"} < set(found)


@pytest.mark.parametrize(
    ("held", "why"), [("", "no judgments in it; expected"), ('{"example": "e0"', "one line without its end")]
)
def test_a_file_without_judgments_is_no_result(judged: tuple[Path, Path], tmp_path: Path, held: str, why: str) -> None:
    (empty := tmp_path / "empty.jsonl").write_text(held)
    for words in (["agree", empty, "--json"], ["pairs", empty, "--data", judged[0], "--out", tmp_path / "none.jsonl"]):
        left = cli(*words)
        assert left.code == 2 and not left.out and why in left.err and str(empty) in left.err
    assert not (tmp_path / "none.jsonl").exists()


def test_pairs_of_judgments_train(judged: tuple[Path, Path], world: World, tmp_path: Path) -> None:
    data, judgments = judged
    out, held = tmp_path / "pairs.jsonl", tmp_path / "held.jsonl"
    left = cli("pairs", judgments, "--data", data, "--out", out, "--held-out", held, "--fraction", "0.3", "--json")
    counts = json.loads(left.out)
    assert (counts["comparisons"], counts["kept"], counts["tie"], counts["examples without a pair"]) == (40, 32, 8, 4)
    sides = [{e.prompt for e in read_examples(file).examples} for file in (out, held)]
    assert sum(map(len, sides)) == 16 and not sides[0] & sides[1] and sides[1]
    words = world.words(tmp_path / "run", steps=1) + [f"data={out}", f"eval.data={held}"]
    assert cli("train", *words).code == 0


def test_pairs_need_no_data_where_a_judge_left_them_beside_its_judgments(tmp_path: Path) -> None:
    rows = [{"id": f"e{n}", "prompt": f"{n}?", "responses": ["a long answer", "short"]} for n in range(5)]
    data, out = write_jsonl(tmp_path / "answers.jsonl", rows), tmp_path / "judgments.jsonl"
    rule = tmp_path / "rule.py"
    rule.write_text("def longer(prompt, response):\n    return len(response)\n")
    left = cli("judge", f"{rule}:longer", "--by", "rule", "--data", data, "--out", out)
    assert left.code == 0, left.err
    pairs = tmp_path / "pairs.jsonl"
    assert cli("pairs", out, "--out", pairs).code == 0
    assert [e.pairs[0].winner for e in read_examples(pairs).examples] == [0] * 5
    other = tmp_path / "moved.jsonl"
    out.rename(other)
    left = cli("pairs", other, "--out", pairs)
    assert left.code == 2 and "moved.examples.jsonl" in left.err


def test_labels_are_written_and_read(judged: tuple[Path, Path], tmp_path: Path) -> None:
    data, judgments = judged
    out = tmp_path / "labels.jsonl"
    assert cli("pairs", judgments, "--data", data, "--out", out, "--labels", "--balance").code == 0
    values = [label for e in read_examples(out).examples for label in e.labels]
    assert values.count(True) == values.count(False) == 16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--balance"], "--balance"),
        (["--labels", "--ties", "soft"], "are for pairs"),
        (["--min-agreement", "0.2"], "min_agreement"),
    ],
)
def test_settings_without_effect_are_refused(judged: tuple[Path, Path], tmp_path: Path, words: list[str], said: str) -> None:
    left = cli("pairs", judged[1], "--data", judged[0], "--out", tmp_path / "out.jsonl", *words)
    assert left.code == 2 and said in left.err and not (tmp_path / "out.jsonl").exists()


def test_import_writes_our_format_from_another(world: World, tmp_path: Path) -> None:
    rows = [{"q": f"{n}?", "chosen": "yes", "rejected": "no", "score_chosen": 3, "score_rejected": 1} for n in range(3)]
    file, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    left = cli("import", file, "--out", out, "--field", "prompt=q", "--json")
    assert left.code == 0 and json.loads(left.out)["pairs"] == 3
    assert [row["pairs"] for row in read_jsonl(out)] == [[[0, 1, 1.0, 2.0]]] * 3
    assert cli("import", file, "--out", out, "--field", "q").code == 2
