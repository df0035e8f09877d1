"""The model card: what the hub reads is valid, its figures are those of the evaluation, and it gives away no paths."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from runs_for_tests import estimate, evaluation, made_up

from preftune.report.card import MARK
from preftune.report.page import write_report
from preftune.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return made_up(tmp_path / "first", n_steps=30)


def card_of(run: Run) -> ModelCard:
    write_report([run])
    return ModelCard.load(run.model / "README.md")


def test_the_hub_can_read_it_and_the_figures_are_true(run: Run) -> None:
    card = card_of(run)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["preftune", "alignment", "dpo"]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"win_rate": 70.571, "accuracy": 0.713, "kl": 6.2}
    for words in (
        "Alignment worked",
        "| β | 0.1 |",
        "70.57",
        "67.47 to 73.67",
        "| 2.13.0 |",
        "AutoModelForCausalLM",
        "steps | 30",
    ):
        assert words in card.text, words


def test_a_later_evaluation_is_in_it_and_ones_own_words_stay(run: Run) -> None:
    assert "70.57" in card_of(run).text
    later = evaluation("later", 0.1)
    wins = dataclasses.replace(later.wins[0], win_rate=estimate(55.5, 3.0))
    run.write_json(run.evaluation_file, dataclasses.replace(later, wins=(wins,)).as_dict())
    text = card_of(run).text
    assert "55.5" in text and "70.57" not in text and MARK in text
    card = run.model / "README.md"
    card.write_text("my own words\n")
    write_report([run])
    assert card.read_text() == "my own words\n"


def test_without_an_evaluation_it_says_so_and_an_adapter_says_what_it_is_for(run: Run) -> None:
    run.evaluation_file.unlink()
    (run.model / "adapter_config.json").write_text("{}")
    run.config_file.write_text(f"model: made-up/base-1b\ndata: {run.path}/pairs.jsonl\nout: {run.path}\nloss:\n  name: kto\n")
    card = card_of(run)
    assert card.data.base_model == "made-up/base-1b" and card.data.library_name == "peft" and "lora" in card.data.tags
    assert "not evaluated" in card.text and card.data.eval_results is None and "AutoPeftModelForCausalLM" in card.text


def test_no_absolute_path_is_published(run: Run) -> None:
    run.config_file.write_text(f"model: {run.path}/base\ndata: {run.path}/pairs.jsonl\nout: {run.path}\ncache: {run.path}\n")
    sft, found = f"{run.path}/sft", evaluation("", 0.1)
    wins = dataclasses.replace(found.wins[0], against=sft)
    run.write_json(
        run.evaluation_file, dataclasses.replace(found, against=sft, verdict=f"It beats {sft}.", wins=(wins,)).as_dict()
    )
    write_report([run])
    text = (run.model / "README.md").read_text()
    assert str(run.path.parent) not in text and "…/first/base" in text and "It beats …/first/sft." in text


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    run = made_up(tmp_path / "a: [b]", "`` ```` | <img src=x> --- \n---\n# x", n_steps=30)
    run.config_file.write_text(f"model: {json.dumps(chr(10).join(['``` |', '---', '# x']))}\nloss:\n  name: dpo\n")
    card = card_of(run)
    assert card.data.tags == ["preftune", "alignment", "dpo"]
    table = [line for line in card.text.splitlines() if line.startswith("| true reward")]
    assert len(table) == 1 and "<img" not in table[0].replace("\\<img", "")


def test_a_reward_model_is_called_one(run: Run) -> None:
    (run.model / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    card = card_of(run)
    assert card.data.pipeline_tag == "text-classification" and "AutoModelForSequenceClassification" in card.text
