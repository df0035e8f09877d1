from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.autograd import Function

from preftune.engine import backends, policy
from preftune.engine.attention import FOREST, Unmodelled, dense_attention, forest_attention
from preftune.engine.backends import BACKENDS, ROUNDED, Backend, Measured, available, fastest
from preftune.engine.policy import Policy

TREES = tiny.forest(5, n=4, scored=0.7)


def refuses(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise Unmodelled("no such heads\nand more")


def blind(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
    """Every token sees the whole row so far: what a wrong mask gives."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=given["scaling"])
    return out.transpose(1, 2), None


class Twice(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def wrong_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return Twice.apply(forest_attention(*args, **kwargs)[0]), None


GOOD = Backend("test_good", "the dense mask", dense_attention)
BAD = [
    Backend("test_refuses", "a refusing kernel", refuses),
    Backend("test_blind", "a blind kernel", blind),
    Backend("test_backward", "a kernel with a wrong gradient", wrong_backward),
]


@pytest.fixture
def _there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", (*BAD, GOOD))
    monkeypatch.setattr(policy, "available", lambda device: list(backends.BACKENDS))


@pytest.mark.usefixtures("_there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_first_exact_backend_is_taken_in_the_precision_of_the_run(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    model = tiny.model("llama", dtype=dtype)
    chosen = Policy.choose(model, TREES, autocast=autocast)
    assert chosen.path.attention == "test_good", chosen.path.why
    assert model.config._attn_implementation == "test_good"
    said = chosen.path.why
    assert "attention: the dense mask, which differs" in said and "not a refusing kernel: no such heads" in said
    assert "and more" not in said
    assert "not a blind kernel: it differs" in said and "not a kernel with a wrong gradient: it differs" in said
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.name)
def test_where_none_is_exact_it_is_one_call_per_branch(bad: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", (bad,))
    monkeypatch.setattr(policy, "available", lambda device: [bad])
    chosen = Policy.choose(tiny.model("qwen2"), TREES)
    assert chosen.path.attention == FOREST and "attention: one call per branch; not a" in chosen.path.why
    assert chosen.path.layout == "forest"


def test_a_cpu_tries_nothing_and_says_nothing() -> None:
    assert available(torch.device("cpu")) == []
    chosen = Policy.choose(tiny.model("llama"), TREES)
    assert chosen.path.attention == FOREST and "attention:" not in chosen.path.why


def test_a_gpu_tries_what_is_installed_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [b.name for b in BACKENDS]
    assert names == ["preftune_varlen", "preftune_flash", "preftune_flex"]
    found = [b.name for b in available(torch.device("cuda"))]
    assert found == [n for n in names if n in found] and "preftune_flex" in found
    monkeypatch.setattr(backends, "BACKENDS", tuple(b._replace(installed=lambda: False) for b in BACKENDS[:2]))
    assert available(torch.device("cuda")) == []


def test_twice_the_rounding_is_granted_and_no_more() -> None:
    known = Measured(torch.zeros(4), torch.ones(4))

    def run(off: float, gradient: float) -> str:
        found = {FOREST: known, ROUNDED: Measured(known.logps + 0.01, known.gradient * 1.02),
                 GOOD.name: Measured(known.logps + off, known.gradient * (1 + gradient))}  # fmt: skip
        return fastest([GOOD], found.__getitem__)[0]

    assert run(0.019, 0.039) == GOOD.name
    assert run(0.021, 0.0) == run(0.0, 0.041) == run(float("nan"), 0.0) == run(0.0, float("inf")) == FOREST


@pytest.mark.usefixtures("_there")
def test_a_reward_model_chooses_in_the_same_way() -> None:
    from preftune.engine.reward import RewardModel
    from preftune.model.reward import with_scalar_head

    chosen = RewardModel.choose(
        with_scalar_head(tiny.model("llama", dtype=torch.float32), seed=0), TREES, autocast=torch.bfloat16
    )
    assert isinstance(chosen, RewardModel) and chosen.path.attention == "test_good", chosen.path.why


def test_what_cannot_be_compared_is_not_taken() -> None:
    def measure(name: str) -> Measured:
        if name == ROUNDED:
            raise RuntimeError("out of memory\nso much was asked for")
        return Measured(torch.zeros(4), torch.ones(4))

    name, why = fastest([GOOD], measure)
    assert name == FOREST and why.endswith("could not be compared with it: out of memory")


@pytest.mark.usefixtures("_there")
def test_the_choice_is_the_same_every_time() -> None:
    said = {Policy.choose(tiny.model("llama"), TREES, autocast=torch.bfloat16).path.why for _ in range(2)}
    assert len(said) == 1
