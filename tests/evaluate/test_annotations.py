"""`preftune winrate` on files of preferences: the leaderboard's figures, rows that are missing, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from preftune.cli import app
from preftune.data.judgments import append_judgments
from preftune.data.types import Example, Judgment
from preftune.data.write import judged_file, write_examples
from preftune.errors import ConfigError, DataError, PreftuneError
from preftune.evaluate.length_control import Gamed, length_controlled
from preftune.evaluate.length_tables import read_tables

KEYS = ("n_total", "n_wins", "n_wins_base", "n_draws", "win_rate", "standard_error", "discrete_win_rate", "avg_length",
        "length_controlled_winrate", "lc_standard_error")  # fmt: skip
N = 40


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.evaluate.length_control.RESAMPLES", 40)


def winrate(*words: object, fails: type[PreftuneError] | None = None) -> Any:
    done = CliRunner().invoke(app, ["winrate", "--json", *map(str, words)])
    if fails is not None:
        assert isinstance(done.exception, fails), (done.output, done.exception)
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def rows(n: int = N, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [
        {"instruction": f"question {k}", "output_1": "x" * int(random.integers(5, 90)), "generator_1": "base",
         "output_2": "y" * int(random.integers(5, 90)), "generator_2": "mine", "preference": 1 + float(random.random())}
        for k in range(n)
    ]  # fmt: skip


def save(file: Path, content: list[Any]) -> Path:
    text = json.dumps(content) if ".jsonl" not in file.name else "".join(json.dumps(row) + "\n" for row in content)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A folder of small tables, with the original names."""
    folder, random = tmp_path / "tables", np.random.default_rng(5)
    folder.mkdir()
    difficulty = [float(v) for v in random.normal(size=N)]
    write_csv(folder / "instruction_difficulty.csv", ["index", "instruction_difficulty"], list(enumerate(difficulty)))
    gamed = [["gamed", k % N, float(random.random()), float(random.normal()), difficulty[k % N], False] for k in range(2 * N)]
    header = ["model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]
    write_csv(folder / "df_gamed.csv", header, gamed)
    return folder


def write_csv(file: Path, header: list[str], content: list[Any]) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([header, *content])


@pytest.mark.parametrize("model", ["alpaca-7b", "claude-2.1_concise", "FuseChat-Llama-3.1-8B-Instruct"])
def test_the_leaderboards_figures_come_out(shared_data: Path, model: str) -> None:
    folder = shared_data / "alpaca_eval"
    expected = json.loads((shared_data / "expected.json").read_text())["alpaca_eval"][model]
    found = winrate("--annotations", folder / f"annotations/{model}.json.gz", "--length-control", folder)
    assert tuple(found)[: len(KEYS)] == KEYS and found["length_control"] == "alpaca_eval"
    published, official = expected["published"], expected["official_code_0_6_6_on_these_files"]
    for name in KEYS[:8]:
        assert found[name] == pytest.approx(published[name], abs=1e-6), name
    assert found["length_controlled_winrate"] == pytest.approx(official["length_controlled_winrate"], abs=0.02)
    assert found["length_controlled_winrate"] == pytest.approx(published["length_controlled_winrate"], abs=0.02)
    assert found["lc_standard_error"] == pytest.approx(official["lc_standard_error"], abs=0.001)
    assert found["lc_low"] < found["length_controlled_winrate"] < found["lc_high"]


CHANGED: dict[str, tuple[Callable[[int, dict[str, Any]], dict[str, Any] | None], float, float]] = {
    "nulls and old ties": (
        lambda i, row: row | {"preference": None} if i % 27 == 3 else row | {"preference": 0} if i % 40 == 5 else row,
        65.20907793981692, 0.6494721075016714,
    ),
    "rows missing": (lambda i, row: None if i % 40 == 7 else row, 65.23360634363937, 0.11910504853633265),
    "hard verdicts": (lambda i, row: row | {"preference": round(row["preference"])}, 66.78962038731727, 0.7038981156258278),
    "longer": (lambda i, row: row | {"output_2": row["output_2"] * 3}, 34.10231860317361, 0.8185421170539638),
}  # fmt: skip
"""What is done to FuseChat's annotations -> the length-controlled win rate and error that alpaca_eval 0.6.6 then gives."""


@pytest.mark.parametrize("what", CHANGED)
def test_changed_files_come_out_as_the_authors_code_has_them(shared_data: Path, tmp_path: Path, what: str) -> None:
    folder, (change, rate, error) = shared_data / "alpaca_eval", CHANGED[what]
    with gzip.open(folder / "annotations/FuseChat-Llama-3.1-8B-Instruct.json.gz", "rt", encoding="utf-8") as file:
        content = [change(i, row) for i, row in enumerate(json.load(file))]
    changed = save(tmp_path / "a.json", [row for row in content if row is not None])
    found = winrate("--annotations", changed, "--length-control", folder)
    assert found["length_controlled_winrate"] == pytest.approx(rate, abs=0.02)
    assert found["lc_standard_error"] == pytest.approx(error, abs=0.001)


def test_nulls_and_ties_of_an_old_file(shared_data: Path) -> None:
    found = winrate("--annotations", shared_data / "alpaca_eval/annotations_discrete/minichat-3b.alpaca_eval_gpt4.json.gz")
    assert (found["n_total"], found["n_draws"], found["n_dropped"]) == (804, 5, 1)
    assert found["win_rate"] == pytest.approx(48.818407960199, abs=1e-9) and found["length_controlled_winrate"] is None
    assert found["win_rate_low"] < found["win_rate"] < found["win_rate_high"] and found["lc_standard_error"] is None


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz"])
def test_every_ending_is_read_alike(tmp_path: Path, name: str) -> None:
    found = winrate("--annotations", save(tmp_path / name, rows()))
    assert found["win_rate"] == pytest.approx(100 * np.mean([row["preference"] - 1 for row in rows()]))
    assert found["avg_length"] == int(np.mean([len(row["output_2"]) for row in rows()]))
    assert (found["model"], found["baseline"]) == ("mine", "base")


def test_difficulties_go_by_row_number_and_by_text_where_the_texts_are_named(tmp_path: Path, tables: Path) -> None:
    full, gap = rows(), [row for k, row in enumerate(rows()) if k != 3]
    complete = save(tmp_path / "all.json", full)
    by_number = winrate("--annotations", save(tmp_path / "gap.json", gap), "--length-control", tables)
    by_text = winrate("--annotations", tmp_path / "gap.json", "--length-control", tables, "--instructions", complete)
    difficulty, gamed = oracle_tables(tables)
    for found, mine in ((by_number, difficulty[: N - 1]), (by_text, difficulty[:3] + difficulty[4:])):
        want = length_controlled(
            [row["preference"] - 1 for row in gap], [len(row["output_2"]) for row in gap],
            [len(row["output_1"]) for row in gap], difficulty=mine, gamed=gamed,
        )  # fmt: skip
        assert found["length_controlled_winrate"] == want.win_rate and found["lc_standard_error"] == want.standard_error
    assert by_number["length_controlled_winrate"] != by_text["length_controlled_winrate"]
    assert "1 are missing, so rows behind a gap get a neighbour's" in by_number["notes"][0]


def oracle_tables(folder: Path) -> tuple[list[float], Gamed]:
    with (folder / "df_gamed.csv").open(encoding="utf-8") as opened:
        gamed = list(csv.DictReader(opened))
    with (folder / "instruction_difficulty.csv").open(encoding="utf-8") as opened:
        difficulty = [float(row["instruction_difficulty"]) for row in csv.DictReader(opened)]
    columns = ("preference", "std_delta_len", "instruction_difficulty")
    return difficulty, Gamed(*(np.array([float(row[name]) for row in gamed]) for name in columns))


def test_the_same_instruction_twice_takes_its_difficulties_in_turn(tmp_path: Path, tables: Path) -> None:
    content = [row | {"instruction": "again"} if k in (4, 9) else row for k, row in enumerate(rows())]
    file = save(tmp_path / "a.json", content)
    by_number = winrate("--annotations", file, "--length-control", tables)
    by_text = winrate("--annotations", file, "--length-control", tables, "--instructions", file)
    assert by_text["length_controlled_winrate"] == by_number["length_controlled_winrate"]


def test_the_baseline_against_itself_is_fifty(tmp_path: Path, tables: Path) -> None:
    content = [row | {"generator_2": "base", "preference": 1.5} for row in rows()]
    found = winrate("--annotations", save(tmp_path / "a.json", content), "--length-control", tables)
    assert (found["win_rate"], found["n_draws"], found["standard_error"]) == (50.0, N, 0.0)
    assert (found["length_controlled_winrate"], found["lc_standard_error"]) == (50.0, 0.0)


@pytest.mark.parametrize(("coded", "share"), [(2.0, 100.0), (1, 0.0), (0, 50.0)])
def test_all_won_lost_or_drawn(tmp_path: Path, tables: Path, coded: float, share: float) -> None:
    file = save(tmp_path / "a.json", [row | {"preference": coded} for row in rows()])
    found = winrate("--annotations", file, "--own-prompts")
    assert found["win_rate"] == found["discrete_win_rate"] == share and found["standard_error"] == 0.0
    assert found["length_controlled_winrate"] == pytest.approx(share, abs=5) and found["length_control"] == "own rows"
    assert math.isfinite(winrate("--annotations", file, "--length-control", tables)["length_controlled_winrate"])


def test_one_row_has_a_win_rate_and_no_error(tmp_path: Path) -> None:
    found = winrate("--annotations", save(tmp_path / "a.jsonl", [{"preference": 1.75}]))
    assert (found["n_total"], found["win_rate"], found["standard_error"], found["avg_length"]) == (1, 75.0, None, None)


def test_failed_judgments_are_counted_and_what_lies_outside_is_said(tmp_path: Path) -> None:
    content = [{"preference": p} for p in (None, 2, 1.5, 0, 3, "1.25")]
    found = winrate("--annotations", save(tmp_path / "a.json", content))
    assert (found["n_total"], found["n_dropped"], found["n_draws"]) == (4, 2, 2)
    assert found["notes"] == ["1 rows have a preference outside 1 to 2, which counts as none"]


def test_mostly_one_sided_lengths_are_pointed_out(tmp_path: Path) -> None:
    content = [row | {"output_2": "y" * (100 + k)} for k, row in enumerate(rows())]
    found = winrate("--annotations", save(tmp_path / "a.json", content), "--own-prompts")
    assert "in 100% of the rows the model's answer is not shorter" in found["notes"][-1]


def bad_tables(folder: Path, change: Callable[[str], str], name: str = "df_gamed.csv") -> Path:
    file = folder / name
    file.write_text(change(file.read_text()))
    return folder


def test_what_is_no_annotation_names_its_lines(tmp_path: Path) -> None:
    content = [{"preference": 1.5}, {"instruction": "a"}, {"preference": "good"}, {"preference": True}, 7]
    said = winrate("--annotations", save(tmp_path / "a.jsonl", content), fails=DataError)
    assert "4 of 5 rows are no annotations" in said
    for line, reason in ((2, "no preference in it (it has instruction)"), (3, 'preference is "good"'),
                         (4, "preference is true"), (5, "not an object with named columns")):  # fmt: skip
        assert f"a.jsonl:{line}: {reason}" in said
    assert "none of its 2 rows has a verdict" in winrate(
        "--annotations", save(tmp_path / "b.json", [{"preference": None}, {"preference": 7}]), fails=DataError
    )
    assert "no such file" in winrate("--annotations", tmp_path / "none.json", fails=DataError)
    mixed = [row | {"generator_2": f"m{k % 2}"} for k, row in enumerate(rows())]
    said = winrate("--annotations", save(tmp_path / "c.json", mixed), fails=ConfigError)
    assert "generator_2 names 2 models (m0, m1)" in said


def test_tables_that_do_not_fit_are_refused_with_what_was_expected(tmp_path: Path, tables: Path) -> None:
    file = save(tmp_path / "a.json", rows())

    def refused(folder: Path, kind: type[PreftuneError] = DataError) -> str:
        return str(winrate("--annotations", file, "--length-control", folder, fails=kind))

    original = (tables / "df_gamed.csv").read_text()
    said = refused(bad_tables(tables, lambda text: text.replace("std_delta_len", "delta")))
    assert "df_gamed.csv:1: no column std_delta_len; expected index, preference" in said and "found model, index" in said
    (tables / "df_gamed.csv").write_text(original.replace("False", "True", 1))
    assert "df_gamed.csv:2: not_gamed_baseline is 'True', expected False" in refused(tables)
    line = original.splitlines()[3]
    (tables / "df_gamed.csv").write_text(original.replace(line, line.replace(line.split(",")[3], "wide")))
    assert "df_gamed.csv:4: std_delta_len is 'wide', expected a number" in refused(tables)
    (tables / "df_gamed.csv").write_text(original + "gamed,1,0.5\n")
    assert "df_gamed.csv:82: 3 cells, but the header has 6 columns" in refused(tables)
    (tables / "df_gamed.csv").unlink()
    assert "no df_gamed*.csv in it; expected the columns index" in refused(tables, ConfigError)
    assert "no such folder" in refused(tmp_path / "none", ConfigError)


def test_tables_by_other_names_and_without_a_name_for_the_index(tmp_path: Path, tables: Path) -> None:
    before = read_tables(tables)
    (tables / "df_gamed.csv").rename(tables / "df_gamed_surrogate.csv")
    bad_tables(tables, lambda text: text.replace("index", "", 1), "instruction_difficulty.csv")
    again = read_tables(tables)
    assert again.difficulty == before.difficulty and (again.gamed.preference == before.gamed.preference).all()
    (tables / "instruction_difficulty.csv").unlink()
    assert read_tables(tables).difficulty == before.difficulty, "the gamed rows carry the difficulties too"
    (tables / "df_gamed_other.csv").write_text("")
    with pytest.raises(ConfigError, match=r"df_gamed_other.csv, df_gamed_surrogate.csv: which of them"):
        read_tables(tables)


def test_rows_that_are_no_run_of_the_benchmark_are_refused(tmp_path: Path, tables: Path) -> None:
    few, many = save(tmp_path / "few.json", rows(20)), save(tmp_path / "many.json", rows(N + 1))
    for file in (few, many):
        said = winrate("--annotations", file, "--length-control", tables, fails=ConfigError)
        assert "--instructions FILE" in said and "--own-prompts" in said
    assert winrate("--annotations", few, "--length-control", tables, "--instructions", save(tmp_path / "a.json", rows()))
    other = save(tmp_path / "other.json", [row | {"instruction": f"other {k}"} for k, row in enumerate(rows())])
    said = winrate("--annotations", few, "--length-control", tables, "--instructions", other, fails=DataError)
    assert "20 rows have an instruction that --instructions does not hold" in said and "few.json:1: 'question 0'" in said
    said = winrate("--annotations", few, "--length-control", tables, "--instructions", few, fails=ConfigError)
    assert "20 rows, expected the 40" in said
    bare = save(tmp_path / "bare.json", [{"preference": 1.2}] * N)
    assert "40 rows lack one" in winrate("--annotations", bare, "--own-prompts", fails=DataError)
    said = winrate("--annotations", few, "--own-prompts", "--length-control", tables, fails=ConfigError)
    assert "leave --length-control out" in said


def test_our_own_judgments_count_for_the_second_response(tmp_path: Path) -> None:
    file = tmp_path / "judgments.jsonl"
    examples = [Example(f"e{k}", f"question {k}", ("b" * (k + 3), "a" * (2 * k + 1))) for k in range(12)]
    judgments = [
        Judgment(e.id, 0, 1, "j" if k % 3 else "i", "judge", o) for k, e in enumerate(examples) for o in ((0, 1), (1, 0))
    ]
    append_judgments(file, judgments)
    assert winrate("--annotations", file)["avg_length"] is None
    write_examples(judged_file(file), examples)
    found = winrate("--annotations", file, "--own-prompts")
    assert (found["n_total"], found["n_wins"], found["n_wins_base"]) == (12, 8, 4)
    assert found["avg_length"] == int(np.mean([2 * k + 1 for k in range(12)]))
    assert found["length_controlled_winrate"] is not None and found["lc_standard_error"] is None
    append_judgments(file, [Judgment("e0", 0, 1, "tie", "other", (0, 1)), Judgment("e0", 0, 2, "tie", "other", (0, 2))])
    assert "holds judgments of judge, other; --annotator" in winrate("--annotations", file, fails=ConfigError)
    found = winrate("--annotations", file, "--annotator", "other")
    assert (found["n_total"], found["n_draws"]) == (1, 1) and "1 judgments compare other responses" in found["notes"][0]
    assert "did you mean other?" in winrate("--annotations", file, "--annotator", "othr", fails=ConfigError)
