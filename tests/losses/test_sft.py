from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.losses.records import Tokens
from preftune.losses.sft import sft


@given(st.lists(st.floats(-1e4, 0), min_size=1, max_size=9))
def test_sft_is_the_negative_log_likelihood(logps: list[float]) -> None:
    logp = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    values = sft(Tokens(logp))
    assert values.tolist() == [-x for x in logps]
    values.sum().backward()
    assert logp.grad is not None and logp.grad.tolist() == [-1.0] * len(logps)
