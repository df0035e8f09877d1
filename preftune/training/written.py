"""The replies of one iteration: what was written, what it earned, how likely it was then. Tensors alone, so a file holds it.

P prompts have n replies each, R in all, of S tokens; prompt by prompt, reply by reply, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from preftune.data.types import Branch, Tree
from preftune.errors import StorageError
from preftune.files import storage, sync_folder
from preftune.losses.advantages import gae, group_relative, leave_one_out, token_rewards, whiten
from preftune.rollout_settings import Rollout
from preftune.training.assemble import Known
from preftune.training.checkpoint import write_weights


class Written(NamedTuple):
    """Replies to some prompts, with all that their advantages are made of."""

    iteration: Int[Tensor, "1"]
    writer: Float[Tensor, "W"]  # a fingerprint of the policy that wrote them
    prompt: Int[Tensor, "P"]  # index into the prompts of the run
    ids: Int[Tensor, "S"]
    n_tokens: Int[Tensor, "R"]
    ended: Bool[Tensor, "R"]
    logp: Float[Tensor, "S"]  # nats, of the policy that wrote them
    ref_logp: Float[Tensor, "S"]
    value: Float[Tensor, "S"]  # 0 without a critic
    score: Float[Tensor, "R"]  # as the model or the rule gave it
    earned: Float[Tensor, "R"]  # on its scale, less the price of no end
    beta: Float[Tensor, "1"]  # price of a nat in these rewards
    moments: Float[Tensor, "3"]  # of all scores until here

    @property
    def n(self) -> int:
        """Replies to each prompt."""
        return len(self.n_tokens) // len(self.prompt)

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return self._asdict()

    def trees(self, prompts: Sequence[Tree]) -> list[Tree]:
        """A tree for each prompt, with its replies as branches. `prompts`: those of the run."""
        parts = np.split(self.ids.numpy().astype(np.int32), self.n_tokens.cumsum(0)[:-1].numpy())
        branches = [branch(ids) for ids in parts]
        n = self.n
        return [
            Tree(prompts[p].id, prompts[p].prompt, tuple(branches[i * n : (i + 1) * n]))
            for i, p in enumerate(self.prompt.tolist())
        ]

    def log_ratio(self) -> Float[Tensor, "R"]:
        """log(π(y|x)/π_ref(y|x)) of each reply when it was written; its mean is the KL."""
        owner = torch.repeat_interleave(self.n_tokens)
        apart = self.logp.double() - self.ref_logp.double()
        return torch.zeros(len(self.n_tokens), dtype=torch.float64).index_add(0, owner, apart)

    def known(self, settings: Rollout) -> Known:
        """The advantages, and what the critic should have said, in the log-probs' dtype."""
        beta = float(self.beta)
        if settings.estimator == "gae":
            rewards = token_rewards(self.earned, self.logp, self.ref_logp, self.n_tokens, beta=beta)
            advantage, returns = gae(rewards, self.value, self.n_tokens, gamma=settings.gamma, lam=settings.lam)
        else:
            total = (self.earned - beta * self.log_ratio()).reshape(-1, self.n)
            one_out = settings.estimator == "rloo"
            found = leave_one_out(total) if one_out else group_relative(total, scale=settings.scale)
            advantage = found.flatten().repeat_interleave(self.n_tokens)
            returns = torch.zeros_like(advantage)
        if settings.whiten:
            advantage = whiten(advantage)
        return Known(self.logp, *(x.to(self.logp.dtype) for x in (advantage, self.value, returns)))

    def metrics(self, known: Known) -> dict[str, float]:
        """What is logged of an iteration, by TRL's names where it has one."""
        kl = self.log_ratio()
        found = {
            "objective/kl": kl.mean(),
            "objective/entropy": -self.logp.double().sum() / len(self.n_tokens),
            "objective/non_score_reward": -float(self.beta) * kl.mean(),
            "objective/rlhf_reward": (self.earned - float(self.beta) * kl).mean(),
            "objective/scores": self.score.mean(),
            "objective/beta": self.beta[0],
            "lengths/mean": self.n_tokens.double().mean(),
            "val/num_eos_tokens": self.ended.double().sum(),
        }
        if bool(known.returns.any()):
            errors = known.returns.double() - known.value.double()
            found["val/explained_variance"] = 1 - errors.var(correction=0) / known.returns.double().var(correction=0).clamp(
                min=1e-12
            )
        return {name: float(value) for name, value in found.items()}


def branch(ids: NDArray[np.int32]) -> Branch:
    """A reply as a branch of which every token is scored."""
    return Branch(ids, np.ones(len(ids), np.bool_))


def save(written: Written, file: Path) -> None:
    """Writes the file whole, or leaves the old one. Raises StorageError."""
    with storage(file, "keep the replies of this iteration"):
        temporary = file.with_name(f".{file.name}.tmp")
        write_weights(temporary, written.tensors())
        temporary.replace(file)
        sync_folder(file.parent)


def load(file: Path) -> Written | None:
    """What `save` wrote; None where there is nothing that can be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return Written(**load_file(file)) if file.exists() else None
    except (SafetensorError, TypeError):  # written by another version, or damaged: it is written anew
        return None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error}") from None
