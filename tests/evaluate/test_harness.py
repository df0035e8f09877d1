"""lm-evaluation-harness really runs, on a task of our own that it counts as we do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from worlds import World, cli, write_jsonl

QUESTIONS: list[dict[str, Any]] = [
    {"question": "hello? my kettle", "choices": [" is broken", " sings to the moon", " x"], "label": 0},
    {"question": "thank you", "choices": [" no", " please send a new one", " soon"], "label": 1},
    {"question": "what", "choices": [" a", " b", " c d e f"], "label": 2},
]

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a library that is not ours
def test_a_task_of_ones_own_is_counted_for_both_models(world: World, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'preftune[eval]'")
    rows = write_jsonl(tmp_path / "rows.jsonl", QUESTIONS)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "manners.yaml").write_text(TASK.format(name="manners", rows=rows))
    words = ["eval", world.base, "--against", world.other, "--data", world.file("held_out"), "--n-prompts", 0]
    left = cli(*words, "--out", tmp_path / "out", "--lm-eval", "manners", "--lm-eval-path", tmp_path / "tasks", "--json")
    assert left.code == 0, left.err
    found = json.loads(left.out)["benchmarks"]["manners"]
    for which, folder in (("policy", world.base), ("reference", world.other)):
        assert found[which]["acc"] == pytest.approx(accuracy(folder))
        assert found[which]["n"] == len(QUESTIONS)
    left = cli(*words, "--out", tmp_path / "out", "--lm-eval", "maners", "--lm-eval-path", tmp_path / "tasks")
    assert left.code == 2 and "did you mean manners?" in left.err


def accuracy(folder: Path) -> float:
    """The share of questions whose likeliest choice is the right one, by the model's own forward."""
    import torch

    from preftune.model.load import load_model, load_tokenizer

    model, tokenizer = load_model(folder), load_tokenizer(folder)
    right = 0
    for question in QUESTIONS:
        prompt = tokenizer(question["question"])["input_ids"]
        sums = []
        for choice in question["choices"]:
            ids = tokenizer(question["question"] + choice)["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(logps[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        right += sums.index(max(sums)) == question["label"]
    return right / len(QUESTIONS)


def test_without_it_the_error_says_how_to_get_it(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["eval", world.base, "--against", world.other, "--data", world.file("held_out"), "--n-prompts", 0]
    left = cli(*words, "--out", tmp_path / "out", "--lm-eval", "manners")
    assert left.code == 2 and "pip install 'preftune[eval]'" in left.err
