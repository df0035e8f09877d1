"""Between the first launch of a step and the one transfer of its metrics, nothing asks the device for a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.config import Config
from preftune.engine.narrow import use_narrow
from preftune.engine.policy import Path, Policy
from preftune.losses.objective import objective
from preftune.training.dist import Ranks
from preftune.training.feed import Feed
from preftune.training.loop import to_host
from preftune.training.optim import WeightWatch, clip, make_optimizer
from preftune.training.step import Micro, backward

ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
FROM_HOST = {"new_tensor", "tensor", "as_tensor", "tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__"}


class Dispatched(TorchDispatchMode):
    """Names of operations that read a value on the host: also where an index is a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if name in ("index", "index_put_") else []
        if name in ASKS or masks:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Names of functions that wait for the device though they may dispatch nothing on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in FROM_HOST:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


def asked(work: Callable[[], Any]) -> list[str]:
    with Called() as called, Dispatched() as dispatched:
        work()
    return called.found + dispatched.found


def test_the_watch_sees_what_waits() -> None:
    x = torch.ones(3)
    for work, name in [(lambda: x[x > 0], "index"), (lambda: x.sum().item(), "item"), (lambda: bool(x.all()), "__bool__"),
                       (lambda: x.new_tensor(3), "new_tensor"), (x.tolist, "tolist"), (x.nonzero, "nonzero")]:  # fmt: skip
        assert name in asked(work)


@pytest.mark.parametrize("attention", ["preftune_forest", "preftune_dense"])
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "qwen2"]
)  # LongRoPE: transformers up to 5.17 asks for the longest position
def test_a_step_waits_for_the_device_once(name: str, attention: str) -> None:
    model = tiny.model(name, dtype=torch.float32)
    policy = Policy(model, Path("forest", "own", attention=attention))
    use_narrow(model, False)  # which looks for the rows that are read, and is for CPUs alone
    goal = [objective("dpo", {"beta": 0.1})]
    optimizer, watch = make_optimizer(policy, Config.of({}).resolved().optim), WeightWatch(policy)
    batches = [policy.pack(tiny.forest(seed, n=2)) for seed in range(3)]
    micros = [Micro(batch, policy(batch).detach()) for batch in batches]
    kept: list[Any] = []

    def step() -> None:
        sums = backward(policy, micros, goal, n_units=[6])
        kept.extend([sums, clip(policy, 1.0), *watch.moved()])
        optimizer.step()

    assert asked(step) == []
    assert asked(lambda: to_host(goal, kept[0], Ranks(), *kept[1:])) == ["tolist"]


def test_the_next_step_is_packed_while_this_one_is_computed() -> None:
    made: list[tuple[int, int]] = []

    def make(index: int) -> Iterator[Micro]:
        for k in range(3):
            made.append((index, k))
            yield Micro(None, None, float(10 * index + k))  # type: ignore[arg-type]

    feed = Feed(make)
    assert [m.weight for m in feed.step(0)] == [0, 1, 2]
    feed.prepare(1)
    assert made[-1] == (1, 0), "the first of the next step, and no more"
    assert [m.weight for m in feed.step(1)] == [10, 11, 12]
    feed.prepare(2)
    assert [m.weight for m in feed.step(4)] == [40, 41, 42], "another step than the prepared one"
    assert made.count((1, 0)) == 1


def test_a_step_packs_one_micro_batch_ahead() -> None:
    order: list[str] = []
    policy = Policy(tiny.model("llama"), Path("forest", "own"))
    batch = policy.pack(tiny.forest(1, n=2))

    def micros() -> Iterator[Micro]:
        for k in range(3):
            order.append(f"pack {k}")
            yield Micro(batch, torch.zeros(len(batch.target)))

    policy.register_forward_pre_hook(lambda module, args: order.append("compute"))
    backward(policy, micros(), [objective("dpo", {})], n_units=[6])
    assert order == ["pack 0", "pack 1", "compute", "pack 2", "compute", "compute"]


def test_the_longest_sequence_is_known_without_asking() -> None:
    policy = Policy(tiny.model("phi3-longrope"), Path("forest", "own"))
    limit = policy._longest_together
    assert limit is not None
    rng = np.random.default_rng(0)
    for read, differs in ((limit, False), (limit + 1, True)):  # the last token of a branch is not read
        batch = policy.pack([tiny.random_tree(rng, prompt=3, lengths=[2, read - 3 + 1])])
        assert int(batch.position.max()) + 1 == read
        assert policy._rotations_differ(batch) == differs
    assert isinstance(batch.tokens, Tensor)
