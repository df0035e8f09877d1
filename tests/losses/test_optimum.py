"""What DPO rests on: the policy that maximises E[r] − β KL(π‖π_ref) is π* ∝ π_ref exp(r/β), and both roads lead there.

A policy that picks one of a few answers is small enough to know π* exactly. PPO, RLOO and GRPO come to it from samples and
rewards; DPO from preferences alone, drawn by Bradley-Terry from the same rewards: here all of them, by their expectation.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from preftune.losses.advantages import gae, group_relative, leave_one_out, token_rewards
from preftune.losses.dpo import dpo
from preftune.losses.records import RefPairs, Replies, Rollout, Values
from preftune.losses.rollout import clipped_value, grpo, ppo, rloo

BETA = 0.5
REF, REWARD = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.0, 0.8], dtype=torch.float64)
N_PROMPTS, N_REPLIES = 256, 4


def optimum(ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    return (ref.log() + reward / beta).softmax(-1)


def distance(a: Tensor, b: Tensor) -> float:
    """Total variation."""
    return float((a - b).abs().sum() / 2)


class Toy:
    """One prompt, two answers of one token; iterations of sampling and two updates, as in training."""

    def __init__(self, seed: int) -> None:
        self.logits = REF.log().clone().requires_grad_()
        self.value = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        self.random = torch.Generator().manual_seed(seed)

    def train(self, name: str, *, iterations: int = 150, **more: float) -> Tensor:
        optimizer = torch.optim.Adam([{"params": [self.logits]}, {"params": [self.value]}], lr=0.05)
        for i in range(iterations):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 - i / iterations)
            answers = torch.multinomial(self.policy().detach(), N_PROMPTS * N_REPLIES, replacement=True, generator=self.random)
            old, old_value = self.policy().log().detach()[answers], self.value.detach().expand(len(answers))
            for _ in range(2):
                optimizer.zero_grad()
                self.loss(name, answers, old, old_value, more).backward()
                optimizer.step()
        return self.policy().detach()

    def policy(self) -> Tensor:
        return self.logits.softmax(-1)

    def loss(self, name: str, answers: Tensor, old: Tensor, old_value: Tensor, more: dict[str, float]) -> Tensor:
        ref, one = REF.log()[answers], torch.ones_like(answers)
        rewards = token_rewards(REWARD[answers], old, ref, one, beta=more.get("reward_beta", BETA))
        logp = self.policy().log()[answers]
        if name == "ppo":
            found = gae(rewards, old_value, one, gamma=1.0, lam=0.95)
            critic = clipped_value(Values(self.value.expand(len(answers)), old_value, found.returns))
            return ppo(Rollout(logp, old, found.advantage)).loss.mean() + critic.mean()
        total = rewards.reshape(N_PROMPTS, N_REPLIES)
        if name == "rloo":
            return rloo(Replies(logp, old, ref, one, leave_one_out(total).flatten())).loss.mean()
        advantage = group_relative(total, scale=False).flatten()
        return grpo(Replies(logp, old, ref, one, advantage), beta=more.get("loss_beta", 0.0)).loss.mean()


@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo"])
def test_each_comes_to_the_optimum_of_rlhf(name: str) -> None:
    wanted = optimum(REF, REWARD, BETA)
    assert distance(REF, wanted) > 0.3, "there is a way to go"
    assert distance(Toy(seed=0).train(name), wanted) < 0.02


def test_a_kl_in_the_loss_of_grpo_ties_to_another_optimum() -> None:
    """The gradient of k3 on the policy's own samples is that of KL(π_ref‖π), not of KL(π‖π_ref): docs/ppo.md says so.

    And a group's mean holds the reply itself, which takes 1/n of the reward's pull and nothing of such a tie's.
    """
    found = Toy(seed=0).train("grpo", reward_beta=0.0, loss_beta=BETA)
    grid = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    p = torch.stack([1 - grid, grid], 1)
    forward = (REF * (REF / p).log()).sum(1)
    best = p[((p * REWARD).sum(1) * (1 - 1 / N_REPLIES) - BETA * forward).argmax()]
    assert distance(found, best) < 0.02
    assert distance(best, optimum(REF, REWARD, BETA)) > 0.03


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_on_infinitely_many_preferences_comes_to_the_same_optimum(n: int, beta: float) -> None:
    """Rafailov et al., 2023: its loss, expected over pairs from the reference and Bradley-Terry verdicts, is least at π*."""
    random = torch.Generator().manual_seed(n)
    ref = REF if n == 2 else torch.rand(n, generator=random, dtype=torch.float64).softmax(-1)
    reward = REWARD if n == 2 else torch.randn(n, generator=random, dtype=torch.float64) * 0.5
    first, second = torch.cartesian_prod(torch.arange(n), torch.arange(n)).unbind(1)
    weight = ref[first] * ref[second] * (reward[first] - reward[second]).sigmoid()  # how often such a pair is in the data
    logits = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)
    ones = torch.ones(len(first), dtype=torch.float64)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logp = logits.log_softmax(-1)
        pairs = RefPairs(logp[first], logp[second], ref.log()[first], ref.log()[second], ones, ones)
        total = (weight * dpo(pairs, beta=beta).loss).sum()
        total.backward()
        return total

    optimizer.step(loss)
    assert distance(logits.softmax(-1).detach(), optimum(ref, reward, beta)) < 1e-4
