"""A reward model's scores in float64 against the model's own forward, one response at a time: values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from preftune.data.types import Branch, Tree
from preftune.engine.policy import Path
from preftune.engine.reward import RewardModel, ValueModel
from preftune.errors import ModelError
from preftune.model.reward import with_scalar_head

TREES = tiny.forest(5, n=4, scored=0.7)
HEADS = [
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "mixtral",
    "gpt-neox",
    "gpt2",
    "opt",
    "bloom",
]


def scorer(name: str) -> Any:
    return with_scalar_head(tiny.model(name), seed=1).double()


def textbook(model: Any, trees: Sequence[Tree]) -> Tensor:
    """transformers' own class, row by row; no padding, so the last token is the last."""
    rows = [torch.cat([torch.from_numpy(t.prompt), torch.from_numpy(b.ids)]).long()[None] for t in trees for b in t.branches]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])


@pytest.mark.parametrize("name", HEADS)
def test_scores_are_the_models_own(name: str) -> None:
    model = scorer(name)
    twin = copy.deepcopy(model)
    with tiny.Float64():
        reward = RewardModel.choose(model, TREES)
        batch = reward.pack(TREES)
        scores, expected = reward(batch), textbook(twin, TREES)
        weight = torch.linspace(-1, 2, len(scores), dtype=scores.dtype)
        (scores * weight).sum().backward()
        (expected * weight).sum().backward()
    assert scores.shape == (batch.n_responses,) and scores.dtype == torch.float64
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-9)
    assert tiny.relative(tiny.gradients(model), tiny.gradients(twin)) < 1e-6
    if name in ("llama", "qwen2", "qwen3", "phi3"):
        assert reward.path.layout == "forest"


@pytest.mark.parametrize(
    "path", [Path("forest", "own"), Path("rows", "own"), Path("rows", "model"), Path("rows", "model", alone=True)]
)
def test_every_path_gives_the_same(path: Path) -> None:
    """Rows that the model reads itself are padded by its own padding token, by which it finds their ends."""
    pad = tiny.VOCAB - 1
    trees = [replace(t, branches=tuple(Branch(b.ids % pad, b.scored) for b in t.branches)) for t in TREES]
    model = scorer("llama")
    with tiny.Float64():
        expected = textbook(copy.deepcopy(model), trees)
        model.config.pad_token_id = pad
        reward = RewardModel(model, path)
        torch.testing.assert_close(reward(reward.pack(trees)), expected, rtol=0, atol=1e-10)


def test_a_response_of_one_token_is_scored_at_it() -> None:
    model = scorer("llama")
    tree = tiny.random_tree(np.random.default_rng(0), prompt=3, lengths=[1, 1])
    with tiny.Float64():
        expected = textbook(copy.deepcopy(model), [tree])
        reward = RewardModel(model, Path("forest", "own"))
        torch.testing.assert_close(reward(reward.pack([tree])), expected, rtol=0, atol=1e-10)


def test_the_head_is_drawn_from_the_seed_and_the_body_is_kept() -> None:
    base = tiny.model("llama")
    before = {name: p.clone() for name, p in base.base_model.named_parameters()}
    one, two = with_scalar_head(base, seed=3).score.weight.clone(), with_scalar_head(base, seed=3).score.weight
    assert torch.equal(one, two) and not torch.equal(one, with_scalar_head(base, seed=4).score.weight)
    model = with_scalar_head(base, seed=3)
    assert all(torch.equal(p, before[name]) for name, p in model.base_model.named_parameters())
    assert model.config.num_labels == 1


def test_an_architecture_without_such_a_class_is_refused() -> None:
    with pytest.raises(ModelError, match="no sequence classification of mamba"):
        with_scalar_head(tiny.model("mamba"))


# The critic


def values_by_hand(model: Any, trees: Sequence[Tree]) -> Tensor:
    """The head at the hidden state from which each scored token is predicted; each reply after its prompt, by itself."""
    found = []
    for tree in trees:
        for branch in tree.branches:
            row = torch.cat([torch.from_numpy(tree.prompt), torch.from_numpy(branch.ids)]).long()[None]
            hidden = model.base_model(input_ids=row, use_cache=False).last_hidden_state[0]
            found.append(model.score(hidden)[len(tree.prompt) - 1 :, 0][torch.from_numpy(np.flatnonzero(branch.scored))])
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_values_are_the_heads_before_every_scored_token(name: str) -> None:
    model = scorer(name)
    twin = copy.deepcopy(model)
    with tiny.Float64():
        critic = ValueModel.choose(model, TREES)
        values, expected = critic(critic.pack(TREES)), values_by_hand(twin, TREES)
        weight = torch.linspace(-1, 2, len(values), dtype=values.dtype)
        (values * weight).sum().backward()
        (expected * weight).sum().backward()
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-9)
    assert tiny.relative(tiny.gradients(model), tiny.gradients(twin)) < 1e-6


def test_a_model_that_only_reads_whole_rows_itself_is_no_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scorer("llama")
    alone = RewardModel(model, Path("rows", "model", "the others differ", alone=True))
    monkeypatch.setattr(RewardModel, "choose", lambda *given, **named: alone)
    with pytest.raises(ModelError, match="cannot be a critic, only its own forward is exact: the others differ"):
        ValueModel.choose(model, TREES)
