from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as theirs

from preftune.engine.attention import Forest, dense_attention
from preftune.engine.batch import pack
from preftune.engine.flex import flex_forest

MODULE: Any = nn.Identity()


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch declines gradients on a CPU for want of a compiled kernel; its own eager code for them is what is asked here."""
    monkeypatch.setattr(theirs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("seed", "groups", "n", "k"), [(0, 1, 3, 2), (1, 2, 1, 1), (2, 4, 40, 5)])
def test_flex_equals_dense(seed: int, groups: int, n: int, k: int, window: int | None, softcap: float | None) -> None:
    batch = pack(tiny.forest(seed, n=n, k=k))
    generator = torch.Generator().manual_seed(seed)
    qkv = [
        torch.randn(1, h, batch.tokens.shape[1], 8, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (4, 4 // groups, 4 // groups)
    ]
    given: dict[str, Any] = {"scaling": 0.9, "sliding_window": window, "softcap": softcap, "forest": Forest(batch)}
    expected, _ = dense_attention(MODULE, *qkv, None, **given)
    got, _ = flex_forest(MODULE, *qkv, None, **given)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # torch's eager code takes its softmax in float32
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), qkv)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), qkv), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_blocks_are_mapped_once_for_all_layers_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    make = theirs.create_block_mask
    monkeypatch.setattr(theirs, "create_block_mask", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    batch = pack(tiny.forest(1))
    forest = Forest(batch)
    x: Tensor = torch.zeros(1, 2, batch.tokens.shape[1], 8)
    for window in (None, 2, None, 2):
        flex_forest(MODULE, x, x, x, None, sliding_window=window, forest=forest)
    assert len(made) == 2
