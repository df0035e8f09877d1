"""What a run will take, before it runs: memory by what it is for, disk, work; and the largest micro-batch that fits.

    outlook = planner.outlook(tokens=8192)
    outlook.total, outlook.parts["activations"]        # bytes
    planner.largest(8 << 30)                           # tokens_per_microbatch

No formula of activations: the run's own step is rehearsed on tensors without values (`rehearse`), on the micro-batches that
the run will cut. A model that is deeper than `_DEPTHS` is rehearsed at these two depths, and what a layer adds is added for
the others. On a CPU three things come on top: the process itself, measured here after one tiny step; the allocator's holes,
tried by the allocator itself (`heap`); the model's file where weights are converted from it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from preftune.config import Config
from preftune.data.types import Tree
from preftune.engine.attention import Unmodelled
from preftune.engine.policy import Path as Way
from preftune.errors import ConfigError, ModelError
from preftune.model.checkpointing import checkpoint_layers
from preftune.model.device import Precision
from preftune.model.load import architecture, unloaded
from preftune.model.lora import add_lora, cast_frozen
from preftune.training.heap import Request, taken
from preftune.training.plan import Plan, cut
from preftune.training.rehearse import Ledger, Step, rehearse
from preftune.training.step import Goal

_DEPTHS = (2, 4)  # layers; memory is a straight line in them where all layers are alike
_MICROS = 2  # of a step
_ROUNDS = 4  # of the ledger, put to the allocator: more find few holes more
_GRAIN = 256  # tokens between the micro-batch sizes that are tried


@dataclass(frozen=True, slots=True)
class Outlook:
    """Peak memory on one device for one size of micro-batch, in bytes."""

    tokens: int  # tokens_per_microbatch
    largest: int  # tokens of the largest micro-batch that is cut
    phases: dict[str, int]  # peak of the process (on a GPU: of its tensors) by phase
    parts: dict[str, int]  # what the peak of the step is made of
    micros_per_step: float  # mean
    flops_per_token: float  # forward and backward
    n_weights: int
    n_trainable: int

    @property
    def total(self) -> int:
        """Peak of the whole run."""
        return max(self.phases.values())


@dataclass
class Planner:
    """A run's settings and its examples, real or typical, ready to be rehearsed at any size of micro-batch."""

    config: Config
    device: torch.device
    precision: Precision
    goal: Goal
    trees: list[Tree]
    holes: bool  # whether the C library's allocator serves the tensors
    base: int = 0  # bytes of the process before it loads the model; on a GPU 0
    way: Way = Way("forest", "own")
    _seen: dict[int, Outlook] = field(default_factory=dict)

    @cached_property
    def model_config(self) -> Any:
        """The architecture."""
        assert self.config.model is not None
        return architecture(self.config.model)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that one pass over each example reads."""
        if self.way.layout == "forest":
            return np.array([t.n_tokens for t in self.trees], np.int64)
        return np.array([len(t.branches) * (len(t.prompt) + max(len(b.ids) for b in t.branches)) for t in self.trees], np.int64)

    @cached_property
    def plan(self) -> Plan:
        """Which examples make which step."""
        c = self.config
        return Plan.of(len(self.trees), pairs_per_step=c.batch.pairs_per_step, epochs=c.epochs, steps=c.steps, seed=c.seed)

    def outlook(self, tokens: int) -> Outlook:
        """Memory with `tokens_per_microbatch=tokens`. Raises ModelError for a model that cannot be rehearsed."""
        if tokens not in self._seen:
            cuts = [
                cut(self.plan.examples(s), self.lengths, budget=tokens)[0]
                for s in range(min(self.plan.n_steps, self.plan.steps_per_epoch))
            ]
            self._seen[tokens] = self._rehearsed(tokens, cuts)
        return self._seen[tokens]

    def _rehearsed(self, tokens: int, cuts: list[list[list[int]]]) -> Outlook:
        steps = self._heaviest(cuts)
        n_layers = int(self.model_config.get_text_config().num_hidden_layers)
        depths = (n_layers,) if n_layers <= _DEPTHS[-1] or _layers_differ(self.model_config) else _DEPTHS
        books = [self._books(steps, depth) for depth in depths]
        found = books[0] if len(books) == 1 else _line(books[0], books[1], depths, n_layers)
        largest = max(int(self.lengths[micro].sum()) for step in cuts for micro in step)
        n_read = sum(int(self.lengths[i]) for i in self._indices)
        return Outlook(
            tokens, largest, found.phases, found.parts,
            float(np.mean([len(step) for step in cuts])), found.flops / n_read, found.n_weights, found.n_trainable,
        )  # fmt: skip

    def _heaviest(self, cuts: list[list[list[int]]]) -> list[Step]:
        """The step with the largest micro-batch and one from the middle, up to `_MICROS` micro-batches of each."""

        def size(micro: list[int]) -> int:
            return int(self.lengths[micro].sum())

        by_peak = sorted(cuts, key=lambda step: -max(size(m) for m in step))
        chosen = [sorted(by_peak[0], key=size, reverse=True)[:_MICROS], sorted(by_peak[len(by_peak) // 2], key=size)[:_MICROS]]
        self._indices = [i for micro in chosen[0] for i in micro]
        # the last step is the heaviest: it meets the optimizer's state and the holes that the others left
        return [[[self.trees[i] for i in micro] for micro in step] for step in (chosen[1], chosen[0])]

    def _books(self, steps: Sequence[Step], depth: int) -> _Books:
        for way in dict.fromkeys((self.way, Way("rows", "own"), Way("rows", "model"))):
            try:
                ledger = rehearse(
                    partial(self._model, depth),
                    way,
                    self.goal,
                    steps,
                    self.config.optim,
                    autocast=self.precision.autocast,
                    device=self.device.type,
                    n_shapes=int(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")) if self.holes else 0,
                )
            except (Unmodelled, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            if way != self.way:
                self.way = way
                self.__dict__.pop("lengths", None)
            return self._priced(ledger)
        raise ModelError(f"{self.config.model}: its step cannot be rehearsed without computing it ({reason})")

    def _model(self, depth: int) -> Any:
        model = unloaded(_shallower(self.model_config, depth), self.precision.weights)
        if self.config.lora.r:
            model = add_lora(model, self.config.lora, base="", seed=self.config.seed)
            if self.precision.autocast is not None:
                cast_frozen(model, self.precision.autocast, exactly=self.config.lora.merge)
        if self.config.batch.activation_checkpointing:
            checkpoint_layers(model)
        return model

    def _priced(self, ledger: Ledger) -> _Books:
        """Phases and parts of a ledger, with what the process adds on a CPU."""
        phases, parts = ledger.peaks(), ledger.at_peak("step")
        if self.holes:
            phases, parts = _with_holes(ledger, phases, parts)
        phases.pop("end", None)
        if self.config.reference is not None:  # another model, loaded beside the policy and let go
            phases["reference"] += ledger.at_peak("reference")["weights"]
        parts["process"] = self.base
        phases = {name: n + self.base for name, n in phases.items()}
        return _Books(phases, parts, ledger.flops_step, ledger.n_weights, ledger.n_trainable)

    def largest(self, memory: int) -> int:
        """The largest tokens_per_microbatch, in steps of 256 tokens, whose predicted peak is at most `memory` bytes.

        Raises ConfigError that says how much the least takes, and what would lower it.
        """
        longest = int(self.lengths.max())
        top = max(
            int(self.lengths[self.plan.examples(s)].sum()) for s in range(min(self.plan.n_steps, self.plan.steps_per_epoch))
        )
        low, high = -(-longest // _GRAIN), -(-top // _GRAIN)
        if (least := self.outlook(low * _GRAIN)).total > memory:
            raise ConfigError(_too_little(self.config, memory, least))
        if self.outlook(high * _GRAIN).total <= memory:
            return high * _GRAIN
        while high - low > 1:  # by a straight line through both ends: memory is nearly one, so few are tried
            a, b = self.outlook(low * _GRAIN).total, self.outlook(high * _GRAIN).total
            guess = low + int((high - low) * (memory - a) / max(1, b - a))
            middle = min(max(guess, low + 1), high - 1)
            low, high = (middle, high) if self.outlook(middle * _GRAIN).total <= memory else (low, middle)
        return low * _GRAIN


@dataclass
class _Books:
    phases: dict[str, int]
    parts: dict[str, int]
    flops: int
    n_weights: int
    n_trainable: int


def _line(a: _Books, b: _Books, depths: tuple[int, ...], n: int) -> _Books:
    """What n layers take, from what two smaller numbers of them take."""

    def at(x: int, y: int) -> int:
        return round(x + (y - x) * (n - depths[0]) / (depths[1] - depths[0]))

    return _Books(
        {name: at(a.phases[name], b.phases[name]) for name in b.phases if name in a.phases},
        {name: at(a.parts[name], b.parts[name]) for name in b.parts},
        at(a.flops, b.flops),
        at(a.n_weights, b.n_weights),
        at(a.n_trainable, b.n_trainable),
    )


def _held(requests: list[Request]) -> list[int] | None:
    """Bytes that the allocator holds at each request, the most of `_ROUNDS` rounds: a run is longer than the ledger."""
    left: dict[int, int] = {}
    for number, n in requests:
        left[number] = max(n, 0)
    back = [(number, -n) for number, n in left.items() if n]
    apart = 1 + max(left)
    held = taken([(number + k * apart, n) for k in range(_ROUNDS) for number, n in requests + back])
    if held is None:
        return None
    each = len(requests) + len(back)
    return [max(held[at::each]) for at in range(len(requests))]


def _with_holes(ledger: Ledger, phases: dict[str, int], parts: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """The same with the allocator's holes; weights stand in a mapped file and are not asked of it."""
    apart = {s for s, kind in ledger.kinds.items() if kind == "weights"}
    weights = sum(n for s, n in ledger.entries if s in apart and n > 0)
    held = _held([(s, 0 if s in apart else n) for s, n in ledger.entries])
    if held is None:
        return phases, parts
    with_holes: dict[str, int] = {}
    for phase, at, _, _ in ledger.live():
        with_holes[phase] = max(with_holes.get(phase, 0), held[at] + weights)
    parts["allocator"] = max(0, with_holes["step"] - sum(parts.values()))
    with_holes["load"] = max(phases["load"], weights)  # weights are initialised in the books, and read from a file in a run
    return with_holes, parts


def _shallower(config: Any, depth: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return config


def _layers_differ(config: Any) -> bool:
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["same"]
    return len(set(kinds)) > 1 or bool(getattr(text, "first_k_dense_replace", 0)) or "num_hidden_layers" not in text.to_dict()


def _too_little(config: Config, memory: int, least: Outlook) -> str:
    lower = ["a smaller batch.max_length"]
    if not config.lora.r:
        lower.append("lora.r=16 (no gradients and moments of the base)")
    if config.precision != "pure_bf16":
        lower.append("precision=pure_bf16 (half the weights; small updates are lost)")
    return (
        f"memory: {gib(memory)} is too little: the least that this run takes is {gib(least.total)}, with "
        f"batch.tokens_per_microbatch={least.tokens} (the longest example by itself). It is lowered by: {'; '.join(lower)}"
    )


def gib(n: int) -> str:
    """Bytes for a person."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
