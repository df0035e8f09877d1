from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from preftune.demo.story import Size, _make_room, tell
from preftune.errors import StorageError
from preftune.evaluate.record import Evaluation
from preftune.run import Run

TINY = Size(demonstrations=200, sft_epochs=1, prompts=12, replies=3, dpo_epochs=1, eval_prompts=8, max_tokens=24)


def evaluation(out: Path) -> Evaluation:
    run = Run(out / "dpo")
    return Evaluation.of(run.read_json(run.evaluation_file))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    out = tmp_path_factory.mktemp("demo") / "a"
    return out, tell(out, size=TINY, seed=3)


def test_every_stage_leaves_its_files(told: tuple[Path, int]) -> None:
    out, _ = told
    for stage in ("sft", "dpo"):
        assert (out / stage / "model" / "model.safetensors").exists()
    assert len((out / "demonstrations.jsonl").read_text().splitlines()) == TINY.demonstrations
    assert "default-src 'none'; script-src 'sha256-" in (out / "dpo" / "report.html").read_text()
    assert "- dpo\n" in (out / "dpo" / "model" / "README.md").read_text(), "the model card"
    first = Run(out / "dpo").metrics(split="train")[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_same_seed_same_numbers(told: tuple[Path, int], tmp_path: Path) -> None:
    tell(tmp_path / "b", size=TINY, seed=3)
    a, b = (
        replace(e, policy="", against="", at="", wins=tuple(replace(w, against="") for w in e.wins))
        for e in (evaluation(told[0]), evaluation(tmp_path / "b"))
    )
    assert a == b
    assert Run(told[0] / "dpo").answers_file.read_bytes() == Run(tmp_path / "b" / "dpo").answers_file.read_bytes()


def test_failure_is_said_and_fails(told: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    """A model that learnt for a second cannot have been aligned: the verdict and the exit code say the same as the numbers."""
    out, code = told
    found = evaluation(out)
    assert (code == 0) == found.worked
    if found.wins[0].win_rate.low <= 50:
        assert code == 1 and "did NOT work" in found.verdict


def test_answers_are_kept_token_by_token(told: tuple[Path, int]) -> None:
    """The pieces are the text with its control tokens, and the log-ratios are those that the implicit reward is made of."""
    found = evaluation(told[0])
    rows = [json.loads(line) for line in Run(told[0] / "dpo").answers_file.read_text().splitlines()]
    assert len(rows) == TINY.eval_prompts == found.samples.n_prompts  # type: ignore[union-attr]
    sums = []
    for answer in (answer for row in rows for answer in row["policy"]):
        assert len(answer["pieces"]) == len(answer["log_ratios"]) == answer["n_tokens"]
        assert answer["text"] == "".join(answer["pieces"]).removesuffix("<end>").strip() or not answer["ended"]
        sums.append(sum(answer["log_ratios"]))
    assert found.samples.implicit_reward.value == pytest.approx(0.1 * sum(sums) / len(sums), abs=1e-3)  # type: ignore[union-attr]
    assert {len(row["policy"]) for row in rows} == {len(row["reference"]) for row in rows} == {TINY.replies}


@pytest.mark.parametrize("name", ["thesis.txt", "demonstrations.jsonl"])
def test_nothing_of_somebody_else_is_deleted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(StorageError, match="no demo"):
        tell(tmp_path, size=TINY)
    assert (tmp_path / name).read_text() == "mine"


def test_a_new_demo_deletes_of_the_former_what_that_made(told: tuple[Path, int], tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(told[0], again)
    (again / "beta-0.5").mkdir()
    _make_room(again)
    assert sorted(p.name for p in again.iterdir()) == [".preftune-demo", "beta-0.5"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file of this name is in the way"):
        tell(tmp_path / "file", size=TINY)
