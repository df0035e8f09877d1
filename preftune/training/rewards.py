"""What a reply earns: the score of a model or a rule, brought to a scale, less the price of not coming to an end.

rewards = Rewards.of(config.reward, device)
scores = rewards.score(examples)              # one per response, as the model or rule gives it
earned = rewards.earned(scores, ended)        # what the policy learns from
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preftune.data.types import Example
from preftune.errors import DataError
from preftune.label.reward import RewardScorer
from preftune.label.rule import score_by_rule
from preftune.label.scored import Scored
from preftune.rollout_settings import Reward, Rollout
from preftune.userfile import user_function


class Rewards:
    """Scores by one model or one rule, and the running mean and deviation of all that were given."""

    def __init__(self, settings: Reward, score: Callable[[Sequence[Example]], list[Scored]]) -> None:
        """`score` is the model's or the rule's."""
        self.settings, self._score = settings, score
        self.moments = torch.zeros(3, dtype=torch.float64)  # number of scores, their mean, sum of squares about it

    @classmethod
    def of(cls, settings: Reward, device: torch.device) -> Rewards:
        """Opens the model, or imports the rule. Raises PreftuneError where it cannot be."""
        if settings.model is not None:
            return cls(settings, RewardScorer(settings.model, template=settings.template, device=str(device)))
        assert settings.rule is not None
        rule = user_function(settings.rule, what="a rule")
        return cls(settings, lambda examples: score_by_rule(examples, rule))

    def score(self, examples: Sequence[Example]) -> Float[Tensor, "R"]:
        """Scores of all responses, one after another. Raises DataError for one that cannot be scored."""
        found = self._score(examples)
        if missing := [s for s in found if s.score is None]:
            raise DataError(
                f"reward.model gives {len(missing)} of {len(found)} replies no score: {missing[0].why}; "
                "lower rollout.max_tokens, or leave out the longest prompts (batch.max_length)"
            )
        return torch.tensor([s.score for s in found], dtype=torch.float64)

    def take_in(self, scores: Float[Tensor, "R"]) -> None:
        """Counts these scores into the running mean and deviation (Chan et al., 1979: of two parts, exactly)."""
        n, mean, spread = self.moments.tolist()
        more, centre = len(scores), float(scores.mean())
        total, apart = n + more, centre - mean
        about = float((scores - centre).square().sum()) + apart**2 * n * more / total
        self.moments = torch.tensor([total, mean + apart * more / total, spread + about], dtype=torch.float64)

    def earned(self, scores: Float[Tensor, "R"], ended: Bool[Tensor, "R"]) -> Float[Tensor, "R"]:
        """What the policy learns from: the scores on their scale, cut, less `no_end` where a reply has none.

        The scale (Ziegler et al., 2019, §2.1: mean 0 and deviation 1) follows all scores so far instead of the first ones, and
        the price of no end is that of Stiennon et al., 2020, whose replies without one earn a fixed low score.
        """
        if self.settings.normalize:
            n, mean, spread = self.moments.tolist()
            scores = (scores - mean) / max(math.sqrt(spread / max(n, 1)), 1e-8)
        if self.settings.clip:
            scores = scores.clamp(-self.settings.clip, self.settings.clip)
        return scores - self.settings.no_end * (~ended).to(scores.dtype)


class Tie:
    """β, the price of a nat of log(π/π_ref): fixed, or steered to a KL (Ziegler et al., 2019, arXiv 1909.08593, §2.2)."""

    def __init__(self, settings: Rollout) -> None:
        """`settings` with β resolved."""
        assert settings.beta is not None
        self.settings, self.beta = settings, settings.beta

    def follow(self, kl: float) -> None:
        """β ← β(1 + K e), e = (KL − target)/target held within ±0.2, after an iteration whose replies had this KL in nats."""
        if self.settings.kl_target is not None:
            error = (kl - self.settings.kl_target) / self.settings.kl_target
            self.beta *= 1 + self.settings.kl_gain * min(max(error, -0.2), 0.2)
