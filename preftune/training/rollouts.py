"""Iterations of a policy that learns from its own replies: write, score, estimate advantages, and a few passes of updates.

    rollouts = Rollouts(...)
    yield from rollouts.begin(step)          # where an iteration begins, its replies are written and kept on disk
    taken, micros = rollouts.taken(step), rollouts.micros(step)

The loop does with `micros` what it does with those of any other objective. All follows from (seed, iteration) and the weights,
so an interrupted run writes the same replies again, or finds them: those of the iteration in hand are in the run's folder, and
in each checkpoint that was taken between two of its updates.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preftune.config import Config
from preftune.data.template import Renderer
from preftune.data.types import Example, Tree
from preftune.data.write import plain
from preftune.engine.policy import Policy
from preftune.engine.score import Logps, logps_of_all
from preftune.errors import TrainingError
from preftune.generate import Reply, Sampling, sample
from preftune.losses.objective import Objective
from preftune.losses.records import Rollout as TokenByToken
from preftune.model.compile import eager
from preftune.run import Run
from preftune.training import checkpoint, written
from preftune.training.assemble import Known
from preftune.training.checks import is_precise
from preftune.training.critic import Critic
from preftune.training.plan import Plan, cut
from preftune.training.prepare import Progress
from preftune.training.prompts import Asked
from preftune.training.rewards import Rewards, Tie
from preftune.training.shadow import Shadow
from preftune.training.step import Micro
from preftune.training.written import Written

_PROMPTS_AT_ONCE = 64  # between two signs of life


class Place(NamedTuple):
    """Where a step stands: its iteration, and which of the iteration's updates it is."""

    iteration: int
    update: int


class Schedule:
    """Which prompts an iteration answers, and which of its replies an update learns from. Knows numbers alone."""

    def __init__(self, config: Config, n_prompts: int) -> None:
        """`steps` updates, or as many as `epochs` passes over the prompts take."""
        size, self._per_step = config.rollout.prompts, config.batch.pairs_per_step
        self.seed, self._passes = config.seed, config.rollout.epochs
        self._plan = Plan.of(n_prompts, pairs_per_step=size, epochs=config.epochs, steps=None, seed=config.seed)
        if config.steps is not None:  # never more iterations than updates
            self._plan = Plan.of(n_prompts, pairs_per_step=size, epochs=1.0, steps=config.steps, seed=config.seed)
        n_updates = [self._updates(len(self.prompts(i))) for i in range(self._plan.n_steps)]
        self._ends = np.cumsum(n_updates)
        self.n_steps = int(self._ends[-1]) if config.steps is None else config.steps
        self.n_iterations = self.place(self.n_steps - 1).iteration + 1

    def _updates(self, n: int) -> int:
        return self._passes * -(-n // self._per_step)

    def prompts(self, iteration: int) -> NDArray[np.int64]:
        """Indices of the prompts that are answered in this iteration."""
        return self._plan.examples(iteration)

    def place(self, step: int) -> Place:
        """Where update `step` (from 0) of the run stands."""
        iteration = int(np.searchsorted(self._ends, step, side="right"))
        return Place(iteration, step - (int(self._ends[iteration - 1]) if iteration else 0))

    def taken(self, step: int) -> NDArray[np.int64]:
        """Which of its iteration's prompts (by their number there) an update learns from: each pass in an order of its own."""
        iteration, update = self.place(step)
        n = len(self.prompts(iteration))
        each, within = divmod(update, -(-n // self._per_step))
        order = np.random.Generator(np.random.Philox(key=[self.seed, (iteration << 20) + each + 1])).permutation(n)
        return order[within * self._per_step : (within + 1) * self._per_step]

    def epochs(self, step: int) -> float:
        """Passes over the prompts until after this update."""
        iteration, update = self.place(step)
        share = (update + 1) / self._updates(len(self.prompts(iteration)))
        return (iteration + share) / self._plan.steps_per_epoch


class Taken(NamedTuple):
    """What an update is made of."""

    ids: list[str]
    n_units: list[int]
    n_tokens: int
    epochs: float


@dataclass
class InHand:
    """The replies of this iteration, ready to be learnt from."""

    written: Written
    trees: list[Tree]
    known: Known
    starts: NDArray[np.int64]  # [P + 1] first token of each prompt's replies

    def tokens(self, members: Sequence[int]) -> Tensor:
        """Which tokens are those of these prompts' replies."""
        return torch.from_numpy(np.concatenate([np.arange(self.starts[m], self.starts[m + 1]) for m in members]))


class Rollouts:
    """What a run that learns from its own replies has beside any other: a reward, a reference, maybe a critic, and replies."""

    def __init__(
        self,
        *,
        config: Config,
        run: Run,
        policy: Policy,
        reference: Shadow,
        goal: Sequence[Objective],
        critic: Critic | None,
        rewards: Rewards,
        renderer: Renderer,
        asked: list[Asked],
        held_out: list[Asked],
    ) -> None:
        """`reference`: the policy's weights as they were before the first update."""
        self.config, self.run, self.policy, self.reference = config, run, policy, reference
        self.critic, self.rewards, self.renderer = critic, rewards, renderer
        self.asked, self.held_out = asked, held_out
        self.prompts = [Tree(a.example.id, a.ids, ()) for a in asked]
        self.schedule = Schedule(config, len(asked))
        self.tie = Tie(config.rollout)
        self._by_token = goal[0].record is TokenByToken
        self._in_hand: InHand | None = None

    # An iteration

    def begin(self, step: int) -> Iterator[Progress]:
        """Where an iteration begins before `step`, its replies are written, or found in the run's folder."""
        iteration, update = self.schedule.place(step)
        if self._in_hand is not None and int(self._in_hand.written.iteration) == iteration:
            return
        assert update == 0, "the replies of an iteration in hand come from its checkpoint"
        writer = self._fingerprint()
        found = written.load(self.run.rollouts_file)
        if found is None or int(found.iteration) != iteration or not torch.equal(found.writer, writer):
            found = yield from self._write(iteration, writer)
            written.save(found, self.run.rollouts_file)
        self._take_up(found)
        if iteration == 0:
            self._check_reference(found)

    def _take_up(self, found: Written) -> None:
        self.rewards.moments = found.moments
        self.tie.beta = float(found.beta)
        self.tie.follow(float(found.log_ratio().mean()))  # for the next iteration
        trees = found.trees(self.prompts)
        starts = np.cumsum([0, *(sum(len(b.ids) for b in t.branches) for t in trees)])
        self._in_hand = InHand(found, trees, found.known(self.config.rollout), starts)

    def _write(self, iteration: int, writer: Tensor) -> Generator[Progress, None, Written]:
        chosen = self.schedule.prompts(iteration)
        seed = int(np.random.SeedSequence([self.config.seed, iteration]).generate_state(1, np.uint64)[0])
        replies: list[list[Reply]] = []
        for at in range(0, len(chosen), _PROMPTS_AT_ONCE):
            part = [self.asked[i].ids for i in chosen[at : at + _PROMPTS_AT_ONCE]]
            replies += self._sample(part, self.config.rollout.n or 1, seed)
            yield Progress("replies", len(replies), len(chosen))
        examples = [self.asked[i].example for i in chosen]
        return self._judged(iteration, writer, chosen, examples, replies)

    def _sample(self, prompts: list[NDArray[np.int32]], n: int, seed: int) -> list[list[Reply]]:
        sampling = Sampling(n=n, max_tokens=self.config.rollout.max_tokens, seed=seed)
        stop, pad = self.renderer.stop_ids, self.renderer.end_of_turn
        with eager(self.policy.model):
            return sample(self.policy.model, prompts, sampling, stop_ids=stop, pad_id=pad)

    def _judged(
        self, iteration: int, writer: Tensor, chosen: NDArray[np.int64], examples: Sequence[Example], replies: list[list[Reply]]
    ) -> Written:
        """Replies with their scores, log-probs and values; by the engine, so that the ratio of the first update is 1."""
        flat = [r for row in replies for r in row]
        score = self.rewards.score([self._with(e, row) for e, row in zip(examples, replies, strict=True)])
        self.rewards.take_in(score)
        ended = torch.tensor([r.ended for r in flat])
        bare = Written(
            iteration=torch.tensor([iteration]),
            writer=writer,
            prompt=torch.from_numpy(chosen.copy()),
            ids=torch.from_numpy(np.concatenate([r.ids for r in flat])),
            n_tokens=torch.tensor([len(r.ids) for r in flat]),
            ended=ended,
            logp=torch.zeros(0),
            ref_logp=torch.zeros(0),
            value=torch.zeros(0),
            score=score,
            earned=self.rewards.earned(score, ended),
            beta=torch.tensor([self.tie.beta], dtype=torch.float64),
            moments=self.rewards.moments,
        )
        trees = bare.trees(self.prompts)
        logp, ref_logp = self._logps(trees)
        value = torch.zeros_like(logp) if self.critic is None else _flat(self.critic.values(trees, self._budget))
        return bare._replace(logp=logp, ref_logp=ref_logp, value=value)

    def _with(self, example: Example, replies: Sequence[Reply]) -> Example:
        texts = tuple(self.renderer.decode(r.ids) for r in replies)
        return Example(example.id, example.prompt, texts, example.source, reference=example.reference)

    @property
    def _budget(self) -> int:
        return self.config.batch.tokens_per_microbatch

    def _logps(self, trees: Sequence[Tree]) -> tuple[Tensor, Tensor]:
        """Log-probs of all tokens under the policy as it is, and under the reference."""
        own = _flat(logps_of_all(self.policy, trees, self._budget))
        with self.reference.in_place(self.policy):
            return own, _flat(logps_of_all(self.policy, trees, self._budget))

    def _fingerprint(self) -> Tensor:
        """Sums of each trainable tensor: the same weights have the same, and others hardly ever."""
        sums = [p.detach().double().sum() for p in checkpoint.trainable(self.policy).values()]
        return torch.stack(sums).cpu()

    # What a step is made of

    def taken(self, step: int) -> Taken:
        """The units of an update, and what is read for it."""
        hand, members = self._hand, self.schedule.taken(step)
        n_tokens = int(sum(hand.starts[m + 1] - hand.starts[m] for m in members))
        units = n_tokens if self._by_token else len(members) * hand.written.n
        n_read = sum(self.policy.tokens_read(hand.trees[m]) for m in members)
        return Taken([hand.trees[m].id for m in members], [units], n_read, self.schedule.epochs(step))

    def micros(self, step: int) -> Iterator[Micro]:
        """The micro-batches of an update, for the policy."""
        yield from self._micros(step, self.policy)

    def _micros(self, step: int, reader: Policy) -> Iterator[Micro]:
        hand = self._hand
        lengths = np.array([reader.tokens_read(t) for t in hand.trees], np.int64)
        for group in cut(self.schedule.taken(step), lengths, budget=self._budget)[0]:
            batch = reader.pack([hand.trees[m] for m in group])
            at, device = hand.tokens(group), batch.tokens.device
            yield Micro(batch, hand.written.ref_logp[at].to(device), known=Known(*(x[at].to(device) for x in hand.known)))

    @property
    def _hand(self) -> InHand:
        assert self._in_hand is not None, "an iteration begins before its first step"
        return self._in_hand

    def before_update(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The critic's update, and at an iteration's first what is logged of it. Raises TrainingError if the ratio is not 1."""
        found: dict[str, float] = {}
        if self.schedule.place(step).update == 0:
            self._check_ratio(metrics["policy/approxkl_avg"])
            found = self._hand.written.metrics(self._hand.known)
        if self.critic is not None:
            micros = self._micros(step, self.critic.model)
            n_tokens = len(self._hand.tokens(self.schedule.taken(step).tolist()))
            sums, norm = self.critic.learn(micros, n_tokens, step, self.schedule.n_steps)
            total, n = sums["loss"].tolist()
            found |= {"loss/value_avg": total / n, "grad_norm/critic": float(norm)}
        return found

    # Tests that stop a run

    def _check_ratio(self, approxkl: float) -> None:
        """Nothing was learnt since the replies were written: the policy gives them the same log-probs, up to rounding."""
        allowed = 2e-4 if is_precise(self.policy) else 0.1  # nats a token
        if approxkl > 0.5 * allowed**2:
            raise TrainingError(
                f"the first update of an iteration: the policy should be what wrote the replies, π/π_old = 1, but a token's "
                f"log-prob differs by {(2 * approxkl) ** 0.5:.3g} nats. Likely causes: dropout in the base model, or a model "
                "whose forward pass is not deterministic"
            )

    def _check_reference(self, found: Written) -> None:
        """Before the first update the policy is its reference."""
        worst = float((found.logp - found.ref_logp).abs().max())
        if worst > (1e-2 if is_precise(self.policy) else 2.0):
            raise TrainingError(
                f"step 0: the policy should equal its reference before the first update, but a token's log-prob differs by "
                f"{worst:.3g} nats. Likely causes: dropout in the base model, or a forward pass that is not deterministic"
            )

    # Evaluation

    def held_out_metrics(self, step: int) -> dict[str, float]:
        """One reply to each held-out prompt, by the policy as it is: what it earns, its KL and its length.

        "loss" is minus what RLHF maximises, E[score] − β KL, with the β that the run began with and nothing taken for no end.
        """
        replies = self._sample([a.ids for a in self.held_out], 1, self.config.seed)
        examples = [self._with(a.example, row) for a, row in zip(self.held_out, replies, strict=True)]
        scores = self.rewards.score(examples)
        trees = [
            Tree(a.example.id, a.ids, (written.branch(row[0].ids),)) for a, row in zip(self.held_out, replies, strict=True)
        ]
        own, ref = self._logps(trees)
        kl = float((own.double() - ref.double()).sum()) / len(trees)
        score, beta = float(scores.mean()), self.config.rollout.beta or self.config.loss_parameters.get("beta", 0.0)
        self._log_samples(step, examples, scores, replies)
        return {
            "loss": beta * kl - score,
            "objective/scores": score,
            "objective/kl": kl,
            "objective/rlhf_reward": score - beta * kl,
            "lengths/mean": float(np.mean([len(row[0].ids) for row in replies])),
            "val/ended": float(np.mean([row[0].ended for row in replies])),
        }

    def _log_samples(self, step: int, examples: Sequence[Example], scores: Tensor, replies: list[list[Reply]]) -> None:
        rows: list[dict[str, Any]] = [
            {"when": f"step {step}", "id": e.id, "prompt": plain(e.prompt), "response": e.responses[0], "ended": r[0].ended,
             "score": float(s)}
            for e, s, r in zip(examples, scores, replies, strict=True)
        ][: self.config.samples.n]  # fmt: skip
        if rows:
            self.run.log_samples(rows)

    # What a checkpoint keeps

    def state(self) -> dict[str, Any]:
        """Numbers that the next iteration depends on."""
        return {"beta": self.tie.beta, "moments": self.rewards.moments.tolist()}

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        """By file: the critic, and between two updates of an iteration its replies."""
        found = self.critic.tensors() if self.critic else {}
        if step < self.schedule.n_steps and self.schedule.place(step).update:
            found["replies"] = self._hand.written.tensors()
        return found

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Puts all back as it was."""
        if self.critic is not None:
            self.critic.restore(saved)
        state = saved.state["rollouts"]
        self.tie.beta, self.rewards.moments = state["beta"], torch.tensor(state["moments"], dtype=torch.float64)
        if (saved.folder / "replies.safetensors").exists():
            self._take_up(Written(**saved.weights("replies")))


def _flat(scored: Sequence[Logps]) -> Tensor:
    return torch.from_numpy(np.concatenate([part for tree in scored for part in tree]))
