"""Settings of objectives that learn from what the policy itself writes: how it is sampled, what it earns, who expects what.

Three sections, `rollout`, `reward` and `critic`; they are refused where the objective learns from responses of the data.
"""

from __future__ import annotations

from typing import Annotated, Literal

from preftune.section import Section, Text, setting

Estimator = Literal["gae", "rloo", "grpo"]
_BETA = 0.05
_OF_OBJECTIVE: dict[str, Estimator] = {"ppo": "gae", "rloo": "rloo", "grpo": "grpo"}
_OF_RECORD: dict[str, Estimator] = {"Rollout": "gae", "Replies": "rloo"}  # of a user's own objective


class Rollout(Section):
    """Replies that the policy writes while it trains (ppo, rloo, grpo), and how much better than expected each is."""

    estimator: Annotated[
        Estimator | None,
        setting("how advantages are estimated: by a critic (gae) or within a prompt's replies; null: the objective's own"),
    ] = None
    prompts: Annotated[int, setting("prompts that are answered in one iteration", unit="prompts", ge=1)] = 64
    n: Annotated[int | None, setting("replies to each prompt; null: 1 with gae, else 4", unit="replies", ge=1)] = None
    max_tokens: Annotated[int, setting("longest reply", unit="tokens", ge=1)] = 128
    epochs: Annotated[int, setting("passes over the replies of an iteration", unit="passes", ge=1)] = 4
    beta: Annotated[
        float | None,
        setting(
            "what a nat of log(π/π_ref) costs; null: 0.05, or 0 where loss.beta ties to the reference", unit="per nat", ge=0
        ),
    ] = None
    kl_target: Annotated[
        float | None, setting("KL to which β is steered (Ziegler et al., 2019); null: β is fixed", unit="nats a reply", gt=0)
    ] = None
    kl_gain: Annotated[float, setting("how fast β is steered to kl_target", unit="per iteration", gt=0)] = 0.1
    gamma: Annotated[float, setting("gae: discount of a later token's reward; 1: none", ge=0, le=1)] = 1.0
    lam: Annotated[float, setting("gae: λ; 1: rewards as they came, 0: the critic is believed", ge=0, le=1)] = 0.95
    whiten: Annotated[
        bool | None, setting("advantages to mean 0, deviation 1 over the tokens of an iteration's replies; null: with gae")
    ] = None
    scale: Annotated[bool, setting("grpo: divide by the deviation within a prompt's replies")] = True

    def resolved(self, objective: str, record: str, loss_beta: float) -> Rollout:
        """Each `null` that is a rule replaced by its value, for an objective on `record` whose own β is `loss_beta`."""
        estimator = self.estimator or _OF_OBJECTIVE.get(objective) or _OF_RECORD[record]
        chosen = {
            "estimator": estimator,
            "n": self.n or (1 if estimator == "gae" else 4),
            "beta": self.beta if self.beta is not None else 0.0 if loss_beta else _BETA,
            "whiten": self.whiten if self.whiten is not None else estimator == "gae",
        }
        return self.model_copy(update=chosen)


class Reward(Section):
    """What a reply earns: the score of a model or of a rule (one of them is required for ppo, rloo and grpo)."""

    model: Annotated[
        Text | None, setting("run, folder or hub id of a reward model: any sequence classifier with one output")
    ] = None
    rule: Annotated[Text | None, setting("a function of prompt and reply that gives a number, as FILE.py:FUNCTION")] = None
    template: Annotated[Text | None, setting("chat template of the reward model, as `template`; null: its own")] = None
    no_end: Annotated[
        float, setting("taken from the score of a reply that is cut at rollout.max_tokens", unit="reward", ge=0)
    ] = 1.0
    normalize: Annotated[
        bool, setting("scores to mean 0, deviation 1 over all that were given so far; β then weighs those")
    ] = False
    clip: Annotated[float, setting("scores are cut to ± this, after normalize; 0: not at all", unit="reward", ge=0)] = 0.0


class Critic(Section):
    """With gae: the model that says at each token what the reply will earn. It learns beside the policy and is not exported."""

    model: Annotated[
        Text | None, setting("what it starts from; null: reward.model where it reads the same tokens, else the policy")
    ] = None
    lr: Annotated[float, setting("its peak learning rate", unit="per step", gt=0)] = 1e-5
    clip: Annotated[float, setting("how far a value may go from the old one and still gain; 0: any far", ge=0)] = 0.2
