"""The scripts that compare objectives on the demo's world run on a tiny one, go on where they stood, and fill their tables."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import beta
import length_control
import objectives
import pytest
import rlhf
from demo_world import make_world

from preftune.demo.story import QUICK
from preftune.errors import ConfigError

SOME = ("dpo", "kto", "sppo", "plackett_luce", "bradley_terry")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objectives")


def call(monkeypatch: pytest.MonkeyPatch, main: Any, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    code: int = main()
    return code


def test_objectives_are_measured_once_each_and_drawn(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--out", out, "--quick", "--only", ",".join(SOME), "--svg", out / "figure.svg")
    assert call(monkeypatch, objectives.main, *words) == 0
    start, *rows = json.loads((out / "seed-0" / "results.json").read_text())
    assert [r["name"] for r in rows] == sorted(SOME) and len(start["reward"]) == 3
    by = {r["name"]: r for r in rows}
    assert [by[n]["data"] for n in SOME] == ["pairs", "thumbs", "votes", "ratings", "pairs"]
    assert by["dpo"]["loss_first"] == pytest.approx(0.6931472, abs=1e-5)
    assert all(r["finite"] and r["steps"] == 2 for r in rows)
    assert all(r["win_rate"][1] <= r["win_rate"][0] <= r["win_rate"][2] for r in rows if "win_rate" in r)
    assert 0 <= by["bradley_terry"]["accuracy"] <= 1 and by["bradley_terry"]["n_pairs"] > 0
    assert "| dpo | pairs |" in capsys.readouterr().out
    figure = ET.parse(out / "figure.svg")
    assert {"dpo", "kto", "sppo"} <= {"".join(t.itertext()) for t in figure.iter("{http://www.w3.org/2000/svg}text")}

    before = {file: file.stat().st_mtime_ns for file in (out / "seed-0" / "runs").rglob("*")}
    assert call(monkeypatch, objectives.main, *words[:-2]) == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "seed-0" / "runs").rglob("*")} == before, (
        "nothing is trained twice"
    )


def test_length_is_favoured_by_the_labels_and_every_training_has_its_row(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_control, "ARMS", {name: length_control.ARMS[name] for name in ("dpo", "dpo, ld_alpha 0.5")})
    assert call(monkeypatch, length_control.main, "--out", out, "--quick", "--svg", out / "length.svg") == 0
    found = json.loads((out / "length_control.json").read_text())
    assert [r["name"] for r in found["rows"]] == ["(the SFT model)", "dpo, fair labels", "dpo", "dpo, ld_alpha 0.5"]
    assert found["labels"][0]["pairs where the longer wins"] > 0.55
    assert ET.parse(out / "length.svg").getroot().tag.endswith("svg")


def test_beta_and_learning_rate_have_a_row_each(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(beta, "BETAS", (0.1, 0.5))
    words = ("--out", out, "--quick", "--seeds", "1", "--json", out / "beta.json", "--svg", out / "beta.svg")
    assert call(monkeypatch, beta.main, *words) == 0
    found = json.loads((out / "beta.json").read_text())
    assert [row["beta"] for row in found["summary"]] == [0.1, 0.5] and len(found["runs"]) == 2
    for row in found["runs"]:
        assert row["margin"] == pytest.approx(row["beta"] * row["log_ratio"])
    assert "| 0.001 | 0.5 |" in capsys.readouterr().out
    assert ET.parse(out / "beta.svg").getroot().tag.endswith("svg")


def test_rlhf_with_a_learned_reward_is_measured_by_the_true_one(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--out", out, "--quick", "--reward", "learned", "--set", "rollout.beta=0.5")
    assert call(monkeypatch, rlhf.main, *words) == 0
    (row,) = json.loads((out / "rlhf.json").read_text())
    assert row["name"] == "ppo learned rollout.beta=0.5" and row["steps"] == 2
    assert row["gain"][1] <= row["gain"][0] <= row["gain"][2] and row["curve"][0]["objective/kl"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("word", "said"), [("--only=dpoo", "dpo"), ("--set=loss.betta=1", "loss.beta")])
def test_a_slip_is_said_with_the_nearest(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str, said: str
) -> None:
    assert call(monkeypatch, objectives.main, "--out", out, "--quick", "--only=dpo", word) == 1
    assert said in capsys.readouterr().err


def test_another_size_in_the_same_folder_is_refused(out: Path) -> None:
    with pytest.raises(ConfigError, match="another size"):
        make_world(out / "seed-0", QUICK, seed=0)


def test_every_objective_has_data_that_it_is_for() -> None:
    assert {objectives.kind_of_data(name) for name in objectives.offline()} == {"pairs", "thumbs", "votes", "ratings"}
