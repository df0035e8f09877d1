"""The KL of sampled replies against all replies that there are, counted out on a tiny vocabulary."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch

from preftune.engine.policy import Path, Policy
from preftune.errors import ModelError
from preftune.evaluate.kl import KL, compare_all, divergence, summed, trees_of
from preftune.generate import Sampling, sample

VOCAB, STOP, LONGEST = 5, 4, 4
N_CASES, N_PROMPTS, N_REPLIES = 200, 16, 2


class Exact(NamedTuple):
    """Of each prompt: the KL of a whole reply, and its expected number of tokens."""

    kl: np.ndarray
    n_tokens: np.ndarray


def logps(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """[row, vocabulary] of the next token, by the model's own forward."""
    with torch.no_grad():
        return model(torch.tensor(rows)).logits[:, -1].double().log_softmax(-1)


def enumerate_replies(policy: Any, reference: Any, prompts: list[list[int]]) -> Exact:
    """Σ over all replies y of π(y) log π(y)/π_ref(y): a reply ends with STOP or after LONGEST tokens."""
    kl, n_tokens = np.zeros(len(prompts)), np.zeros(len(prompts))
    # [(prompt, reply so far, log π, log π_ref)]
    alive = [(i, [], 0.0, 0.0) for i in range(len(prompts))]
    for t in range(LONGEST):
        rows = [prompts[i] + said for i, said, _, _ in alive]
        ours, theirs, longer = logps(policy, rows), logps(reference, rows), []
        for (i, said, p, q), a, b in zip(alive, ours.tolist(), theirs.tolist(), strict=True):
            for token in range(VOCAB):
                if token == STOP or t + 1 == LONGEST:  # a whole reply
                    kl[i] += np.exp(p + a[token]) * (p + a[token] - q - b[token])
                    n_tokens[i] += np.exp(p + a[token]) * (t + 1)
                else:
                    longer.append((i, [*said, token], p + a[token], q + b[token]))
        alive = longer
    return Exact(kl, n_tokens)


class Cases(NamedTuple):
    """Estimates of many small experiments, and what they should be."""

    found: list[KL]
    exact: Exact


def models() -> tuple[Any, Any]:
    """A reference, and a policy that has moved from it."""
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "dtype": torch.float32}
    reference, policy = tiny.model("llama", **shape), tiny.model("llama", **shape)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.25 * p.std() * torch.randn(p.shape, generator=draw)
    return policy, reference


@pytest.fixture(scope="module")
def cases() -> Cases:
    """Each case: prompts drawn anew from all that there are, two replies to each."""
    policy, reference = models()
    everything = [list(p) for p in itertools.product(range(VOCAB - 1), repeat=3)]
    exact = enumerate_replies(policy, reference, everything)
    draw = np.random.default_rng(0)
    prompts = [np.array(everything[i], np.int32) for i in draw.integers(len(everything), size=N_CASES * N_PROMPTS)]
    replies = sample(policy, prompts, Sampling(n=N_REPLIES, max_tokens=LONGEST, seed=1), stop_ids=[STOP])
    trees = trees_of(prompts, replies)
    path = Path("rows", "own")  # which of them makes no difference (below), but thousands of trees are slow one by one
    tokens = compare_all(Policy(policy, path), Policy(reference, path), trees, budget=20_000)
    found = [summed(tokens[at : at + N_PROMPTS]) for at in range(0, len(tokens), N_PROMPTS)]
    return Cases(found, exact)


def test_the_interval_holds_the_exact_kl_in_93_of_100_cases(cases: Cases) -> None:
    kl, per_token = cases.exact.kl.mean(), cases.exact.kl.sum() / cases.exact.n_tokens.sum()
    assert np.mean([c.per_response.low <= kl <= c.per_response.high for c in cases.found]) >= 0.93
    assert np.mean([c.per_token.low <= per_token <= c.per_token.high for c in cases.found]) >= 0.93


def test_it_is_unbiased_also_where_replies_end_or_are_cut(cases: Cases) -> None:
    values = np.array([c.per_response.value for c in cases.found])
    assert values.mean() == pytest.approx(cases.exact.kl.mean(), abs=4 * values.std() / np.sqrt(len(values)))
    ended = [len(r.kl) < LONGEST for c in cases.found for replies in c.tokens for r in replies]
    assert 0.2 < np.mean(ended) < 0.98, "some end by themselves and some are cut, else this shows nothing"


def test_it_is_never_negative_and_varies_less_than_the_mean_of_log_ratios(cases: Cases) -> None:
    tokens = [reply for c in cases.found for replies in c.tokens for reply in replies]
    assert min(float(reply.kl.min()) for reply in tokens) >= 0
    assert min(min(*c.per_response[:3], *c.per_token[:3]) for c in cases.found) >= 0
    ours, naive = (np.array([float(x.sum()) for x in column]) for column in zip(*tokens, strict=True))
    assert naive.mean() == pytest.approx(ours.mean(), abs=4 * naive.std() / np.sqrt(len(naive)))
    assert ours.var() < 0.5 * naive.var()


def test_of_a_model_to_itself_it_is_exactly_nothing() -> None:
    policy, _ = models()
    prompts = [np.array([1, 2, 0], np.int32), np.array([3], np.int32)]
    trees = trees_of(prompts, sample(policy, prompts, Sampling(n=2, max_tokens=LONGEST), stop_ids=[STOP]))
    scorer = Policy(policy, Path("forest", "own"))
    found = divergence(scorer, scorer, trees)
    assert found.per_response[:3] == found.per_token[:3] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("path", [Path("rows", "own"), Path("rows", "model"), Path("rows", "model", alone=True)])
def test_every_path_and_every_batch_gives_the_same(path: Path) -> None:
    policy, reference = (m.double() for m in models())
    prompts = [np.array([i % 4, (i * i) % 4], np.int32) for i in range(9)]
    trees = trees_of(prompts, sample(policy, prompts, Sampling(n=2, max_tokens=LONGEST), stop_ids=[STOP]))
    with tiny.Float64():
        expected = compare_all(
            Policy(policy, Path("forest", "own")), Policy(reference, Path("forest", "own")), trees, budget=999
        )
        found = compare_all(Policy(policy, path), Policy(reference, Path("forest", "own")), trees, budget=20)
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert np.allclose(a.kl, b.kl, atol=1e-9) and np.allclose(a.log_ratio, b.log_ratio, atol=1e-9)


def test_models_of_different_vocabularies_are_refused() -> None:
    other = Policy(tiny.model("llama", dtype=torch.float32), Path("forest", "own"))
    policy = Policy(models()[0], Path("forest", "own"))
    prompts = [np.array([1, 2], np.int32)]
    trees = trees_of(prompts, sample(policy.model, prompts, Sampling(max_tokens=2), stop_ids=[STOP]))
    with pytest.raises(ModelError, match="among 5 tokens and the reference among 61"):
        divergence(policy, other, trees)
