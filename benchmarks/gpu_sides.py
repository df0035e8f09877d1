"""The sides of a case on a GPU, and how one of them is timed.

    preftune:varlen, …    packed forests under a budget of tokens, one attention each
    peer:4, peer:16       what TRL's DPO step computes, with so many pairs in a micro-batch

The peer is a re-statement, not TRL: chosen and rejected rows of a micro-batch in one padded [2·pairs, length] pass, each with
its prompt, through torch's attention with a padding mask; the head on answer tokens alone; reference log-probs from before. Its
head is preftune's own, its frozen weights are in bf16, and it neither collates, logs nor scales losses: it is not slower
than it has to be.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from preftune.config import Optim
from preftune.data.types import Tree
from preftune.engine.attention import FOREST
from preftune.engine.backends import BACKENDS, available
from preftune.engine.batch import Batch
from preftune.engine.policy import Path, Policy
from preftune.losses.objective import objective
from preftune.model.compile import use_compiled_layers
from preftune.model.lora import is_lora, plain
from preftune.training.dist import Ranks
from preftune.training.loop import to_host
from preftune.training.optim import WeightWatch, clip, make_optimizer
from preftune.training.plan import cut
from preftune.training.step import Micro, backward

PEER_PAIRS = (4, 16)
LR = {"full": 1e-5, "lora": 1e-4}


class Case(NamedTuple):
    """A row of the table."""

    model: str
    lengths: str
    tuning: str

    @property
    def name(self) -> str:
        return ":".join(self)


class Run(NamedTuple):
    """What every side does."""

    pairs: int
    tokens: int
    steps: int
    warmup: int
    peak: float  # operations a second of a matrix product
    longest: int  # tokens

    @property
    def n_trees(self) -> int:
        return self.pairs * (self.steps + self.warmup)


class Side(NamedTuple):
    """One way to take the steps: a policy's path, and pairs in a micro-batch where it is not cut by tokens."""

    name: str
    path: Path
    pairs: int | None = None
    compiled: bool = False


@dataclass
class Result:
    """Medians over the measured steps."""

    seconds: float = 0.0
    pairs_per_second: float = 0.0
    tokens_per_second: float = 0.0  # read, padding included
    tokens: float = 0.0  # a step, likewise
    mfu: float = 0.0  # products that this side computes, by the measured peak
    peak_gib: float = 0.0  # of the whole process: weights, optimizer, activations
    micro_batches: float = 0.0  # a step
    microbatch: str = ""  # what it holds at most
    losses: list[float] = field(default_factory=list)  # of all steps
    each: list[float] = field(default_factory=list)  # seconds of the measured steps
    error: str | None = None


class Padded(nn.Module):
    """Padded rows in one pass, whatever their widths."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch) -> Tensor:
        logps: Tensor = self.policy(batch, as_packed=True)
        return logps


def sides(chosen: Path, device: torch.device, *, quick: bool, compiled: bool) -> list[Side]:
    """All sides to measure, the path that preftune chose first."""
    short = {b.name: b.name.removeprefix("preftune_") for b in BACKENDS} | {FOREST: "branches"}
    names = [chosen.attention]
    if not quick:
        names += [n for n in (*(b.name for b in available(device)), FOREST) if n not in names]
    ours = [Side(f"preftune:{short[n]}", replace(chosen, attention=n)) for n in names]
    if compiled:
        ours.insert(1, Side(f"{ours[0].name}+compile", ours[0].path, compiled=True))
    peers = [Side(f"peer:{n}", Path("rows", "own"), pairs=n) for n in PEER_PAIRS]
    return ours + peers


def measure_side(side: Side, model: Any, trees: Sequence[Tree], run: Run) -> Result:
    """The steps of one side, from the weights that the model has; they are put back afterwards.

    Where memory is short the micro-batch is halved, and the result says so.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in learning]
    tokens, pairs = run.tokens, side.pairs
    while True:
        try:
            return _steps(side._replace(pairs=pairs), model, trees, run._replace(tokens=tokens))
        except torch.OutOfMemoryError as error:
            tokens, pairs = (tokens, pairs // 2) if pairs else (tokens // 2, None)
            if pairs == 0 or tokens < 512:
                return Result(error=_first_line(error))
        except RuntimeError as error:  # a kernel that does not take this model
            return Result(error=_first_line(error))
        finally:
            with torch.no_grad():
                for p, before in zip(learning, start, strict=True):
                    p.copy_(before)
                    p.grad = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _steps(side: Side, model: Any, trees: Sequence[Tree], run: Run) -> Result:
    lora = is_lora(model)
    policy = Policy(model, side.path, autocast=torch.bfloat16)
    policy.train()
    device = next(policy.parameters()).device
    cuda = device.type == "cuda"
    scorer: nn.Module = Padded(policy) if side.pairs else policy
    micros = [_micros(side, policy, trees, run, step) for step in range(run.steps + run.warmup)]
    with policy.adapter_off() if lora else nullcontext(), torch.no_grad():
        reference = [[scorer(policy.pack(some)) for some in step] for step in micros]
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    optimizer = make_optimizer(policy, Optim(lr=LR["lora" if lora else "full"]))
    watch, goal = WeightWatch(policy), [objective("dpo", {"beta": 0.1})]
    result = Result(microbatch=f"{side.pairs} pairs" if side.pairs else f"{run.tokens} tokens")
    use_compiled_layers(model, side.compiled)
    try:
        for index, (step, known) in enumerate(zip(micros, reference, strict=True)):
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=False)
            sums = backward(scorer, map(Micro, map(policy.pack, step), known), goal, n_units=[run.pairs])
            metrics, _ = to_host(goal, sums, Ranks(), clip(policy, 1.0), *watch.moved())
            optimizer.step()
            if cuda:
                torch.cuda.synchronize(device)
            result.losses.append(metrics["loss"])
            if index >= run.warmup:
                result.each.append(time.perf_counter() - began)
    finally:
        use_compiled_layers(model, False)
    measured = micros[run.warmup :]
    tokens = statistics.mean(sum(_tokens_read(some, padded=side.pairs is not None) for some in step) for step in measured)
    work = statistics.mean(sum(operations(model, some, padded=side.pairs is not None) for some in step) for step in measured)
    seconds = statistics.median(result.each)
    return replace(
        result,
        seconds=seconds,
        pairs_per_second=run.pairs / seconds,
        tokens_per_second=tokens / seconds,
        tokens=tokens,
        mfu=work / seconds / run.peak,
        micro_batches=statistics.mean(len(m) for m in micros),
        peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if cuda else float("nan"),
    )


def _micros(side: Side, policy: Policy, trees: Sequence[Tree], run: Run, step: int) -> list[list[Tree]]:
    """The trees of each micro-batch of a step."""
    examples = np.arange(step * run.pairs, (step + 1) * run.pairs)
    if side.pairs:
        groups = [examples[at : at + side.pairs].tolist() for at in range(0, run.pairs, side.pairs)]
    else:
        lengths = np.array([policy.tokens_read(t) for t in trees], np.int64)
        groups = cut(examples, lengths, budget=run.tokens)[0]
    return [[trees[i] for i in group] for group in groups]


def _tokens_read(trees: Sequence[Tree], *, padded: bool) -> int:
    """Tokens that one pass over a micro-batch reads: a branch's last token predicts nothing and is not read."""
    read = [(len(t.prompt), [len(b.ids) - 1 for b in t.branches]) for t in trees]
    if padded:
        return sum(len(ns) for _, ns in read) * max(p + n for p, ns in read for n in ns)
    return sum(p + sum(ns) for p, ns in read)


def operations(model: Any, trees: Sequence[Tree], *, padded: bool) -> float:
    """Multiplications and additions of the matrix products that forward and backward over a micro-batch need.

    2 a weight and token forward, 2 for the gradient of what comes in, 2 for that of a weight that learns; of attention what a
    causal mask leaves, 4 a head's width and pair of tokens forward and 8 backward. What is computed twice counts once.
    """
    head = plain(model).get_output_embeddings()
    n_read, n_scored = _tokens_read(trees, padded=padded), sum(int(b.scored.sum()) for t in trees for b in t.branches)
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear) and not hasattr(module, "base_layer"):
            weight = module.weight
            total += weight.numel() * (n_scored if module is head else n_read) * (6 if weight.requires_grad else 4)
    config = plain(model).config
    seen = 0.0
    for tree in trees:
        prompt, n = len(tree.prompt), [len(b.ids) - 1 for b in tree.branches]
        # in padded rows each response has the prompt's square again
        seen += prompt**2 / 2 * (len(n) if padded else 1) + sum(k * prompt + k**2 / 2 for k in n)
    return total + 12 * seen * config.hidden_size * config.num_hidden_layers
