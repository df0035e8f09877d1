"""The loop: a generator that yields what happened. Callers (the progress line, trackers, tests) read it.

for event in training(work):
    match event:
        case Step(): ...          # metrics of the step's batch, measured before its update
        case Evaluated(): ...     # metrics on held-out examples
        case Saved(): ...         # a checkpoint was written
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from preftune.config import Config
from preftune.data.store import Store
from preftune.data.types import Tree
from preftune.engine.batch import Batch
from preftune.engine.policy import Policy
from preftune.engine.reference import logps_of
from preftune.engine.score import by_length
from preftune.errors import Interrupted, TrainingError
from preftune.files import storage, sync_folder
from preftune.losses.records import SequentialKL
from preftune.run import Run
from preftune.training import checkpoint
from preftune.training.checks import check_step_zero, is_precise, not_finite
from preftune.training.dist import Ranks
from preftune.training.feed import Feed
from preftune.training.interrupt import stop_signals
from preftune.training.material import Material
from preftune.training.metrics import BETTER, Sums, means
from preftune.training.optim import WeightWatch, clip, learning_rate, make_optimizer
from preftune.training.plan import Plan, cut
from preftune.training.prepare import Progress
from preftune.training.rollouts import Rollouts, Taken
from preftune.training.shadow import Averaged, Shadow
from preftune.training.step import Goal, Micro, backward, evaluate


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. Metrics are those of its batch before the update."""

    index: int
    loss: float  # in the objective's own unit (nats for sft and dpo)
    lr: float
    grad_norm: float  # before clipping
    n_tokens: int  # read in this step, over all ranks
    seconds: float
    metrics: dict[str, float]


class Evaluated(NamedTuple):
    """Metrics on the held-out examples after `step` updates, and whether they are the best so far."""

    step: int
    metrics: dict[str, float]
    best: bool


class Saved(NamedTuple):
    """A checkpoint of `step` updates was written."""

    step: int


Event = Progress | Step | Evaluated | Saved


@dataclass
class Stopping:
    """Early stopping: the best value so far and for how many evaluations nothing was better."""

    best: float | None = None
    best_step: int = 0
    without_gain: int = 0

    def better(self, metric: str, value: float, step: int) -> bool:
        """Records `value`; whether it is the best so far."""
        gain = self.best is None or BETTER[metric] * (value - self.best) > 0
        if gain:
            self.best, self.best_step, self.without_gain = value, step, 0
        else:
            self.without_gain += 1
        return gain


@dataclass
class Work:
    """All that one run of the loop needs."""

    config: Config
    run: Run
    policy: Policy
    goal: Goal
    train: Material
    held_out: Material | None
    reference: Store | None
    starts_as_reference: bool  # the policy is the reference before the first update
    live: Shadow | None = None  # a reference that moves, or of which more than log-probs is asked
    average: Averaged | None = None  # what is evaluated and saved in the place of the policy
    rollouts: Rollouts | None = None  # where the policy learns from what it writes itself
    ranks: Ranks = Ranks()
    resume_from: checkpoint.Checkpoint | None = None
    state: dict[str, Any] = field(default_factory=dict)  # what the checkpoint carries besides the weights

    def result(self) -> AbstractContextManager[None]:
        """The policy has the weights that the run is after: its own, or their average."""
        return nullcontext() if self.average is None else self.average.result(self.policy).in_place(self.policy)

    @property
    def plan(self) -> Plan:
        """Which examples make which step."""
        c = self.config
        return Plan.of(
            len(self.train.trees), pairs_per_step=c.batch.pairs_per_step, epochs=c.epochs, steps=c.steps, seed=c.seed
        )

    @property
    def n_steps(self) -> int:
        """Updates of the whole run."""
        return self.plan.n_steps if self.rollouts is None else self.rollouts.schedule.n_steps


def training(work: Work) -> Iterator[Event]:
    """Trains from where `work.resume_from` stands to the end of the plan.

    Raises Interrupted after saving on SIGTERM or Ctrl-C, TrainingError when the loss is not finite or step 0 is not what it
    must be.
    """
    config, policy, n_steps = work.config, work.policy, work.n_steps
    outer = _distributed(policy, work.ranks)
    optimizer = make_optimizer(policy, config.optim)
    watch = WeightWatch(policy)
    stopping, done = _restored(work, optimizer)
    every = eval_every(config, n_steps) if work.held_out else 0
    lengths = np.array([policy.tokens_read(t) for t in work.train.trees if t.branches], np.int64)
    feed = Feed(lambda index: _step_micros(work, index, lengths))
    policy.train()

    def save(step: int, *, finished: bool = False) -> Saved:
        if work.ranks.main:
            state = {**work.state, "step": step, "finished": finished, "stopping": vars(stopping)}
            if work.rollouts is not None:
                state["rollouts"] = work.rollouts.state()
            beside = _shadows(work, step)
            checkpoint.save(work.run.checkpoints, policy, optimizer, state, keep=config.checkpoint.keep, beside=beside)
        work.ranks.barrier()
        return Saved(step)

    stopped_early = False
    with stop_signals() as stop:
        while done < n_steps:
            if every and done % every == 0:
                evaluated = _evaluated(work, stopping, done)
                yield evaluated
                stopped_early = bool(config.eval.patience) and stopping.without_gain >= (config.eval.patience or 0)
                if stopped_early:
                    break
            yield from () if work.rollouts is None else work.rollouts.begin(done)
            yield _step(work, outer, optimizer, watch, done, lengths, feed)
            done += 1
            _follow(work, done)
            if work.ranks.any(stop.is_set(), _device(policy)):
                save(done)
                raise Interrupted(
                    f"stopped after {done} of {n_steps} steps; all is saved. Go on with: "
                    f"preftune train --resume out={shlex.quote(str(work.run.path))}"
                )
            if config.checkpoint.every and done % config.checkpoint.every == 0 and done < n_steps:
                yield save(done)
        if every and not stopped_early:
            yield _evaluated(work, stopping, done)
    check_weights(work)
    yield save(done, finished=True)


def _step(
    work: Work, outer: nn.Module, optimizer: torch.optim.Optimizer, watch: WeightWatch, index: int, lengths: Any, feed: Feed
) -> Step:
    """One update. The metrics and the gradient's norm reach the host in one transfer, before the weights change."""
    started = time.perf_counter()
    config, taken = work.config, _taken(work, index, lengths)
    optimizer.zero_grad(set_to_none=False)
    with random_of(config.seed, index, work.ranks.rank, _device(work.policy)):
        sums = backward(outer, feed.step(index), work.goal, n_units=taken.n_units, ranks=work.ranks)
    norm = clip(work.policy, config.optim.clip)
    if index + 1 < work.n_steps and work.live is None:
        feed.prepare(index + 1)  # before the device is waited for
    metrics, (grad_norm, moved, way) = to_host(work.goal, sums, work.ranks, norm, *watch.moved())
    _check_finite(work, index, taken.ids, metrics | {"grad_norm": grad_norm})
    if index == 0 and work.starts_as_reference:
        start = evaluate(work.policy, _step_micros(work, 0, lengths), work.goal, ranks=work.ranks, as_reference=True)
        check_step_zero(metrics, to_host(work.goal, start, work.ranks)[0]["loss"], precise=is_precise(work.policy))
    if work.rollouts is not None:
        metrics |= work.rollouts.before_update(index, metrics)
    lr = learning_rate(config.optim, index, work.n_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    seconds = time.perf_counter() - started
    metrics |= {
        "grad_norm": grad_norm,
        "learning_rate": lr,
        "tokens": taken.n_tokens,
        "seconds": seconds,
        "tokens_per_second": taken.n_tokens / seconds,
        "weights_moved": moved,
        "weights_change": way,
        "epoch": taken.epochs,
    }
    return Step(index, metrics["loss"], lr, grad_norm, taken.n_tokens, seconds, metrics)


def _taken(work: Work, index: int, lengths: NDArray[np.int64]) -> Taken:
    """The examples of a step, or the replies."""
    if work.rollouts is not None:
        return work.rollouts.taken(index)
    examples, data = work.plan.examples(index), work.train
    n_units = data.n_units[examples].sum(0).tolist()
    epochs = (index + 1) / work.plan.steps_per_epoch
    return Taken([data.trees[i].id for i in examples], n_units, int(lengths[examples].sum()), epochs)


@contextmanager
def random_of(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Dropout of a step follows from (seed, step, rank) alone: a resumed run draws what an uninterrupted one draws."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))
        yield


def _follow(work: Work, done: int) -> None:
    """Moves the reference and the average after `done` updates."""
    sync = work.config.sync
    if work.live is not None and sync.every and done % sync.every == 0:
        work.live.mix(work.policy, sync.mix)
    if work.average is not None:
        work.average.update(work.policy, done)


def _shadows(work: Work, step: int) -> dict[str, dict[str, Tensor]]:
    moved = {"reference": work.live.weights} if work.live is not None and work.config.sync.every else {}
    own = work.rollouts.tensors(step) if work.rollouts is not None else {}
    return moved | own | ({"average": work.average.mean.weights} if work.average is not None else {})


def _restored(work: Work, optimizer: torch.optim.Optimizer) -> tuple[Stopping, int]:
    """Puts all back as it was in the checkpoint that the run goes on from, if there is one."""
    found = work.resume_from
    if found is None:
        return Stopping(), 0
    checkpoint.restore(found, work.policy, optimizer)
    restore_shadows(work, found)
    if work.rollouts is not None:
        work.rollouts.restore(found)
    return Stopping(**found.state["stopping"]), found.step


def restore_shadows(work: Work, saved: checkpoint.Checkpoint) -> None:
    """Puts a moved reference and an average back as they were."""
    if work.live is not None and work.config.sync.every:
        work.live.load(saved.weights("reference"))
    if work.average is not None:
        work.average.load(saved.weights("average"), saved.step)


def _step_micros(work: Work, index: int, lengths: NDArray[np.int64]) -> Iterator[Micro]:
    """This rank's micro-batches of a step."""
    if work.rollouts is not None:
        return work.rollouts.micros(index)
    examples = work.plan.examples(index)
    cuts = cut(examples, lengths, budget=work.config.batch.tokens_per_microbatch, world=work.ranks.world)
    return _micros(work, work.train, cuts[work.ranks.rank], otherwise=int(examples[0]))


def _micros(work: Work, data: Material, cuts: Sequence[Sequence[int]], *, otherwise: int) -> Iterator[Micro]:
    """The micro-batches of a rank; where it has fewer than others, the example `otherwise`, which counts for nothing."""
    whole = any(SequentialKL in o.units | o.given for o in work.goal)
    for group in cuts:
        members = group or [otherwise]
        batch, ref_logps = _packed(work, [data.trees[i] for i in members])
        mismatched = None
        if data.mismatched is not None:
            other, other_ref = _packed(work, [data.mismatched[i] for i in members])
            assert other_ref is not None, "a mismatched response is there to be compared with the reference"
            mismatched = other, other_ref
        reference = None
        if whole:
            assert work.live is not None
            with work.live.in_place(work.policy):
                reference = work.policy.predictions(batch).detach()
        yield Micro(batch, ref_logps, float(bool(group)), mismatched, reference)


def _packed(work: Work, trees: Sequence[Tree]) -> tuple[Batch, Tensor | None]:
    """A batch and the reference's log-probs there: stored ones, or those that a reference gives that moves."""
    batch = work.policy.pack(trees)
    if work.reference is not None:
        return batch, logps_of(work.reference, trees, batch)
    if work.live is None:
        return batch, None
    with work.live.in_place(work.policy):
        return batch, work.policy(batch)


def held_out_metrics(work: Work, step: int) -> dict[str, float]:
    """Metrics on the held-out examples with the policy as it is: each example once, whatever the batch or rank count."""
    assert work.held_out is not None
    if work.rollouts is not None:
        return work.rollouts.held_out_metrics(step)
    n = len(work.held_out.trees)
    mine = range(work.ranks.rank, n, work.ranks.world)
    lengths = [work.policy.tokens_read(t) for t in work.held_out.trees]
    cuts = list(by_length(mine, lengths, work.config.batch.tokens_per_microbatch)) or [[]]  # a rank without keeps in step
    sums = evaluate(work.policy, _micros(work, work.held_out, cuts, otherwise=0), work.goal, ranks=work.ranks)
    metrics, _ = to_host(work.goal, sums, work.ranks)
    return metrics


def _evaluated(work: Work, stopping: Stopping, step: int) -> Evaluated:
    with work.result():
        metrics = held_out_metrics(work, step)
    metric = work.config.eval.metric
    if bad := not_finite(metrics):
        raise TrainingError(f"held-out examples after {step} steps: {bad}. {_remedy(work)}")
    best = stopping.better(metric, metrics[metric], step)
    if best and work.config.eval.keep == "best" and work.ranks.main:
        keep_best(work)
    return Evaluated(step, metrics, best)


def keep_best(work: Work) -> None:
    """Keeps the weights as they are as the best so far, replacing the former best in one rename."""
    folder = work.run.best
    with storage(folder, "keep the best weights"):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".weights.tmp"
        with work.result():
            checkpoint.write_weights(temporary, checkpoint.trainable(work.policy))
        temporary.replace(folder / "weights.safetensors")
        sync_folder(folder)


def to_host(goal: Goal, sums: Sums, ranks: Ranks, *scalars: Tensor) -> tuple[dict[str, float], list[float]]:
    """Means of the sums over all ranks, and this rank's scalars, in one transfer."""
    names = sorted(sums)
    table = ranks.sum(torch.stack([sums[n] for n in names]))
    flat = torch.cat([table.flatten(), *(s.detach().to(table).reshape(1) for s in scalars)]).tolist()
    return means(goal, {n: (flat[2 * i], flat[2 * i + 1]) for i, n in enumerate(names)}), flat[2 * len(names) :]


def _check_finite(work: Work, index: int, ids: list[str], metrics: dict[str, float]) -> None:
    if bad := not_finite(metrics):
        raise TrainingError(
            f"step {index}: {bad}; the weights were not touched by it. Its examples: {', '.join(ids[:5])}"
            f"{' …' if len(ids) > 5 else ''}. {_remedy(work)}, or look at these rows"
        )


def _remedy(work: Work) -> str:
    return f"Try a smaller optim.lr (now {work.config.optim.lr:g}) or precision=fp32"


def check_weights(work: Work) -> None:
    """Raises TrainingError when a weight is not finite, so that no broken model is saved as the result."""
    if not all(bool(p.isfinite().all()) for p in checkpoint.trainable(work.policy).values()):
        raise TrainingError(f"after the last step a weight is not finite: no model is saved. {_remedy(work)}")


def eval_every(config: Config, n_steps: int) -> int:
    """Steps between evaluations: as set, else about ten in the run."""
    return config.eval.every if config.eval.every is not None else max(1, n_steps // 10)


def _distributed(policy: Policy, ranks: Ranks) -> nn.Module:
    if ranks.world == 1:
        return policy
    experts = any("expert" in name for name, _ in policy.named_parameters())  # not every expert sees a token
    return nn.parallel.DistributedDataParallel(policy, broadcast_buffers=False, find_unused_parameters=experts)


def _device(policy: nn.Module) -> torch.device:
    return next(policy.parameters()).device
