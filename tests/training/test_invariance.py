"""Every objective gives the same step however it is cut into micro-batches and ranks: values, metrics and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from steps_for_tests import ON, SUMS, Found, apart, as_rank, at_once, finite, scored_by_a_policy, setting, step
from worlds import finish, free_port, spawn

from preftune.config import Lora
from preftune.engine.policy import Path as ScoringPath
from preftune.engine.policy import Policy
from preftune.losses.records import Confidence, Margin
from preftune.model.lora import add_lora
from preftune.registry import MODIFIERS
from preftune.training.assemble import Whole
from preftune.training.dist import Ranks

CASES = [*scored_by_a_policy(), *SUMS]


def test_every_modifier_is_among_the_cases() -> None:
    assert set(ON) == set(MODIFIERS)


@pytest.mark.parametrize("case", CASES)
def test_the_same_for_micro_batches_of_one_two_and_all(case: str) -> None:
    at = setting(case, torch.float32)
    n, whole = len(at.data.trees), at_once(case)
    assert finite(whole)
    assert max(float(g.abs().max()) for g in whole.gradient.values()) > 0
    for cuts in ([[i] for i in range(n)], [list(range(n))[i : i + 2] for i in range(0, n, 2)]):
        assert apart(step(at, cuts, idle=len(cuts) > 5), whole) < 1e-6


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes found for every case."""
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    assert finish(*(spawn(as_rank, rank, port, CASES, str(folder)) for rank in (0, 1))) == [0, 0]
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_the_same_on_two_ranks(of_two_ranks: list[dict[str, Any]], case: str) -> None:
    for rank in of_two_ranks:
        assert apart(Found(*rank[case]), at_once(case)) < 1e-6


def test_a_mean_over_micro_batches_would_be_noticed() -> None:
    """The same comparison sees what an objective over the step would be if it were taken over each micro-batch by itself."""
    at = setting("aot", torch.float64)
    n = len(at.data.trees)
    with tiny.Float64():
        whole = step(at, [range(n)])
        parts = [step(at, [[i]]) for i in range(n)]
    summed = {name: sum(p.gradient[name] for p in parts) for name in whole.gradient}
    assert tiny.relative(summed, whole.gradient) > 1e-3


def watched(policy: Policy) -> list[torch.Tensor]:
    """The log-probs of every pass of a step, as they are made; those of an evaluation are left out."""
    read: list[torch.Tensor] = []
    policy.train()
    policy.register_forward_hook(lambda module, args, logps: read.append(logps.detach()) if module.training else None)
    return read


@pytest.mark.parametrize("case", ["aot", "bco"])
def test_dropout_is_the_same_in_both_passes_of_a_step(case: str) -> None:
    base = tiny.model("llama", dtype=torch.float32)
    base._preftune_inference_attention = "sdpa"
    policy = Policy(add_lora(base, Lora(r=3, dropout=0.5), base="base", seed=0), ScoringPath("forest", "own"))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.fill_(0.3)
    at, read = setting(case, torch.float32)._replace(policy=policy), watched(policy)
    step(at, [[0, 1], [2, 3], [4, 5, 6, 7, 8]])
    assert len(read) == 6
    assert all(torch.equal(a, b) for a, b in zip(read[:3], read[3:], strict=True))
    step(at, [[0, 1], [2, 3], [4, 5, 6, 7, 8]])
    assert not any(torch.equal(a, b) for a, b in zip(read[:3], read[6:9], strict=True)), "another step draws anew"


def test_one_micro_batch_by_itself_is_read_once() -> None:
    policy = Policy(tiny.model("llama", dtype=torch.float32), ScoringPath("forest", "own"))
    at, read = setting("aot", torch.float32)._replace(policy=policy), watched(policy)
    step(at, [range(len(at.data.trees))])
    assert len(read) == 1


def test_ranks_exchange_records_in_one_order_whatever_order_they_were_built_in() -> None:
    class Watched(Ranks):
        """Keeps what is gathered."""

        def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
            gathered.append(float(values[0]))
            return [values]

    gathered: list[float] = []
    parts = {Confidence: Confidence(torch.tensor([1.0])), Margin: Margin(torch.tensor([2.0]))}
    for order in ((Confidence, Margin), (Margin, Confidence)):
        Whole([{r: parts[r] for r in order}], Watched())
    assert gathered == [1.0, 2.0, 1.0, 2.0]
