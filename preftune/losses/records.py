"""What an objective can ask for, and what it gives back.

An objective is a pure function. Its positional arguments are records, and their types say what has to be computed for it;
its keyword-only arguments are its parameters; its return type says what can be logged of it:

    def dpo(pairs: RefPairs, *, beta: float = 0.1) -> PairLoss: ...
    def dpo_soft(pairs: RefPairs, sure: Confidence, *, beta: float = 0.1) -> PairLoss: ...
    def aot(pairs: WholeStep[RefPairs], *, beta: float = 0.1) -> PairLoss: ...
    def kto(labels: Labels, other: WholeStep[Mismatched], *, beta: float = 0.1) -> ResponseLoss: ...

The first record holds the *units*: the objective gives one loss per unit, and the step divides their sum by the number of
units in the whole step. Further records stand beside it, in the same order of units. Log-probs are in nats, lengths in scored
tokens; `logp_sum` is log π(y|x) of a whole response, `logp_mean` the same per scored token.

`WholeStep[R]` is R over all units of the optimizer step: all micro-batches, all ranks, in one order. As the first argument it
carries gradients; as a later one it does not, like any statistic that a loss takes as given.

A modifier is a function of the same kind that composes with every objective on `RefPairs`: one that returns `RefPairs` puts
it in the place of the record that the objective sees (so its log-ratios become others); one that returns a tensor over pairs
multiplies the losses by it. Its parameters stand beside those of the objective (`loss.ld_alpha`), so their names are unique
among all; with the defaults a modifier does nothing, and is left out:

    def ld(pairs: RefPairs, prefixes: Prefixes, *, ld_alpha: float = 1.0) -> RefPairs: ...
    def wpo(pairs: RefPairs, on_policy: OnPolicy, *, wpo: bool = False) -> Float[Tensor, "pair"]: ...

The first line of an objective's docstring names its source; `preftune config --loss NAME` shows it.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple, TypeVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

Record = TypeVar("Record")
WHOLE_STEP = "whole step"
WholeStep = Annotated[Record, WHOLE_STEP]
"""A record over all units of an optimizer step, however the step is cut into micro-batches and ranks."""


class Tokens(NamedTuple):
    """SFT. The unit is a scored token; of preferences, those of the chosen responses."""

    logp: Float[Tensor, "token"]


class Pairs(NamedTuple):
    """A chosen and a rejected response, no reference (ORPO, SimPO, CPO). The unit is a pair."""

    chosen_logp_sum: Float[Tensor, "pair"]
    rejected_logp_sum: Float[Tensor, "pair"]
    chosen_n_tokens: Float[Tensor, "pair"]
    rejected_n_tokens: Float[Tensor, "pair"]

    @property
    def chosen_logp_mean(self) -> Float[Tensor, "pair"]:
        """log π(y_w|x) / |y_w|, nats per token; 0 for a response without scored tokens."""
        return self.chosen_logp_sum / self.chosen_n_tokens.clamp(min=1)

    @property
    def rejected_logp_mean(self) -> Float[Tensor, "pair"]:
        """log π(y_l|x) / |y_l|, nats per token; 0 for a response without scored tokens."""
        return self.rejected_logp_sum / self.rejected_n_tokens.clamp(min=1)


class RefPairs(NamedTuple):
    """DPO and its family: a chosen and a rejected response, and the same under the frozen reference. The unit is a pair."""

    chosen_logp_sum: Float[Tensor, "pair"]
    rejected_logp_sum: Float[Tensor, "pair"]
    ref_chosen_logp_sum: Float[Tensor, "pair"]
    ref_rejected_logp_sum: Float[Tensor, "pair"]
    chosen_n_tokens: Float[Tensor, "pair"]
    rejected_n_tokens: Float[Tensor, "pair"]

    @property
    def chosen_log_ratio(self) -> Float[Tensor, "pair"]:
        """log π(y_w|x) − log π_ref(y_w|x), nats."""
        return self.chosen_logp_sum - self.ref_chosen_logp_sum

    @property
    def rejected_log_ratio(self) -> Float[Tensor, "pair"]:
        """log π(y_l|x) − log π_ref(y_l|x), nats."""
        return self.rejected_logp_sum - self.ref_rejected_logp_sum

    @property
    def chosen_log_ratio_mean(self) -> Float[Tensor, "pair"]:
        """The log-ratio of the chosen per scored token, nats; 0 for a response without scored tokens."""
        return self.chosen_log_ratio / self.chosen_n_tokens.clamp(min=1)

    @property
    def rejected_log_ratio_mean(self) -> Float[Tensor, "pair"]:
        """The log-ratio of the rejected per scored token, nats; 0 for a response without scored tokens."""
        return self.rejected_log_ratio / self.rejected_n_tokens.clamp(min=1)


class Labels(NamedTuple):
    """Responses that are good or bad by themselves, with a reference (KTO, BCO). The unit is a response."""

    logp_sum: Float[Tensor, "response"]
    ref_logp_sum: Float[Tensor, "response"]
    n_tokens: Float[Tensor, "response"]
    desirable: Bool[Tensor, "response"]

    @property
    def log_ratio(self) -> Float[Tensor, "response"]:
        """log π(y|x) − log π_ref(y|x), nats."""
        return self.logp_sum - self.ref_logp_sum


class Ranked(NamedTuple):
    """Lists of responses to one prompt, best first, with a reference (Plackett–Luce). The unit is a list.

    The responses of all lists stand one after another: first the `list_size[0]` of the first list, then those of the next.
    """

    logp_sum: Float[Tensor, "response"]
    ref_logp_sum: Float[Tensor, "response"]
    n_tokens: Float[Tensor, "response"]
    list_size: Int[Tensor, "list"]

    @property
    def log_ratio(self) -> Float[Tensor, "response"]:
        """log π(y|x) − log π_ref(y|x), nats."""
        return self.logp_sum - self.ref_logp_sum


class Scores(NamedTuple):
    """Reward model: the scalar head at the last token of the chosen and of the rejected. The unit is a pair."""

    chosen_score: Float[Tensor, "pair"]
    rejected_score: Float[Tensor, "pair"]


class Rollout(NamedTuple):
    """Replies that the policy wrote itself, token by token (PPO). The unit is a scored token.

    `old_logp` is log π_old, of the policy as it was when it wrote them; the advantage is given, without gradient.
    """

    logp: Float[Tensor, "token"]
    old_logp: Float[Tensor, "token"]
    advantage: Float[Tensor, "token"]


class Replies(NamedTuple):
    """Replies that the policy wrote itself, each judged as a whole (RLOO, GRPO). The unit is a response.

    The tokens of all replies stand one after another: first the `n_tokens[0]` of the first, then those of the next.
    """

    logp: Float[Tensor, "token"]
    old_logp: Float[Tensor, "token"]
    ref_logp: Float[Tensor, "token"]
    n_tokens: Int[Tensor, "response"]
    advantage: Float[Tensor, "response"]


class Values(NamedTuple):
    """What a critic expects at each token of a reply, and what came (PPO with GAE). The unit is a scored token."""

    value: Float[Tensor, "token"]
    old_value: Float[Tensor, "token"]
    returns: Float[Tensor, "token"]


class Confidence(NamedTuple):
    """How sure the data are that the chosen is better: above 0.5, to 1. Beside a record of pairs; 1 where they do not say."""

    confidence: Float[Tensor, "pair"]


class Margin(NamedTuple):
    """Score of the chosen minus score of the rejected in the data's own unit. Beside a record of pairs; 0 if not said."""

    margin: Float[Tensor, "pair"]


class Prefixes(NamedTuple):
    """The same sums as in RefPairs, over the first min(|y_w|, |y_l|) scored tokens of both (LD-DPO). Beside `RefPairs`."""

    chosen_logp_sum: Float[Tensor, "pair"]
    rejected_logp_sum: Float[Tensor, "pair"]
    ref_chosen_logp_sum: Float[Tensor, "pair"]
    ref_rejected_logp_sum: Float[Tensor, "pair"]


class SequentialKL(NamedTuple):
    """Σ_t KL(π_ref(·|x, y_<t) ‖ π(·|x, y_<t)) over the scored tokens, nats, with gradient (TDPO). Beside `RefPairs`."""

    chosen_kl: Float[Tensor, "pair"]
    rejected_kl: Float[Tensor, "pair"]


class OnPolicy(NamedTuple):
    """Mean over a response's scored tokens of log π(y_t) − log Σ_v π(v)², nats, without gradient (WPO). Beside `RefPairs`."""

    chosen_logp_mean: Float[Tensor, "pair"]
    rejected_logp_mean: Float[Tensor, "pair"]


class Mismatched(NamedTuple):
    """log π(y'|x) − log π_ref(y'|x) of responses y' to *other* prompts, nats, without gradient: KTO's estimate of the KL.

    One for each example, in no relation to the units. Its type is always asked for as `WholeStep[Mismatched]`.
    """

    log_ratio: Float[Tensor, "example"]


class PairLoss(NamedTuple):
    """What an objective on pairs returns: the loss, and the implicit rewards that it compares, in the objective's own sense.

    Metrics are read off these rewards, so that accuracy and loss never disagree about who wins: per-token means where the
    objective uses means, after a divergence where one is set. The chosen wins where its reward is larger.
    """

    loss: Float[Tensor, "pair"]
    chosen_reward: Float[Tensor, "pair"]
    rejected_reward: Float[Tensor, "pair"]


class ResponseLoss(NamedTuple):
    """What an objective on `Labels` or `Ranked` returns: the loss per unit, and the implicit reward of every response."""

    loss: Float[Tensor, "unit"]
    reward: Float[Tensor, "response"]


class ClippedLoss(NamedTuple):
    """What an objective on rollouts returns: the loss per unit; log(π/π_old) of each token or reply, and if it is clipped."""

    loss: Float[Tensor, "unit"]
    log_ratio: Float[Tensor, "ratio"]
    clipped: Bool[Tensor, "ratio"]
