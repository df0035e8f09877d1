"""Each architecture against the textbook in float64: log-probs to 1e-9, gradients of DPO to 1e-7; and which path serves it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from preftune.data.types import Tree
from preftune.engine.batch import pack
from preftune.engine.policy import Policy, response_sums
from preftune.losses.dpo import dpo
from preftune.losses.records import RefPairs

PATHS = {
    "llama": "forest", "llama-tied": "forest", "llama-bias": "forest", "llama-llama3-rope": "forest",
    "llama-dynamic-rope": "forest", "qwen2": "forest", "qwen3": "forest", "mistral": "forest", "mistral-no-window": "forest",
    "gemma2": "forest", "gemma3": "forest", "phi": "forest", "phi3": "forest", "phi3-longrope": "forest", "mixtral": "forest",
    "qwen3-moe": "forest", "cohere": "forest", "granite": "forest", "gpt-neox": "forest", "gpt2": "forest", "opt": "forest",
    "gpt-oss": "rows",  # attention sinks
    "bloom": "rows", "falcon-alibi": "rows",  # biases by distance, attention of their own
    "mamba": "rows",  # state-space layers
}  # fmt: skip


def dpo_loss(logps: Tensor, trees: list[Tree]) -> Tensor:
    """DPO against a made-up reference, from the log-probs of the scored tokens."""
    batch = pack(trees)
    sums = response_sums(logps, batch.owner, batch.n_responses)
    winner, loser = batch.units.pairs.unbind(1)
    n = batch.n_scored.to(sums.dtype)
    reference = sums.detach() + torch.linspace(-2, 2, len(sums), dtype=sums.dtype)
    return dpo(
        RefPairs(sums[winner], sums[loser], reference[winner], reference[loser], n[winner], n[loser]), beta=0.3
    ).loss.mean()


def compared(model: Any, trees: list[Tree], probe: list[Tree] | None = None) -> tuple[Policy, float, float]:
    """The path that was chosen, the largest difference of log-probs, and the relative one of gradients."""
    twin = tiny.oracle(model)
    with tiny.Float64():
        policy = Policy.choose(model, probe or trees)
        read_last = not policy._longest_together  # LongRoPE rotates by what is read, and a last token is not
        logps, expected = policy(policy.pack(trees)), tiny.textbook(twin, trees, read_last=read_last)
        dpo_loss(logps, trees).backward()
        dpo_loss(expected, trees).backward()
    off = float((logps - expected).detach().abs().max())
    return policy, off, tiny.relative(tiny.gradients(model), tiny.gradients(twin))


def test_the_table_is_complete() -> None:
    assert PATHS.keys() == tiny.ARCHITECTURES.keys()


@pytest.mark.parametrize("name", PATHS)
def test_architecture(name: str) -> None:
    trees = [*tiny.forest(1, n=3, longest=12), *tiny.forest(2, n=2, k=3, longest=12, scored=0.6)]
    policy, off, gradient = compared(tiny.model(name), trees)
    assert (policy.path.layout, policy.path.head, policy.path.alone) == (PATHS[name], "own", False), policy.path.why
    assert off < 1e-9
    assert gradient < 1e-7


def test_the_comparison_notices_float32() -> None:
    """Without the float64 patch the same comparison is six digits worse: it measures what it says."""
    model = tiny.model("llama")
    trees = tiny.forest(1)
    policy = Policy.choose(model, trees)
    twin = tiny.oracle(model)
    dpo_loss(policy(policy.pack(trees)), trees).backward()
    with tiny.Float64():
        dpo_loss(tiny.textbook(twin, trees), trees).backward()
    assert 1e-9 < tiny.relative(tiny.gradients(model), tiny.gradients(twin)) < 1e-4


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_the_window_matters(name: str) -> None:
    """Those windows are shorter than the sequences: a forest without them would be wrong."""
    trees = tiny.forest(1, longest=12)
    with tiny.Float64():
        windowed = tiny.textbook(tiny.oracle(tiny.model(name)), trees)
        open_ = tiny.textbook(tiny.oracle(tiny.model(name, sliding_window=1000)), trees)
    assert float((windowed - open_).detach().abs().max()) > 0.1


@pytest.mark.parametrize("scored_alone", [False, True])
def test_longrope_beyond_its_first_context(scored_alone: bool) -> None:
    """Sequences on both sides of the 16 tokens where the model changes all its rotations, in one batch."""
    rng = np.random.default_rng(0)
    shapes = [(5, [6, 4]), (9, [12, 3]), (14, [12, 9])] if scored_alone else [(5, [6, 4]), (8, [7, 3])]
    trees = [tiny.random_tree(rng, prompt=p, lengths=n) for p, n in shapes]
    policy, off, gradient = compared(tiny.model("phi3-longrope"), trees, probe=trees[:1])
    assert policy.path.layout == "forest" and policy._rotations_differ(policy.pack(trees)) == scored_alone
    assert off < 1e-9 and gradient < 1e-7
    if scored_alone:  # and together it would be wrong
        with tiny.Float64():
            together = policy._logps(policy.pack(trees))
            expected = tiny.textbook(tiny.oracle(policy.model), trees, read_last=False)
        assert float((together - expected).detach().abs().max()) > 0.1


def test_longrope_on_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    trees = [tiny.random_tree(rng, prompt=p, lengths=n) for p, n in [(5, [6, 4]), (9, [12, 3])]]
    _leak(monkeypatch)
    policy, off, gradient = compared(tiny.model("phi3-longrope"), trees, probe=tiny.forest(1, longest=6))
    assert policy.path.layout == "rows"
    assert off < 1e-9 and gradient < 1e-7


def _leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forest attention that shows each branch the one before it."""
    from transformers import AttentionInterface

    from preftune.engine import attention, policy

    def leaking(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        n = query.shape[2]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        groups = query.shape[1] > key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=causal, enable_gqa=groups)
        return out.transpose(1, 2), None

    monkeypatch.setattr(policy, "register", lambda: AttentionInterface.register(attention.FOREST, leaking))
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.FOREST, leaking)


@pytest.mark.parametrize("trees", [tiny.forest(1), tiny.forest(1, n=1), tiny.forest(1, n=1, k=1), tiny.forest(1, n=3, k=1)])
def test_attention_that_leaks_is_noticed_whatever_the_data(trees: list[Tree], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the data has one tree, or one response each, so that a batch of it alone would show nothing."""
    _leak(monkeypatch)
    with tiny.Float64():
        policy = Policy.choose(tiny.model("llama"), trees)
        expected = tiny.textbook(tiny.oracle(policy.model), trees)
        off = float((policy(policy.pack(trees)) - expected).detach().abs().max())
    assert policy.path.layout == "rows" and off < 1e-9
    assert "forest with our head: log-probs differ by" in policy.path.why
