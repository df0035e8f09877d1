from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from preftune.config import Lora
from preftune.data.types import Branch, Pair, Tree
from preftune.engine.batch import Batch, pack
from preftune.engine.policy import Path, Policy
from preftune.engine.score import score
from preftune.errors import PreftuneError
from preftune.losses.objective import Objective, objective
from preftune.losses.records import RefPairs, Tokens
from preftune.model.lora import add_lora
from preftune.training.dist import Ranks
from preftune.training.material import material
from preftune.training.metrics import Sums
from preftune.training.step import Micro, backward, evaluate

# one long pair among short ones, a prompt with two pairs, scored spans of different size: means of means would all differ
_THREE = tiny.forest(9, n=1, k=3)[0]
TREES = [
    *tiny.forest(7, n=5, longest=5),
    *tiny.forest(8, n=2, longest=14, scored=0.6),
    Tree("two", _THREE.prompt, _THREE.branches, (Pair(0, 1), Pair(2, 1))),
]
N_PAIRS = sum(len(t.pairs) for t in TREES)
BETA = 0.3
DPO, SFT = [objective("dpo", {})], [objective("sft", {})]


@cache
def lora_model() -> Any:
    base = tiny.model("llama")
    base._preftune_inference_attention = "sdpa"
    peft = add_lora(base, Lora(r=3), base="base", seed=0).double()
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype))
    return peft


@cache
def policy_of(kind: str) -> tuple[Policy, list[list[Tensor]]]:
    """A policy, and per tree the reference log-probs of its responses."""
    with tiny.Float64():
        if kind == "lora":
            policy = Policy(lora_model(), Path("forest", "own"))
            with policy.adapter_off():
                scored = [score(policy, [t])[0] for t in TREES]
        else:
            layout = "rows" if kind == "rows" else "forest"
            policy = Policy(tiny.model("llama"), Path(layout, "own"))  # type: ignore[arg-type]
            scored = [score(Policy(tiny.model("llama", seed=1), Path("forest", "own")), [t])[0] for t in TREES]
    return policy, [[torch.from_numpy(x) for x in tree] for tree in scored]


def micro(kind: str, members: Sequence[int], weight: float = 1.0) -> Micro:
    policy, reference = policy_of(kind)
    parts = [x for i in members for x in reference[i]]
    return Micro(policy.pack([TREES[i] for i in members]), torch.cat(parts), weight)


def padded(policy: Policy, trees: Sequence[Tree]) -> Tensor:
    """[R] log π(y|x): one padded batch of prompt + response, labels shifted by one, -100 where nothing is scored."""
    rows = [(t.prompt, b) for t in trees for b in t.branches]
    width = max(len(p) + len(b.ids) for p, b in rows)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (0, -100, 0))
    for i, (p, b) in enumerate(rows):
        n = len(p) + len(b.ids)
        ids[i, :n] = torch.from_numpy(np.concatenate([p, b.ids]))
        labels[i, len(p) : n] = torch.from_numpy(np.where(b.scored, b.ids, -100))
        mask[i, :n] = 1
    logits = policy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    labels = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * (labels != -100)).sum(1)


@cache
def textbook(kind: str, smoothing: float) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """DPO as in the books, one padded batch: loss, gradients, metrics."""
    policy, reference = policy_of(kind)
    own = Policy(policy.model, Path("rows", "model"))
    with tiny.Float64():
        sums = padded(own, TREES)
        ref = torch.stack([x.sum() for tree in reference for x in tree])
        first = np.cumsum([0, *(len(t.branches) for t in TREES)])
        w, lo = (torch.tensor([f + p[i] for t, f in zip(TREES, first, strict=False) for p in t.pairs]) for i in (0, 1))
        h = BETA * ((sums[w] - ref[w]) - (sums[lo] - ref[lo]))
        values = -(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h)
        values.mean().backward()
    n = torch.tensor([float(b.scored.sum()) for t in TREES for b in t.branches], dtype=torch.float64)
    metrics = {
        "loss": values.mean(), "rewards/chosen": BETA * (sums[w] - ref[w]).mean(),
        "rewards/rejected": BETA * (sums[lo] - ref[lo]).mean(), "rewards/margins": h.mean(),
        "rewards/accuracies": (h > 0).double().mean(), "logps/chosen": sums[w].mean(), "logps/rejected": sums[lo].mean(),
        "lengths/chosen": n[w].mean(), "lengths/rejected": n[lo].mean(),
        "log_ratios/chosen": (sums[w] - ref[w]).mean(), "log_ratios/rejected": (sums[lo] - ref[lo]).mean(),
    }  # fmt: skip
    found = tiny.gradients(policy)
    Policy(policy.model, policy.path)  # back to the attention of its path
    return float(values.mean().detach()), found, {name: float(v.detach()) for name, v in metrics.items()}


def means(sums: Sums) -> dict[str, float]:
    return {name: float(v[0] / v[1]) for name, v in sums.items()}


def cuts(order: list[int], ends: list[int]) -> list[list[int]]:
    edges = [0, *sorted(set(ends)), len(order)]
    return [order[a:b] for a, b in zip(edges, edges[1:], strict=False) if b > a]


@pytest.mark.parametrize("kind", ["full", "rows", "lora"])
@settings(max_examples=12)
@given(
    order=st.permutations(range(len(TREES))), ends=st.lists(st.integers(1, len(TREES) - 1), max_size=7),
    smoothing=st.sampled_from([0.0, 0.2]), empty=st.booleans(),
)  # fmt: skip
def test_any_cut_is_textbook_dpo(kind: str, order: list[int], ends: list[int], smoothing: float, empty: bool) -> None:
    loss, wanted, metrics = textbook(kind, smoothing)
    policy, _ = policy_of(kind)
    goal = [objective("dpo", {"beta": BETA, "label_smoothing": smoothing})]
    with tiny.Float64():
        micros = [micro(kind, members) for members in cuts(order, ends)]
        micros += [micro(kind, [0], weight=0.0)] * empty  # a rank that has nothing to do
        got = means(backward(policy, micros, goal, n_units=[N_PAIRS]))
    kl = got.pop("kl")
    assert got["loss"] == pytest.approx(loss, abs=1e-12)
    assert tiny.relative(tiny.gradients(policy), wanted) < 1e-9
    assert got == pytest.approx(metrics, abs=1e-11)
    assert kl > 0


def test_a_mean_of_means_would_be_noticed() -> None:
    """The same comparison, with the denominator that is wrong: each micro-batch divided by its own count."""
    _, wanted, _ = textbook("full", 0.0)
    policy, _ = policy_of("full")
    goal = [objective("dpo", {"beta": BETA})]
    parts = [[0], [1, 2, 3, 4, 5, 6, 7]]
    with tiny.Float64():
        for members in parts:
            n = sum(len(TREES[i].pairs) for i in members)
            backward(policy, [micro("full", members)], goal, n_units=[n * len(parts)])
    assert tiny.relative(tiny.gradients(policy), wanted) > 1e-2


def test_ranks_average_to_the_same_gradient() -> None:
    """DistributedDataParallel divides by the world's size: two ranks' gradients, averaged, are the step's."""
    _, wanted, _ = textbook("full", 0.0)
    policy, _ = policy_of("full")
    goal = [objective("dpo", {"beta": BETA})]
    found = []

    class Rank(nn.Module):
        """What DistributedDataParallel adds: no_sync."""

        def __init__(self) -> None:
            super().__init__()
            self.synced = 0

        def no_sync(self) -> Any:
            from contextlib import nullcontext

            self.synced -= 1
            return nullcontext()

        def forward(self, batch: Batch) -> Tensor:
            self.synced += 1
            result: Tensor = policy(batch)
            return result

    with tiny.Float64():
        for parts in ([[0, 1], [2]], [[3, 4, 5], [6, 7]]):
            rank = Rank()
            backward(rank, [micro("full", members) for members in parts], goal, n_units=[N_PAIRS], ranks=Ranks(0, 2))
            assert rank.synced == 1, "gradients are exchanged once, with the last micro-batch"
            found.append(tiny.gradients(policy))
    assert tiny.relative({n: (found[0][n] + found[1][n]) / 2 for n in wanted}, wanted) < 1e-9


def test_evaluation_measures_the_same_without_gradients() -> None:
    policy, _ = policy_of("full")
    goal = [objective("dpo", {"beta": BETA})]
    policy.train()
    with tiny.Float64():
        got = means(evaluate(policy, [micro("full", [0, 1, 2]), micro("full", [3, 4, 5, 6, 7])], goal))
    got.pop("kl")
    assert got == pytest.approx(textbook("full", 0.0)[2], abs=1e-11)
    assert policy.training and all(p.grad is None for p in policy.parameters())
    policy.eval()


def test_kl_is_the_balanced_estimate_of_a_response() -> None:
    policy, reference = policy_of("full")
    goal = [objective("dpo", {"beta": BETA})]
    with tiny.Float64():
        got = means(evaluate(policy, [micro("full", range(len(TREES)))], goal))["kl"]
        logps = tiny.textbook(tiny.oracle(policy.model), TREES).detach()
    flat = torch.cat([x for tree in reference for x in tree])
    ratio = (logps - flat).exp()
    expected = 2 * (ratio * ratio.log() - ratio + 1) / (1 + ratio)
    assert got == pytest.approx(float(expected.sum()) / sum(len(t.branches) for t in TREES), abs=1e-10)


def test_kl_is_exact_over_the_even_mixture() -> None:
    """Weighted by how often the mixture of both models writes each token, the estimate is KL(policy‖reference)."""
    torch.manual_seed(0)
    policy, reference = (torch.randn(50, dtype=torch.float64).mul(3).log_softmax(0) for _ in range(2))
    log_ratio = policy - reference
    token = 2 * (torch.sigmoid(log_ratio) * (log_ratio - 2) + 1)
    mixture = (policy.exp() + reference.exp()) / 2
    assert float((mixture * token).sum()) == pytest.approx(float((policy.exp() * log_ratio).sum()), abs=1e-12)


def test_an_untrained_policy_scores_one_half() -> None:
    """Every margin is a tie up to rounding, and a tie counts one half: also where float32 puts it on one side."""
    model = tiny.model("llama", dtype=torch.float32)
    policy = Policy(model, Path("forest", "own"))
    reference = [[torch.from_numpy(x) for x in score(policy, [t])[0]] for t in TREES]  # alone: rounded otherwise
    batch = policy.pack(TREES)
    ref = torch.cat([x for tree in reference for x in tree])
    sums = evaluate(policy, [Micro(batch, ref)], [objective("dpo", {"beta": BETA})])
    assert means(sums)["rewards/accuracies"] == 0.5
    assert means(sums)["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert means(sums)["kl"] == pytest.approx(0, abs=1e-8)


# --- SFT ---------------------------------------------------------------------------------------------------------------


@given(order=st.permutations(range(len(TREES))), ends=st.lists(st.integers(1, len(TREES) - 1), max_size=7))
@settings(max_examples=10)
def test_sft_is_cross_entropy_over_the_scored_tokens(order: list[int], ends: list[int]) -> None:
    policy, _ = policy_of("full")
    made = material(TREES, SFT)
    with tiny.Float64():
        (-padded(Policy(policy.model, Path("rows", "model")), made.trees).sum() / int(made.n_units.sum())).backward()
        wanted = tiny.gradients(policy)
        policy = Policy(policy.model, Path("forest", "own"))
        micros = [Micro(pack([made.trees[i] for i in members]), None) for members in cuts(order, ends)]
        got = means(backward(policy, micros, SFT, n_units=made.n_units.sum(0).tolist()))
    assert tiny.relative(tiny.gradients(policy), wanted) < 1e-9
    assert got.keys() == {"loss"}


# --- material ----------------------------------------------------------------------------------------------------------


def tree(*pairs: Pair, k: int = 3, labels: tuple[bool | None, ...] = (), scored: tuple[bool, ...] = ()) -> Tree:
    branches = tuple(Branch(np.array([k_], np.int32), np.array([scored[k_] if scored else True])) for k_ in range(k))
    return Tree("id", np.array([1], np.int32), branches, pairs, labels)


def first_ids(trees: list[Tree]) -> list[list[int]]:
    return [[int(b.ids[0]) for b in t.branches] for t in trees]


def test_branches_that_no_pair_uses_are_not_read() -> None:
    made = material([tree(Pair(3, 1, 0.9, 2.0), k=5)], DPO)
    assert first_ids(made.trees) == [[1, 3]]
    assert made.trees[0].pairs == (Pair(1, 0, 0.9, 2.0),)
    assert made.n_units.tolist() == [[1]]


def test_ties_are_dropped_with_their_reason() -> None:
    made = material([tree(Pair(0, 1, 0.5)), tree(), tree(Pair(0, 1), Pair(1, 2, 0.5))], DPO)
    assert [reason.split(":")[0].split(" (")[0] for _, reason in made.dropped] == ["a tie", "it has no preference"]
    assert first_ids(made.trees) == [[0, 1]], "the branch of the tie is not read"


def test_a_tie_is_no_preference_where_its_responses_have_others() -> None:
    made = material([tree(Pair(0, 1), Pair(1, 2), Pair(0, 2, 0.5))], DPO)
    assert made.trees[0].pairs == (Pair(0, 1), Pair(1, 2)) and made.n_units.tolist() == [[2]]


def test_each_objective_of_a_sum_has_its_own_units_and_its_own_reason() -> None:
    made = material([tree(Pair(0, 1), k=2), tree(k=1)], [*DPO, *SFT])
    assert made.n_units.tolist() == [[1, 1], [0, 1]] and first_ids(made.trees) == [[0, 1], [0]]
    with pytest.raises(
        PreftuneError, match="loss.name=dpo: none of the 1 examples can be used; the first: it has no preference"
    ):
        material([tree(k=1)], [*SFT, *DPO])


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (tree(Pair(0, 1), k=2), [0]),
        (tree(Pair(0, 1), Pair(1, 2)), [0]),
        (tree(Pair(2, 0)), [1, 2]),
        (tree(labels=(True, False, None)), [0, 2]),
        (tree(k=1), [0]),
        (tree(Pair(0, 1), k=3, scored=(True, True, False)), [0]),
    ],
)
def test_sft_never_trains_on_a_loser(given_: Tree, expected: list[int]) -> None:
    made = material([given_], SFT)
    assert first_ids(made.trees) == [expected]
    assert made.n_units.tolist() == [[len(expected)]]
    assert bool(made.notes) == bool(given_.pairs)


@pytest.mark.parametrize(("goal", "given_"), [(DPO, tree(k=1)), (SFT, tree(labels=(False,), k=1)), (SFT, None)])
def test_nothing_left_is_said(goal: Any, given_: Tree | None) -> None:
    with pytest.raises(
        PreftuneError, match=r"loss.name=\w+: none of the [01] examples can be used; (the first: \w|there are none)"
    ):
        material([given_] if given_ else [], goal)


def test_the_record_is_read_from_the_annotation() -> None:
    dpo, sft = objective("dpo", {"beta": 0.2}), objective("sft", {})
    assert (dpo.record, dpo.units, dpo.given, dpo.needs_reference) == (RefPairs, {RefPairs}, set(), True)
    assert (sft.record, sft.needs_reference) == (Tokens, False)
    assert isinstance(dpo, Objective) and dict(dpo.parameters) == {"beta": 0.2, "label_smoothing": 0.0}
