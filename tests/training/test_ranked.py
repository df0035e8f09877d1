"""Several responses of one prompt are one tree: each is read once, with the loss and gradient of its pairs apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level
from torch import Tensor

from preftune.data.read import read_examples
from preftune.data.template import Renderer, build_trees
from preftune.data.types import Pair, Tree
from preftune.engine.policy import Path, Policy
from preftune.engine.score import score
from preftune.losses.objective import objective
from preftune.training.material import material
from preftune.training.metrics import Sums
from preftune.training.step import Micro, backward

GOAL = [objective("dpo", {"beta": 0.3})]
POLICY = Policy(tiny.model("llama"), Path("forest", "own"))
REFERENCE = Policy(tiny.model("llama", seed=1), Path("forest", "own"))


def step(trees: Sequence[Tree]) -> tuple[Sums, dict[str, Tensor]]:
    """Metric sums and gradients of one step over the trees."""
    with tiny.Float64():
        reference = torch.cat([torch.from_numpy(x) for tree in score(REFERENCE, trees) for x in tree])
        sums = backward(POLICY, [Micro(POLICY.pack(trees), reference)], GOAL, n_units=[sum(len(t.pairs) for t in trees)])
    return sums, tiny.gradients(POLICY.model)


def apart(tree: Tree) -> list[Tree]:
    """Each preference as a tree of its own."""
    return [Tree("", tree.prompt, (tree.branches[p.winner], tree.branches[p.loser]), (Pair(0, 1),)) for p in tree.pairs]


def best_against_rest(k: int) -> list[tuple[int, int]]:
    return [(0, loser) for loser in range(1, k)]


def every_two(k: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(k), 2))


@pytest.mark.parametrize("preferences", [best_against_rest, every_two])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_one_tree_is_its_pairs_apart(k: int, preferences: object) -> None:
    assert callable(preferences)
    rng = np.random.default_rng(k)
    bare = [tiny.random_tree(rng, prompt=5, lengths=rng.integers(1, 7, k).tolist(), scored=0.8) for _ in range(2)]
    trees = [Tree(t.id, t.prompt, t.branches, tuple(Pair(*p) for p in preferences(k))) for t in bare]
    (together, gradient), (separate, expected) = step(trees), step([pair for tree in trees for pair in apart(tree)])
    assert tiny.relative(gradient, expected) < 1e-9
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        torch.testing.assert_close(together[name], separate[name], rtol=1e-9, atol=1e-12)
    n_read = sum(t.n_tokens for t in trees)
    assert n_read == sum(len(t.prompt) + sum(len(b.ids) for b in t.branches) for t in trees)
    assert (n_read < sum(pair.n_tokens for tree in trees for pair in apart(tree))) == (k > 2)


@settings(max_examples=15)
@given(st.data())
def test_any_preferences_of_any_forest(data: st.DataObject) -> None:
    grown = tiny.grow(data.draw(tiny.forests(k=(2, 5))))
    trees = []
    for tree in grown:
        two = st.tuples(*[st.integers(0, len(tree.branches) - 1)] * 2).filter(lambda p: p[0] != p[1])
        pairs = data.draw(st.lists(two, min_size=1, max_size=5))
        trees.append(Tree(tree.id, tree.prompt, tree.branches, tuple(Pair(*p) for p in pairs)))
    scored = all(b.scored.any() for t in trees for b in t.branches)
    (together, gradient), (separate, expected) = step(trees), step([pair for tree in trees for pair in apart(tree)])
    torch.testing.assert_close(together["loss"], separate["loss"], rtol=1e-9, atol=1e-12)
    assert not scored or tiny.relative(gradient, expected) < 1e-9


@pytest.mark.parametrize(
    ("stated", "pairs"),
    [
        ({"ranks": [2, 1, 3, 3]}, {(1, 0), (1, 2), (1, 3), (0, 2), (0, 3)}),
        ({"scores": [0.5, 2.0, 0.5, 0.1]}, {(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)}),
        ({"pairs": [[2, 0], [2, 1], [2, 3]]}, {(2, 0), (2, 1), (2, 3)}),
    ],
)
def test_ranked_rows_become_one_tree(stated: dict[str, object], pairs: set[tuple[int, int]]) -> None:
    """Ranks and scores give every two that differ; `pairs` says which, such as the best against the rest."""
    row = {"prompt": "What is two and two?", "responses": [" Four.", " 4!", " Five.", " No idea"], **stated}
    renderer = Renderer(byte_level(), max_length=200)
    (tree,) = material(build_trees(read_examples([row]).examples, renderer), GOAL).trees
    assert {(p.winner, p.loser) for p in tree.pairs} == pairs and len(tree.pairs) == len(pairs)
    assert [renderer.decode(b.ids) for b in tree.branches] == row["responses"]
    assert tree.n_tokens == len(tree.prompt) + sum(len(b.ids) for b in tree.branches), "the prompt once"
