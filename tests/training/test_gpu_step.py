"""Steps and runs on the GPU itself: nothing waits inside a step, a run trains, a resumed run is the same bit for bit."""

from __future__ import annotations

import math
from pathlib import Path as File
from typing import Any

import pytest
import tiny
import torch
from worlds import World, same_weights

from preftune.config import Config
from preftune.engine.policy import Policy
from preftune.losses.objective import objective
from preftune.run import Run
from preftune.training.dist import Ranks
from preftune.training.job import run_job
from preftune.training.loop import Saved, to_host
from preftune.training.optim import WeightWatch, clip, make_optimizer
from preftune.training.step import Micro, backward

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

CUDA = torch.device("cuda")


def test_nothing_waits_for_the_device_inside_a_step() -> None:
    trees = tiny.forest(1, n=6)
    policy = Policy.choose(tiny.model("llama", dtype=torch.float32).to(CUDA), trees, autocast=torch.bfloat16)
    goal, optimizer = [objective("dpo", {"beta": 0.1})], make_optimizer(policy, Config.of({}).resolved().optim)
    watch = WeightWatch(policy)
    kept: list[Any] = []

    def step() -> None:
        micros = (
            Micro(batch, torch.zeros(len(batch.target), device=CUDA)) for batch in map(policy.pack, (trees[:3], trees[3:]))
        )
        optimizer.zero_grad(set_to_none=False)
        sums = backward(policy, micros, goal, n_units=[6])
        kept[:] = [sums, clip(policy, 1.0), *watch.moved()]
        optimizer.step()

    step()  # what is compiled or allocated at first use may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    metrics, _ = to_host(goal, kept[0], Ranks(), *kept[1:])
    assert all(math.isfinite(x) for x in metrics.values())


def test_the_optimizer_is_one_fused_kernel_and_takes_the_same_step() -> None:
    settings = Config.of({"optim.lr": 1e-2, "optim.weight_decay": 0.1}).resolved().optim
    moved = []
    for device in ("cpu", CUDA):
        model = tiny.model("llama", dtype=torch.float32).to(device)
        optimizer = make_optimizer(model, settings)
        assert all(group["fused"] for group in optimizer.param_groups)
        for step in range(3):
            for i, p in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            optimizer.step()
        moved.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("more", [{}, {"lora__r": 4, "lora__merge": True}, {"precision": "fp32"}], ids=str)
def test_a_run_trains_from_start_to_end(world: World, tmp_path: File, more: dict[str, Any]) -> None:
    events = list(run_job(Config.of(world.settings(tmp_path / "run", device="cuda", **more))))
    run = Run.open(tmp_path / "run")
    steps = run.metrics(split="train")
    assert len(steps) == 5 and abs(steps[0]["loss"] - math.log(2)) < 2e-2
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["weights_moved"] > 0
    assert (run.model / "tokenizer.json").exists() and len(run.samples()) == 4
    assert any("attention:" in e.message for e in events if getattr(e, "kind", "") == "path")


@pytest.mark.parametrize("more", [{}, {"lora__r": 4, "lora__dropout": 0.1}], ids=["full", "lora"])
def test_a_resumed_run_is_the_same_bit_for_bit(world: World, tmp_path: File, more: dict[str, Any]) -> None:
    def config(name: str) -> Config:
        fixed = {"deterministic": True, "device": "cuda", "checkpoint.every": 2, "steps": 6}
        return Config.of(world.settings(tmp_path / name, **more) | fixed)

    try:
        list(run_job(config("whole")))
        for event in (events := run_job(config("stopped"))):
            if isinstance(event, Saved):
                break
        events.close()
        list(run_job(config("stopped"), resume=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "stopped" / "model")
