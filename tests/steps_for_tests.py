"""One optimizer step of every objective on a tiny model, cut in any way, on one rank or as one of several.

The data have all that an objective can ask for: pairs of every confidence and margin, ranked lists, prompts of several pairs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny
import torch
from torch import Tensor

from preftune.data.types import Pair, Tree
from preftune.engine.policy import Path as ScoringPath
from preftune.engine.policy import Policy
from preftune.losses.objective import Objective, objective
from preftune.losses.records import Scores, SequentialKL
from preftune.registry import LOSSES
from preftune.training.dist import ONE, Ranks
from preftune.training.loop import to_host
from preftune.training.material import Material, material
from preftune.training.step import Micro, backward, evaluate

ON: dict[str, dict[str, Any]] = {  # each modifier, turned on
    "ld": {"ld_alpha": 0.4},
    "f_divergence": {"divergence": "js"},
    "length_margin": {"length_margin": 0.05},
    "wpo": {"wpo": True},
}
SUMS: dict[str, list[tuple[str, dict[str, Any], float]]] = {
    "dpo+sft": [("dpo", {}, 1.0), ("sft", {}, 0.2)],
    "aot+beta_dpo+sft": [("aot", {}, 1.0), ("beta_dpo", {}, 0.5), ("sft", {}, 0.1)],
    "kto+dpo": [("kto", {}, 1.0), ("dpo", {}, 1.0)],
    "aot+ld": [("aot", ON["ld"], 1.0)],
    **{f"dpo+{name}": [("dpo", given, 1.0)] for name, given in ON.items()},
}


GENTLE = {"dpop": {"penalty": 5.0}}
"""With λ = 50 a margin has 15 times the rounding of a log-prob, which is more than 1e-6 where the reference is far off."""


def one(name: str) -> Objective:
    """The objective called `name`, with its defaults but for what float32 cannot tell apart."""
    return objective(name, GENTLE.get(name, {}))


def scored_by_a_policy() -> list[str]:
    """Names of the objectives on a language model's log-probs of responses that the data hold."""
    return sorted(name for name in LOSSES if one(name).record is not Scores and not one(name).needs_rollouts)


def goal_of(case: str) -> list[Objective]:
    """An objective by its name, or one of the sums."""
    return [objective(n, given, weight=w) for n, given, w in SUMS[case]] if case in SUMS else [one(case)]


def trees() -> list[Tree]:
    """Nine examples; a long one among short ones, lists of three, a prompt with two pairs."""
    pairs = [
        replace(t, pairs=(Pair(i % 2, 1 - i % 2, 0.6 + 0.1 * (i % 5), 0.5 * i),))
        for i, t in enumerate([*tiny.forest(7, n=4, longest=5), *tiny.forest(8, n=2, longest=14, scored=0.7)])
    ]
    order = (Pair(0, 1), Pair(0, 2, 0.8), Pair(1, 2))
    lists = [replace(t, pairs=order, scores=(3.0, 1.5, 1.0)) for t in tiny.forest(9, n=2, k=3, longest=6)]
    return [*pairs, *lists, replace(tiny.forest(10, n=1, k=3)[0], pairs=(Pair(0, 1), Pair(2, 1)))]


class Setting(NamedTuple):
    """A goal, its data, the policy, and a reference that is another model."""

    goal: list[Objective]
    data: Material
    policy: Policy
    reference: Policy

    def micro(self, members: Sequence[int], weight: float = 1.0) -> Micro:
        """A micro-batch of some examples. Goals that ask for the same records share it: their examples are the same."""
        asked = frozenset(record for o in self.goal for record in o.units | o.given)
        key = self.reference, asked, tuple(members)
        if key not in _MICROS:
            _MICROS[key] = self._read(members, SequentialKL in asked)
        return _MICROS[key]._replace(weight=weight)

    @torch.no_grad()
    def _read(self, members: Sequence[int], predicted: bool) -> Micro:
        def packed(chosen: list[Tree]) -> tuple[Any, Tensor]:
            batch = self.policy.pack(chosen)
            return batch, self.reference(batch)

        batch, ref_logps = packed([self.data.trees[i] for i in members])
        others = None if self.data.mismatched is None else packed([self.data.mismatched[i] for i in members])
        return Micro(batch, ref_logps, 1.0, others, self.reference.predictions(batch).detach() if predicted else None)


_MICROS: dict[tuple[Policy, frozenset[type], tuple[int, ...]], Micro] = {}


@cache
def _models(dtype: torch.dtype) -> tuple[Policy, Policy]:
    """Policy and reference. One layer, since nothing here depends on how many there are."""
    policy, reference = (
        Policy(tiny.model("llama", seed=s, dtype=dtype, num_hidden_layers=1), ScoringPath("forest", "own")) for s in (0, 1)
    )
    return policy, reference


@cache
def at_once(case: str) -> Found:
    """The step of a case in one micro-batch on one rank."""
    at = setting(case, torch.float32)
    return step(at, [range(len(at.data.trees))])


@cache
def setting(case: str, dtype: torch.dtype) -> Setting:
    """All that a step of this case needs."""
    goal = goal_of(case)
    return Setting(goal, material(trees(), goal), *_models(dtype))


class Found(NamedTuple):
    """What a step gave: its metrics, and the gradient by name; and the metrics of an evaluation of the same examples."""

    metrics: dict[str, float]
    gradient: dict[str, Tensor]
    evaluated: dict[str, float]


def step(at: Setting, cuts: Sequence[Sequence[int]], ranks: Ranks = ONE, *, idle: bool = False) -> Found:
    """One step over the data cut like that; `idle`: with a micro-batch that counts for nothing."""
    policy = at.policy
    for p in policy.parameters():
        p.grad = None
    outer = policy if ranks.world == 1 else torch.nn.parallel.DistributedDataParallel(policy)
    micros = [at.micro(members) for members in cuts] + [at.micro([0], 0.0)] * idle
    n_units = at.data.n_units.sum(0).tolist()
    metrics, _ = to_host(at.goal, backward(outer, micros, at.goal, n_units=n_units, ranks=ranks), ranks)
    evaluated, _ = to_host(at.goal, evaluate(policy, micros, at.goal, ranks=ranks), ranks)
    return Found(metrics, tiny.gradients(policy), evaluated)


def as_rank(rank: int, port: str, cases: list[str], folder: str) -> None:
    """One of two processes: the step of every case, uneven between the ranks, into a file."""
    import torch.distributed as td

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    td.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for case in cases:
        at = setting(case, torch.float32)
        n = len(at.data.trees)
        mine = [[0], list(range(1, n - 2))] if rank == 0 else [[n - 1, n - 2]]
        found[case] = step(at, mine, Ranks(rank, 2), idle=rank == 1)
    torch.save({case: tuple(f) for case, f in found.items()}, Path(folder) / f"{rank}.pt")
    td.destroy_process_group()


def apart(a: Found, b: Found) -> float:
    """Largest difference between two steps: metrics by their own size where it is above 1, gradients by their largest entry."""
    assert a.metrics.keys() == a.evaluated.keys() == b.metrics.keys()
    measured = max(abs(found[n] - v) / max(1.0, abs(v)) for n, v in b.metrics.items() for found in (a.metrics, a.evaluated))
    return max(measured, tiny.relative(a.gradient, b.gradient))


def finite(found: Found) -> bool:
    """Whether every number of a step is one."""
    return bool(np.isfinite(list(found.metrics.values())).all()) and all(
        bool(g.isfinite().all()) for g in found.gradient.values()
    )
