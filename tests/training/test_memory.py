"""Memory said before a run: the books of a rehearsed step, the allocator's holes, the largest batch, and the measured peak."""

from __future__ import annotations

import importlib.util
import json
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from worlds import World, cli

from preftune.config import Config
from preftune.engine.policy import Path as Way
from preftune.errors import ConfigError
from preftune.losses.objective import goal_of
from preftune.model.device import Precision
from preftune.model.load import unloaded
from preftune.training import forecast, heap, memory
from preftune.training.forecast import parse_size, plan, typical_trees
from preftune.training.memory import Planner
from preftune.training.rehearse import Ledger, rehearse

CONFIG = Config.of({"model": "m", "batch.pairs_per_step": 4, "steps": 2}).resolved()


@pytest.fixture(autouse=True)
def _small_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GRAIN", 24)  # tokens of one of the examples here


def shape(layers: int = 1) -> Any:
    return LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip


@cache
def books(layers: int = 1, n: int = 2) -> Ledger:
    trees = typical_trees(16, n)
    steps = [[trees[: n // 2], trees[n // 2 :]]] * 2
    return rehearse(partial(unloaded, shape(layers), torch.float32), Way("forest", "own"), goal_of(CONFIG), steps, CONFIG.optim)


def planner(layers: int = 1, *, holes: bool = False) -> Planner:
    made = Planner(
        CONFIG, torch.device("cpu"), Precision(torch.float32, None), goal_of(CONFIG), typical_trees(16, 8), holes=holes
    )
    made.model_config = shape(layers)
    return made


def test_weights_gradients_and_moments_are_counted_to_the_byte() -> None:
    real = unloaded(shape(), torch.float32)
    n = sum(p.numel() for p in real.parameters())
    ledger = books()
    held = ledger.at_peak("evaluation")
    buffers = sum(b.numel() * b.element_size() for b in real.buffers())
    assert ledger.n_weights == ledger.n_trainable == n
    assert 0 <= held["weights"] - 4 * n <= buffers
    assert held["gradients"] == 4 * n
    assert held["optimizer"] == 8 * n


def test_what_is_given_back_was_held_and_is_whole() -> None:
    held: dict[int, int] = {}
    for storage, n in books().entries:
        assert held.get(storage, 0) == (0 if n > 0 else -n)
        held[storage] = max(n, 0)


def test_more_tokens_take_more() -> None:
    few, many = books(n=2).peaks()["step"], books(n=4).peaks()["step"]
    assert many > few


def test_a_deep_model_is_told_from_two_shallow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_DEPTHS", (1, 2))
    told = planner(3).outlook(48)
    monkeypatch.setattr(memory, "_DEPTHS", (3, 3))
    rehearsed = planner(3).outlook(48)
    assert told.n_weights == rehearsed.n_weights
    assert told.total == pytest.approx(rehearsed.total, rel=0.03)
    assert told.flops_per_token == pytest.approx(rehearsed.flops_per_token, rel=0.01)


@pytest.mark.skipif(heap.taken([(0, 64)]) is None, reason="another C library")
def test_the_allocator_takes_what_is_asked_and_gives_large_blocks_back() -> None:
    large = 64 << 20
    taken = heap.taken([(0, large), (1, large), (0, -large), (1, -large)])
    assert taken is not None
    assert taken[0] >= large and taken[1] >= 2 * large
    assert taken[3] < 1 << 20


@pytest.mark.skipif(heap.taken([(0, 64)]) is None, reason="another C library")
def test_holes_are_never_less_than_nothing() -> None:
    outlook = planner(holes=True).outlook(48)
    assert outlook.parts["allocator"] >= 0
    assert outlook.total >= planner().outlook(48).total


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    made = planner()
    budget = (made.outlook(24).total + made.outlook(96).total) // 2
    found = made.largest(budget)
    assert found % 24 == 0
    assert made.outlook(found).total <= budget < made.outlook(found + 24).total
    assert made.largest(1 << 40) == 96  # 4 examples are a whole step


def test_too_little_memory_says_what_is_least_and_what_would_lower_it() -> None:
    with pytest.raises(ConfigError, match=r"0 MiB is too little: the least .*_microbatch=24 .*lora\.r"):
        planner().largest(1 << 18)


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 << 30), ("900 MB", 900_000_000), ("123", 123), ("1.5gib", 3 << 29)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "8 apples", "-1GiB", "0"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_size(text)


def test_plan_as_json_accounts_for_the_peak(world: World, tmp_path: Path) -> None:
    left = cli("plan", *world.words(tmp_path / "run", batch__max_length=32), "--memory", "1TiB", "--json")
    assert left.code == 0, left.err
    found = json.loads(left.out)
    parts, phases = found["memory"]["parts"], found["memory"]["phases"]
    assert {"weights", "gradients", "optimizer", "head", "activations", "process"} <= set(parts)
    assert found["memory"]["total"] == max(phases.values())
    assert sum(parts.values()) == pytest.approx(phases["step"], abs=1 << 20)
    assert found["steps"] == 5 and found["examples"] > 30 and not found["typical"]
    assert found["largest_tokens_per_microbatch"] > 0
    assert not (tmp_path / "run").exists()


def test_dry_run_plans_these_settings_and_trains_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(forecast, "plan", lambda config: asked.append(config) or SimpleNamespace(as_text=lambda: "the plan"))
    left = cli("train", *world.words(tmp_path / "run", seed=3), "--dry-run")
    assert (left.code, left.out) == (0, "the plan\n")
    assert asked[0].seed == 3
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_of_70_billion_weights_is_planned_from_its_configuration_alone(tmp_path: Path) -> None:
    LlamaConfig(  # as wide as Llama 3, in fewer heads: a rehearsal takes its time for each
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=8,
        num_key_value_heads=1, head_dim=1024, max_position_embeddings=8192, tie_word_embeddings=False,
    ).save_pretrained(str(tmp_path))  # fmt: skip
    found = plan(Config.of({"model": str(tmp_path), "batch.max_length": 16, "batch.pairs_per_step": 1}), gpus=64)
    assert found.weights == 70_553_706_496  # Llama 3's own count
    assert found.typical and found.precision == "float32/bfloat16"
    assert found.per_gpu is not None
    assert found.per_gpu["weights"] == pytest.approx(4 * found.weights / 64, rel=1e-3)
    assert found.per_gpu["optimizer"] == pytest.approx(8 * found.weights / 64, rel=1e-3)


def test_adapters_spare_gradients_and_moments() -> None:
    full, lora = planner(), planner()
    lora.config = Config.of({"model": "m", "batch.pairs_per_step": 4, "steps": 2, "lora.r": 4}).resolved()
    a, b = full.outlook(48), lora.outlook(48)
    assert b.n_trainable < 0.2 * a.n_trainable and b.n_weights > a.n_weights
    assert b.parts["optimizer"] == 8 * b.n_trainable
    assert b.total < a.total


def test_what_cannot_be_planned_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be planned yet"):
        plan(Config.of(world.settings(tmp_path, sync__every=2)))


def _benchmark() -> Any:
    file = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(heap.taken([(0, 64)]) is None, reason="another C library")
@pytest.mark.slow
def test_the_prediction_is_within_15_percent_of_the_measured_peak(tmp_path: Path) -> None:
    predicted, measured, _ = _benchmark().measure(tmp_path, "small:full:1024", steps=3)
    assert predicted == pytest.approx(measured, rel=0.15)
