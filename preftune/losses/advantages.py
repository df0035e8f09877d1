"""From rewards to advantages: how much better a reply, or a token of it, was than expected. Pure functions, in float64.

Replies stand one after another: of `n_tokens` [R] the first has the first `n_tokens[0]` of S tokens. KLs are in nats; a reward
is in its own unit, and β says what a nat is worth in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Advantages(NamedTuple):
    """How much better each token was than the critic expected, and what the critic should have expected."""

    advantage: Float[Tensor, "S"]
    returns: Float[Tensor, "S"]


def token_rewards(
    score: Float[Tensor, "R"],
    logp: Float[Tensor, "S"],
    ref_logp: Float[Tensor, "S"],
    n_tokens: Int[Tensor, "R"],
    *,
    beta: float,
) -> Float[Tensor, "S"]:
    """−β (log π − log π_ref) at each token, and the score at a reply's last (Ziegler et al., 2019, arXiv 1909.08593, eq. 2).

    Their sum over a reply is R − β log(π(y|x)/π_ref(y|x)), whose mean over the policy's own replies is what RLHF maximises.
    """
    rewards = -beta * (logp.double() - ref_logp.double())
    return rewards.index_add(0, n_tokens.cumsum(0) - 1, score.double())


def gae(
    rewards: Float[Tensor, "S"], values: Float[Tensor, "S"], n_tokens: Int[Tensor, "R"], *, gamma: float, lam: float
) -> Advantages:
    """Generalized advantage estimation (Schulman et al., 2016, arXiv 1506.02438, equation 16), within each reply.

    δ_t = r_t + γ V_{t+1} − V_t with V = 0 after the last token; A_t = δ_t + γλ A_{t+1}; the returns are A + V.
    """
    sizes = n_tokens.tolist()
    reward, value = (pad_sequence(list(x.double().split(sizes)), batch_first=True) for x in (rewards, values))  # [R, T]
    value_after = torch.nn.functional.pad(value, (0, 1))  # 0 after the last token: of a reply, and of the padding
    advantage = torch.zeros_like(value_after)
    for t in reversed(range(value.shape[1])):  # padding has no reward and no value: it adds nothing to what is before it
        delta = reward[:, t] + gamma * value_after[:, t + 1] - value[:, t]
        advantage[:, t] = delta + gamma * lam * advantage[:, t + 1]
    real = torch.arange(value.shape[1]) < n_tokens[:, None]
    flat = advantage[:, :-1][real]
    return Advantages(flat, flat + values.double())


def leave_one_out(total: Float[Tensor, "P n"]) -> Float[Tensor, "P n"]:
    """Each reply's reward minus the mean of the other replies' to the prompt (Ahmadian et al., 2024, §3.3)."""
    n = total.shape[1]
    return (total - total.mean(1, keepdim=True)) * (n / (n - 1))


def group_relative(total: Float[Tensor, "P n"], *, scale: bool) -> Float[Tensor, "P n"]:
    """Each reply's reward minus the mean of its group (Shao et al., 2024, arXiv 2402.03300, §4.1.2).

    scale: divided by the group's standard deviation; without it (Liu et al., 2025, arXiv 2503.20783), prompts on which all
    replies do about as well do not count as much as those where they differ. A group of equal rewards has no advantage.
    """
    centred = total - total.mean(1, keepdim=True)
    return centred / (total.std(1, keepdim=True) + 1e-8) if scale else centred


def whiten(values: Float[Tensor, "S"]) -> Float[Tensor, "S"]:
    """Mean 0 and standard deviation 1 over the tokens of replies alone: no prompt and no padding is counted."""
    centred = values - values.mean()
    return centred / (centred.square().mean().sqrt() + 1e-8)
