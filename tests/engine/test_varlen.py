from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from preftune.engine import varlen
from preftune.engine.attention import Forest, Unmodelled, compute_dtype, dense_attention
from preftune.engine.batch import Batch, TreeSpan, pack
from preftune.engine.varlen import Calls, Gather, attention, calls_of, flash_kernel, torch_kernel

MODULE: Any = nn.Identity()


def double(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`varlen_attn` by its documentation, in loops: (-1, 0) is causal, (W, 0) causal with a window, both by the last key."""
    assert enable_gqa == (query.shape[1] != key.shape[1]) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []
    for (a, b), (c, d) in zip(
        *(list(zip(x.tolist(), x.tolist()[1:], strict=False)) for x in (cu_seq_q, cu_seq_k)), strict=True
    ):
        assert 0 < b - a <= max_q and d - c <= max_k
        scores = torch.einsum("ihd,jhd->hij", query[a:b], key[c:d]) * (query.shape[-1] ** -0.5 if scale is None else scale)
        far = torch.arange(d - c)[None] - torch.arange(b - a)[:, None] - ((d - c) - (b - a))  # 0: a query's own token
        hidden = (far > window_size[1]) | ((far < -window_size[0]) & (window_size[0] >= 0))
        parts.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value[c:d]))
    assert b == len(query) and d == len(key)
    return torch.cat(parts)


@pytest.fixture
def _doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_torch_function", lambda: (double, True))
    monkeypatch.setattr(varlen, "_check_kernel", lambda query, value: None)


def inputs(batch: Batch, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (4 // groups, 8), (4 // groups, 8))
    return [
        torch.randn(1, h, batch.tokens.shape[1], d, generator=generator, dtype=torch.float64).requires_grad_()
        for h, d in shapes
    ]


@pytest.mark.usefixtures("_doubled")
@given(
    plain=tiny.forests(k=(0, 5), empty=True),
    groups=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 2, 4, 100]),
    scaling=st.sampled_from([None, 0.9]),
)
@settings(max_examples=60, suppress_health_check=[])
def test_variable_length_equals_dense(plain: tiny.Plain, groups: int, window: int | None, scaling: float | None) -> None:
    batch = pack(tiny.grow(plain))
    qkv = inputs(batch, groups)
    given_ = {"scaling": scaling, "sliding_window": window, "forest": Forest(batch)}
    expected, _ = dense_attention(MODULE, *qkv, None, **given_)  # type: ignore[arg-type]
    got, _ = attention(torch_kernel)(MODULE, *qkv, None, **given_)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), qkv)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), qkv), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_the_calls_of_a_small_forest() -> None:
    calls = calls_of([TreeSpan(2, (1, 0, 2)), TreeSpan(1, ())])
    assert calls.start_q.tolist() == [0, 3, 5, 6] and calls.start_k.tolist() == [0, 3, 7, 8]
    assert calls.start_q.dtype == calls.start_k.dtype == torch.int32
    assert (calls.longest_q, calls.longest_k) == (3, 4)
    assert calls.key.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]
    assert calls.own.tolist() == [0, 1, 2, 5, 6, 7]
    assert [(a.tolist(), b.tolist()) for a, b in calls.shared] == [([0, 1], [3, 4])]


@given(spans=st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=5)), min_size=1, max_size=5))
def test_gathered_gradients_add_up_without_a_race(spans: list[tuple[int, list[int]]]) -> None:
    calls = calls_of([TreeSpan(prompt, tuple(branches)) for prompt, branches in spans])
    n = sum(prompt + sum(branches) for prompt, branches in spans)
    x = torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True)
    gathered = Gather.apply(x, calls)
    assert torch.equal(gathered, x[calls.key])
    weight = torch.randn_like(gathered)
    ours, theirs = (torch.autograd.grad((g * weight).sum(), x)[0] for g in (gathered, x[calls.key]))
    torch.testing.assert_close(ours, theirs)
    for token, _ in calls.shared:
        assert len(token.unique()) == len(token)


def test_a_forest_of_single_branches_gathers_nothing() -> None:
    calls = calls_of([TreeSpan(3, (2,)), TreeSpan(1, (0,))])
    assert not calls.shared and calls.key.tolist() == calls.own.tolist() == list(range(6))


@pytest.mark.usefixtures("_doubled")
def test_indices_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Calls] = []
    monkeypatch.setattr(varlen, "calls_of", lambda spans: made.append(calls_of(spans)) or made[-1])
    batch = pack(tiny.forest(1))
    forest = Forest(batch)
    for window in (None, 2, None):
        attention(torch_kernel)(MODULE, *inputs(batch, 2), None, forest=forest, sliding_window=window)
    assert len(made) == 1


def test_the_installed_torch_takes_what_is_passed() -> None:
    from torch.nn.attention.varlen import varlen_attn

    taken = inspect.signature(varlen_attn).parameters
    assert list(taken)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert taken["scale"].default is None and taken["window_size"].default == (-1, -1)
    assert varlen.torch_has_it()


@pytest.mark.parametrize(("names", "serves", "told"), [
    (["is_causal", "return_aux"], False, False),  # torch 2.10
    (["return_aux", "scale", "window_size"], True, False),  # 2.11's first form
    (["return_aux", "scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"], True, True),
])  # fmt: skip
def test_every_form_of_the_interface_is_told_apart(
    names: list[str], serves: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.nn.attention.varlen as theirs

    passed: dict[str, Any] = {}

    def stand_in(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        passed.update(kwargs)
        return query

    only = inspect.Parameter.KEYWORD_ONLY
    stand_in.__signature__ = inspect.Signature([inspect.Parameter(n, only) for n in names])  # type: ignore[attr-defined]
    monkeypatch.setattr(theirs, "varlen_attn", stand_in)
    monkeypatch.setattr(varlen, "_check_kernel", lambda query, value: None)
    varlen._torch_function.cache_clear()
    assert varlen.torch_has_it() == serves
    if serves:
        x = torch.zeros(3, 4, 8)
        torch_kernel(x, x[:, :2], x[:, :2], calls_of([TreeSpan(3, ())]), 0.5, 2, None)
        assert passed == {"scale": 0.5, "window_size": (1, 0)} | ({"enable_gqa": True} if told else {})
    varlen._torch_function.cache_clear()


def test_flash_attn_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own names: causal by a flag, a soft-cap of 0 for none."""
    asked: list[dict[str, Any]] = []

    class Package:
        @staticmethod
        def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, *places: Any, **named: Any) -> Tensor:
            asked.append(named)
            return q

    monkeypatch.setattr(varlen, "import_module", lambda name: Package)
    x, calls = torch.zeros(3, 4, 8, dtype=torch.bfloat16), calls_of([TreeSpan(3, ())])
    flash_kernel(x, x, x, calls, 0.5, None, 30.0)
    flash_kernel(x, x, x, calls, 0.5, 4, None)
    same = {"softmax_scale": 0.5, "causal": True, "deterministic": False}
    assert asked == [same | {"window_size": (-1, -1), "softcap": 30.0}, same | {"window_size": (3, 0), "softcap": 0.0}]


@pytest.mark.parametrize(("dtype", "width", "value_width", "softcap", "what"), [
    (torch.float32, 64, 64, None, "half precision, not float32"),
    (torch.bfloat16, 512, 512, None, "heads of up to 256"),
    (torch.bfloat16, 60, 60, None, "multiples of 8"),
    (torch.bfloat16, 192, 128, None, "values as wide as keys; here 192 and 128"),
    (torch.bfloat16, 64, 64, 30.0, "does not cap"),
])  # fmt: skip
def test_what_the_kernel_does_not_take_is_refused(
    dtype: torch.dtype, width: int, value_width: int, softcap: float | None, what: str
) -> None:
    batch = pack(tiny.forest(1))
    query, value = (torch.zeros(1, 2, batch.tokens.shape[1], d, dtype=dtype) for d in (width, value_width))
    with pytest.raises(Unmodelled, match=what):
        attention(torch_kernel)(MODULE, query, query, value, None, forest=Forest(batch), softcap=softcap)


def test_products_run_in_the_precision_of_autocast() -> None:
    half, single = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    assert compute_dtype(single, half) == torch.bfloat16
    assert compute_dtype(single, single) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(single, single) == torch.bfloat16


def test_a_long_row_is_laid_out_in_an_instant() -> None:
    import time

    spans = [TreeSpan(300, (20, 20))] * 400
    start = time.process_time()
    calls = calls_of(spans)
    assert time.process_time() - start < 0.5 and len(calls.key) == 400 * (320 + 320)
    assert np.array_equal(np.sort(calls.own.numpy()), calls.own.numpy())
