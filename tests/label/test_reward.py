"""Judging by a reward model: its own output for prompt + response, whatever the batch, and what it cannot read is unscored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from worlds import World

from preftune.cli import app
from preftune.data.types import Example, Message
from preftune.errors import ModelError
from preftune.label.reward import score_by_reward
from preftune.model.load import load_model, load_tokenizer, open_renderer
from preftune.model.reward import load_reward_model, set_padding, with_scalar_head

EXAMPLES = [
    Example(f"e{k}", (Message("user", f"What is {k}?"),), ("A number.", "I do not know, " + "really " * k, "Seven."))
    for k in range(4)
]


@pytest.fixture(scope="module")
def reward(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "mine"
    model, tokenizer = with_scalar_head(load_model(world.base), seed=3), load_tokenizer(world.base)
    set_padding(model, tokenizer, never=open_renderer(world.base).end_of_turn)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_hand(folder: Path, example: Example) -> list[float]:
    """One plain forward per response."""
    model, renderer = load_reward_model(folder).eval(), open_renderer(folder)
    tree = renderer.tree(example)
    assert tree is not None
    rows = [torch.from_numpy(np.concatenate([tree.prompt, b.ids]).astype("int64"))[None] for b in tree.branches]
    with torch.no_grad():
        return [float(model(input_ids=row).logits[0, 0]) for row in rows]


def test_scores_are_the_models_own_whatever_the_batch(reward: Path) -> None:
    expected = [score for example in EXAMPLES for score in by_hand(reward, example)]
    for budget in (1, 60, 8192):
        found = score_by_reward(EXAMPLES, str(reward), tokens_per_batch=budget)
        assert [s.score for s in found] == pytest.approx(expected, abs=1e-5)
        assert [(s.example, s.response) for s in found] == [(e.id, k) for e in EXAMPLES for k in range(3)]
    assert len({round(score, 4) for score in expected}) == 12


def test_what_is_longer_than_the_context_is_unscored_and_nothing_else(reward: Path) -> None:
    long = replace(EXAMPLES[0], responses=("A number.", "word " * 400))
    found = score_by_reward([long], str(reward))
    assert found[0].score == pytest.approx(by_hand(reward, replace(long, responses=long.responses[:1]))[0], abs=1e-5)
    assert found[1].score is None and "longer than the model's context" in found[1].why


def test_a_language_model_is_no_reward_model(world: World) -> None:
    with pytest.raises(ModelError, match="a language model, not a reward model"):
        score_by_reward(EXAMPLES, str(world.base))


def test_an_encoder_reads_two_texts(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "what", "is", "red", "blue", "?"]
    base = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own tokenizer says
    PreTrainedTokenizerFast(tokenizer_object=base, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
                            model_input_names=names).save_pretrained(tmp_path)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        max_position_embeddings=16, num_labels=1, initializer_range=0.5)  # fmt: skip
    model: Any = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    example = Example("e", (Message("user", "what is ?"),), ("red", "blue", "red " * 20))
    found = score_by_reward([example], str(tmp_path))
    for answer, scored in zip((6, 7), found, strict=False):
        ids, kinds = torch.tensor([[1, 4, 5, 8, 2, answer, 2]]), torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
        with torch.no_grad():
            expected = float(model(input_ids=ids, token_type_ids=kinds, attention_mask=torch.ones_like(ids)).logits[0, 0])
        assert scored.score == pytest.approx(expected, abs=1e-6)
    assert found[2].score is None


def test_the_best_of_n_against_the_worst_by_the_command(reward: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    rows = [{"id": e.id, "prompt": [m._asdict() for m in e.prompt], "responses": list(e.responses)} for e in EXAMPLES]  # type: ignore[union-attr]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["judge", "--data", str(data), "--by", "reward", str(reward), "--choice", "best_worst", "--json",
             "--out", str(tmp_path / "j.jsonl"), "--cache", str(tmp_path / "r.sqlite")]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    for line, example in zip((tmp_path / "j.jsonl").read_text().splitlines(), EXAMPLES, strict=True):
        judged, scores = json.loads(line), by_hand(reward, example)
        assert judged["annotator"] == "reward:mine"
        assert scores[judged[judged["verdict"]]] == max(scores)
        assert {judged["i"], judged["j"]} == {int(np.argmax(scores)), int(np.argmin(scores))}
