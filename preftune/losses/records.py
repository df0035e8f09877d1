"""What an objective can ask for. The type of its first argument says what has to be computed for it.

Every field is a tensor over *units*: the objective returns one value per unit, and the step divides their sum by the number
of units in the whole step. Log-probs are in nats, lengths in scored tokens. `logp_sum` is log π(y|x) of a whole response.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Tokens(NamedTuple):
    """SFT. The unit is a scored token."""

    logp: Float[Tensor, "token"]


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
