"""The critic of PPO: a model of its own that says at each token what the reply will earn, and learns beside the policy.

It starts from the reward model, whose last token knows already what the whole was worth (Ouyang et al., 2022, arXiv 2203.02155,
appendix C.4), or from the policy's own body with a head that says 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune.config import Config
from preftune.data.template import Renderer
from preftune.data.types import Tree
from preftune.engine.reward import ValueModel
from preftune.engine.score import logps_of_all
from preftune.errors import ConfigError
from preftune.label.implicit import read_implicit
from preftune.losses.objective import bound
from preftune.losses.rollout import clipped_value
from preftune.model.device import Precision
from preftune.model.load import is_reward_model, load_model, load_tokenizer, resolve
from preftune.model.reward import load_reward_model, set_padding, with_scalar_head
from preftune.training import checkpoint
from preftune.training.metrics import Sums
from preftune.training.optim import clip, learning_rate, make_optimizer
from preftune.training.step import Micro, backward

_PREFIX = "critic-"


class Critic:
    """A value model with its own optimizer; the schedule is the policy's, with a peak of its own."""

    def __init__(self, config: Config, model: ValueModel) -> None:
        """`model` learns all its weights."""
        self.model = model
        self.goal = (bound("critic", clipped_value, {"clip": config.critic.clip}),)
        self._optim = config.optim.model_copy(update={"lr": config.critic.lr})
        self._optimizer = make_optimizer(model, self._optim)

    def values(self, trees: Sequence[Tree], budget: int) -> list[list[Any]]:
        """Per tree and reply the values before its tokens, without gradients."""
        return logps_of_all(self.model, trees, budget)

    def learn(self, micros: Iterable[Micro], n_tokens: int, step: int, n_steps: int) -> tuple[Sums, Tensor]:
        """One update on the replies of these micro-batches; the sums of its metrics, and the norm of its gradient."""
        self._optimizer.zero_grad(set_to_none=False)
        sums = backward(self.model, micros, self.goal, n_units=[n_tokens])
        norm = clip(self.model, self._optim.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._optim, step, n_steps)
        self._optimizer.step()
        return sums, norm

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of it, by file."""
        moments = checkpoint.moments_of(self.model, self._optimizer)
        return {f"{_PREFIX}weights": checkpoint.trainable(self.model), f"{_PREFIX}optimizer": moments}

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Puts it back as it was."""
        checkpoint.restore(saved, self.model, self._optimizer, prefix=_PREFIX)


def load_critic(
    config: Config, renderer: Renderer, probe: Sequence[Tree], device: torch.device, precision: Precision
) -> tuple[Critic, str]:
    """The critic, and the sentence that says what it starts from. Raises ConfigError for a model that reads other tokens."""
    source, why = _source(config, renderer)
    folder = resolve(source)
    if is_reward_model(folder):
        model = load_reward_model(folder, dtype=precision.weights)
    else:
        model = with_scalar_head(load_model(folder, dtype=precision.weights))
        with torch.no_grad():
            model.score.weight.zero_()
    set_padding(model, renderer.tokenizer, never=renderer.end_of_turn)
    return Critic(config, ValueModel.choose(model.to(device), probe, autocast=precision.autocast)), why


def _source(config: Config, renderer: Renderer) -> tuple[str, str]:
    assert config.model is not None
    if config.critic.model is not None:
        if not _same_tokens(resolve(config.critic.model), renderer):
            raise ConfigError(f"critic.model: {config.critic.model} has another tokenizer than the policy; leave it out")
        return config.critic.model, f"starts from {config.critic.model}"
    if config.reward.model is not None:
        if read_implicit(config.reward.model) is not None:
            return config.model, "starts from the policy's body with a head of zeros: an implicit reward has no head"
        if _same_tokens(resolve(config.reward.model), renderer):
            return config.reward.model, "starts as the reward model, which reads the same tokens"
        return config.model, "starts from the policy's body with a head of zeros: the reward model reads other tokens"
    return config.model, "starts from the policy's body with a head of zeros: the reward is a rule"


def _same_tokens(folder: Path, renderer: Renderer) -> bool:
    return bool(load_tokenizer(folder).get_vocab() == renderer.tokenizer.get_vocab())
