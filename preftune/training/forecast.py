"""What a run will do and take, said before it starts: `preftune plan` and `preftune train --dry-run`.

    forecast = plan(Config.load("recipes/dpo.yaml", ["model=base", "data=pairs.jsonl"]))
    print(forecast.as_text())

Reads the model's configuration, its tokenizer and the data, never its weights. Without data the examples are taken to be as
long as they may be.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preftune.config import Config
from preftune.data.types import Branch, Pair, Tree
from preftune.engine.linear import product_t
from preftune.engine.policy import Path as Way
from preftune.engine.policy import Policy
from preftune.errors import ConfigError
from preftune.losses.objective import goal_of
from preftune.model.device import Precision, pick_device, precision_of
from preftune.model.load import context_length, open_renderer, resolve, unloaded
from preftune.training.material import material
from preftune.training.memory import Outlook, Planner, gib
from preftune.training.optim import make_optimizer
from preftune.training.prepare import is_live, learns_scores, read_data, require_reference_used
from preftune.training.step import Goal, Micro, backward

_MARGIN = 0.9  # of the free memory is proposed: other processes live too, and a prediction may be 10 % off


@dataclass(frozen=True)
class Forecast:
    """All that `plan` says. Sizes are bytes."""

    device: str
    precision: str
    weights: int
    trainable: int
    examples: int
    typical: bool  # made up: no data was given
    longest_example_tokens: int
    tokens_per_epoch: int
    steps: int
    epochs: float
    microbatches_per_step: float
    reference_responses: int
    memory: Outlook
    budget: int
    largest_tokens_per_microbatch: int | None  # None: not even the least fits
    why_not: str
    disk: dict[str, int]
    flops: float
    least_seconds: float | None  # at the speed of a matrix product measured now; None where it is not this machine
    gpus: int | None
    per_gpu: dict[str, int] | None  # a calculation, not a rehearsal

    def as_dict(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self) | {"memory": asdict(self.memory) | {"total": self.memory.total}}

    def as_text(self) -> str:
        """For a person."""
        m = self.memory
        source = "made up, each as long as it may be: give data= for your own" if self.typical else "as they will be cut"
        parts = "\n".join(f"    {name:<12} {gib(n):>10}" for name, n in m.parts.items() if n)
        phases = ", ".join(f"{name} {gib(n)}" for name, n in m.phases.items())
        lines = [
            f"model       {self.weights:,} weights, {self.trainable:,} learn; {self.precision} on {self.device}",
            f"examples    {self.examples:,} ({source}), the longest {self.longest_example_tokens:,} tokens; "
            f"{self.tokens_per_epoch:,} tokens an epoch",
            f"steps       {self.steps:,} ({self.epochs:g} epochs), {self.microbatches_per_step:.1f} micro-batches each "
            f"of up to {m.largest:,} tokens (batch.tokens_per_microbatch={m.tokens})",
            f"reference   {self.reference_responses:,} responses to score once, if they are not stored already"
            if self.reference_responses
            else "reference   none",
            f"memory      peak {gib(m.total)}; by phase: {phases}; at the peak of a step:\n{parts}",
            f"largest     {self._largest()}",
            "disk        " + ", ".join(f"{name} {gib(n)}" for name, n in self.disk.items()),
            f"work        {self.flops:.3g} floating-point operations{self._time()}",
        ]
        if self.per_gpu:
            sharded = ", ".join(f"{name} {gib(n)}" for name, n in self.per_gpu.items())
            lines.append(f"per GPU     {sharded} (calculated for {self.gpus} GPUs with all states sharded, not rehearsed)")
        return "\n".join(lines)

    def _largest(self) -> str:
        if self.largest_tokens_per_microbatch is None:
            return self.why_not
        return f"batch.tokens_per_microbatch={self.largest_tokens_per_microbatch} fits into {gib(self.budget)}"

    def _time(self) -> str:
        if self.least_seconds is None:
            return ""
        return f"; at least {self.least_seconds / 60:.1f} minutes, at the speed of a matrix product measured here now"


def plan(config: Config, *, memory: int | None = None, gpus: int | None = None) -> Forecast:
    """Predicts the run that `config` describes.

    memory: bytes that it may take; None: what the device has free, a tenth left over.
    gpus:   plan for this many GPUs that need not be here.

    Raises PreftuneError for settings, data or a model that the run itself would refuse before it trains.
    """
    if config.model is None:
        raise ConfigError("model: give the folder or hub id of the model to plan for, as model=PATH; config.json is enough")
    config = config.resolved()
    goal = _plannable(config)
    needs_reference = any(o.needs_reference for o in goal)
    device = pick_device(config.device) if gpus is None else torch.device("cpu")
    precision = _precision(config, device, gpus)
    trees, held_out = _examples(config, goal)
    on_cpu = device.type == "cpu" and gpus is None
    planner = Planner(config, device, precision, goal, trees, holes=on_cpu, base=_base(config) if on_cpu else 0)
    outlook = planner.outlook(config.batch.tokens_per_microbatch)
    budget = memory or (0 if gpus else int(_MARGIN * free_memory(device)))
    largest, why_not = None, "give --memory to find the largest batch for these GPUs"
    if budget:
        try:
            largest, why_not = planner.largest(budget), ""
        except ConfigError as error:
            if memory is not None:
                raise
            why_not = str(error)
    tokens_per_epoch = int(planner.lengths.sum())
    n_read = tokens_per_epoch * planner.plan.n_steps / planner.plan.steps_per_epoch
    flops = outlook.flops_per_token * (n_read + (tokens_per_epoch / 3 if needs_reference else 0))
    return Forecast(
        device=f"{gpus} GPUs" if gpus else str(device),
        precision=str(precision),
        weights=outlook.n_weights,
        trainable=outlook.n_trainable,
        examples=len(trees),
        typical=config.data is None,
        longest_example_tokens=int(planner.lengths.max()),
        tokens_per_epoch=tokens_per_epoch,
        steps=planner.plan.n_steps,
        epochs=planner.plan.n_steps / planner.plan.steps_per_epoch,
        microbatches_per_step=outlook.micros_per_step,
        reference_responses=sum(len(t.branches) for t in [*trees, *held_out]) if needs_reference else 0,
        memory=outlook,
        budget=budget,
        largest_tokens_per_microbatch=largest,
        why_not=why_not,
        disk=_disk(config, outlook, precision, [*trees, *held_out] if needs_reference else []),
        flops=flops,
        least_seconds=flops / _speed() if on_cpu else None,
        gpus=gpus,
        per_gpu=_sharded(outlook, planner.model_config, gpus) if gpus else None,
    )


def _plannable(config: Config) -> Goal:
    """The objectives. Raises ConfigError for what a rehearsal does not have yet."""
    goal = goal_of(config)
    require_reference_used(config, goal)
    if config.needs_rollouts:
        raise ConfigError(f"loss.name={config.loss_name}: a run on the policy's own replies cannot be planned yet")
    if is_live(config, goal) or learns_scores(goal) or config.average.kind:
        what = "a reference held beside the policy, a reward model and an average of weights"
        raise ConfigError(f"{what} cannot be planned yet (loss {config.loss_name}); plan the same settings without it")
    return goal


def _precision(config: Config, device: torch.device, gpus: int | None) -> Precision:
    if gpus is not None and config.precision == "auto":  # what auto means where GPUs are
        return precision_of("bf16", device)
    return precision_of(config.precision, device)


def _examples(config: Config, goal: Goal) -> tuple[list[Tree], list[Tree]]:
    """The training and held-out examples, as the run will have them; made up where there is no data."""
    assert config.model is not None
    if config.data is not None:
        renderer = open_renderer(config.model, template=config.template, max_length=config.batch.max_length, usual=1024)
        data = read_data(config, renderer, goal)
        return data.train.trees, data.held_out.trees if data.held_out else []
    context = context_length(resolve(config.model)) or 1024
    longest = config.batch.max_length or min(context, 1024)
    n = config.batch.pairs_per_step * (config.steps or 1)
    made = typical_trees(longest, min(n, 4 * config.batch.pairs_per_step))
    return material(made, goal).trees, []


def typical_trees(longest: int, n: int) -> list[Tree]:
    """`n` examples whose prompt + response has `longest` tokens, half of each, and that has two responses."""
    half = max(1, longest // 2)
    branch = Branch(np.zeros(max(1, longest - half), np.int32), np.ones(max(1, longest - half), np.bool_))
    prompt = np.zeros(half, np.int32)
    return [Tree(f"typical-{i}", prompt, (branch, branch), (Pair(0, 1),), (True, False)) for i in range(n)]


def free_memory(device: torch.device) -> int:
    """Bytes that a new process could take on this device. Raises ConfigError where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        raise ConfigError("memory: this system does not say how much is free; give --memory, such as --memory 8GiB") from None
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(text) - used)
    return free + resident()


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "900 MB" or "123456". Raises ConfigError."""
    units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    number = text.strip().rstrip("KMGTBkmgtib ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError):
        raise ConfigError(f"--memory: {text!r} is no size; expected a number and a unit, such as 8GiB") from None
    if size <= 0:
        raise ConfigError(f"--memory: {text!r}: expected more than 0")
    return size


def _base(config: Config) -> int:
    """Bytes of this process with the libraries and the data in it, after a tiny step has touched the code that a step runs."""
    from transformers import LlamaConfig

    tiny = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
    policy = Policy(unloaded(tiny, torch.float32), Way("forest", "own"))
    batch = policy.pack(typical_trees(64, 2))
    backward(policy, [Micro(batch, torch.zeros(len(batch.target)))], goal_of(Config.of({})), n_units=[2])
    make_optimizer(policy, Config.of({}).resolved().optim).step()
    if config.lora.r:
        import peft  # noqa: F401
    return resident() if Path("/proc/self/statm").exists() else 0


def _speed(n: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations a second of a float32 matrix product here."""
    a, b = torch.ones(n, n), torch.ones(n, n)
    product_t(a, b)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        product_t(a, b)
        done += 2 * n**3
    return done / (time.perf_counter() - started)


def _disk(config: Config, outlook: Outlook, precision: Precision, scored: list[Tree]) -> dict[str, int]:
    """Bytes of what the run writes; a checkpoint is written beside those that are kept."""
    checkpoint = 3 * 4 * outlook.n_trainable
    model = (4 if config.lora.r else precision.weights.itemsize) * outlook.n_trainable
    if config.lora.merge:
        model += precision.weights.itemsize * outlook.n_weights
    branches = [b for t in scored for b in t.branches]
    found = {"one checkpoint": checkpoint, "checkpoints at most": (config.checkpoint.keep + 1) * checkpoint, "model": model}
    if config.eval.keep == "best":
        found["best"] = 4 * outlook.n_trainable
    if branches:
        found["reference store"] = 4 * sum(int(b.scored.sum()) for b in branches) + 24 * len(branches)
    return found


def _sharded(outlook: Outlook, config: Any, gpus: int) -> dict[str, int]:
    """Bytes on each of `gpus` GPUs where weights, gradients and moments are sharded and one layer at a time is gathered."""
    states = {name: outlook.parts[name] // gpus for name in ("weights", "gradients", "optimizer")}
    layers = int(config.get_text_config().num_hidden_layers)
    gathered = 2 * outlook.parts["weights"] // layers if gpus > 1 else 0  # this layer and the next
    found = states | {"gathered": gathered} | {name: outlook.parts[name] for name in ("head", "activations")}
    return found | {"total": sum(found.values())}
