"""Real preference files, against figures that were counted without preftune (expected.json beside them)."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from preftune.data.read import Dataset, read_examples
from preftune.data.split import leaked_prompts, split_by_prompt
from preftune.errors import DataError


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((shared_data / "expected.json").read_text())
    return figures


def read_aside(path: Path, folder: Path) -> tuple[Dataset, list[dict[str, Any]]]:
    """The Dataset, and the rows that were set aside."""
    data = read_examples(path, quarantine=folder / "aside.jsonl")
    aside = [json.loads(line) for line in (folder / "aside.jsonl").read_text().splitlines()]
    assert len(data.examples) + data.n_dropped + data.n_quarantined == data.n_read
    assert len(aside) == data.n_quarantined
    return data, aside


def test_hh_rlhf(shared_data: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    figures = expected["hh_rlhf"]
    path = shared_data / "hh_rlhf" / "harmless-base.test.subset.jsonl.gz"
    with pytest.raises(DataError, match=rf"^1 of {figures['n']} rows cannot be used\n  .*:163: chosen is empty\n"):
        read_examples(path)
    data, aside = read_aside(path, tmp_path)
    assert data.formats == {"hh": figures["n"] - figures["empty_chosen"]}
    assert [a["reason"] for a in aside] == ["chosen is empty"]
    (bad,) = aside
    rejected = bad["row"]["rejected"].rsplit("\n\nAssistant:", 1)[1].strip()
    chosen, other = ([e.responses[side] for e in data.examples] for side in (0, 1))
    assert all(isinstance(r, str) for r in chosen + other)
    lengths = [[len(str(r)) for r in side] for side in ([*chosen, ""], [*other, rejected])]
    assert mean(lengths[0]) == pytest.approx(figures["mean_len_chosen"], abs=5e-4)
    assert mean(lengths[1]) == pytest.approx(figures["mean_len_rejected"], abs=5e-4)
    assert sum(a > b for a, b in zip(*lengths, strict=True)) == figures["longer_chosen"]
    turns = Counter(str(sum(m.role == "user" for m in e.prompt if not isinstance(m, str))) for e in data.examples)
    turns[str(bad["row"]["rejected"].count("\n\nHuman:"))] += 1
    assert turns == figures["turns"]


def test_dpo_en_demo(shared_data: Path, expected: dict[str, Any]) -> None:
    figures = expected["dpo_en_demo"]
    data = read_examples(shared_data / "dpo_en_demo" / "dpo_en_demo.subset.json.gz")
    assert data.formats == {"sharegpt": figures["n"]}
    assert (data.n_read, data.n_quarantined) == (figures["n"], 0)
    assert Counter(str(len(e.prompt)) for e in data.examples) == figures["turns"]
    assert len({e.id for e in data.examples}) == figures["n"]
    assert data.notes[1].startswith("4 rows repeat the prompt and responses")  # the file has four rows twice
    train, held_out = split_by_prompt(data.examples, 0.2, seed=0)
    assert len(train) + len(held_out) == figures["n"]
    assert 20 < len(held_out) < 70
    assert not leaked_prompts(train, held_out)


ANNOTATIONS = ["alpaca-7b", "claude-2.1_concise", "FuseChat-Llama-3.1-8B-Instruct"]


@pytest.mark.parametrize("model", ANNOTATIONS)
def test_alpaca_eval(shared_data: Path, expected: dict[str, Any], tmp_path: Path, model: str) -> None:
    figures = expected["alpaca_eval"][model]
    data, aside = read_aside(shared_data / "alpaca_eval" / "annotations" / f"{model}.json.gz", tmp_path)
    assert data.n_read == figures["n_rows"]
    assert not aside, "identical outputs are ties, and ties are no bad rows"
    wins, losses = (sum(p.winner == side for e in data.examples for p in e.pairs) for side in (1, 0))
    published = figures["published"]
    assert (wins, losses) == (published["n_wins"], published["n_wins_base"])
    assert sum(not e.pairs for e in data.examples) == published["n_draws"]
    rate = sum(e.scores[1] for e in data.examples) / data.n_read
    assert 100 * rate == pytest.approx(published["win_rate"], abs=1e-6)


def test_alpaca_eval_with_nulls_and_ties(shared_data: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    (name,) = expected["alpaca_eval_discrete_with_nulls_and_ties"]
    figures = expected["alpaca_eval_discrete_with_nulls_and_ties"][name]
    path = shared_data / "alpaca_eval" / "annotations_discrete" / f"{name}.json.gz"
    data, aside = read_aside(path, tmp_path)
    assert data.n_read == figures["rows"]
    reasons = Counter(a["reason"] for a in aside)
    assert reasons == {"preference is null": figures["null_preferences"]}
    assert sum(not e.pairs for e in data.examples) == figures["ties_coded_0"]
    text = gzip.decompress(path.read_bytes()).decode().splitlines()
    for a in aside:  # the place is the line on which the row begins
        assert text[int(a["source"].rsplit(":", 1)[1]) - 1].strip() == "{"
    rate = sum(e.scores[1] for e in data.examples) / figures["published_n_total"]
    assert 100 * rate == pytest.approx(figures["published_win_rate"], abs=1e-6)
