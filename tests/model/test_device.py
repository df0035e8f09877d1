"""Where a model runs, and in which precision."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from preftune.config import Config
from preftune.errors import ConfigError
from preftune.model.device import PRECISIONS, pick_device, precision_of

CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_bf16_unless_it_is_asked_for() -> None:
    assert precision_of("auto", CPU) == precision_of("fp32", CPU) == (torch.float32, None)
    assert precision_of("bf16", CPU) == (torch.float32, torch.bfloat16)
    assert precision_of("pure_bf16", CPU) == (torch.bfloat16, None)
    assert str(precision_of("bf16", CPU)) == "float32/bfloat16"


def test_the_settings_know_the_same_precisions() -> None:
    assert get_args(Config.model_fields["precision"].annotation) == PRECISIONS


def test_a_precision_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="precision: 'bfloat16' does not exist; did you mean bf16"):
        precision_of("bfloat16", CPU)


@pytest.mark.parametrize("name", ["meta", "tpu", "cuda:99", ""])
def test_a_device_that_cannot_be_used(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used here"):
        pick_device(name)
