"""Records from a batch's log-probs: what each of them is made of, and how the parts of a step become one.

A record is built exactly where an objective asks for it; nothing else is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.engine.batch import Batch, Units
from preftune.engine.policy import response_sums
from preftune.losses import records
from preftune.losses.objective import Records
from preftune.training.dist import Ranks


class Known(NamedTuple):
    """What is known of the policy's own replies before a step, token by token: what it said then, and what came of it."""

    old_logp: Float[Tensor, "S"]
    advantage: Float[Tensor, "S"]  # of a reply as a whole: the same at each of its tokens
    value: Float[Tensor, "S"]  # 0 without a critic
    returns: Float[Tensor, "S"]


class Scored:
    """A batch with its log-probs, and what follows from them for each response."""

    def __init__(
        self,
        batch: Batch,
        logps: Float[Tensor, "S"],
        ref_logps: Float[Tensor, "S"] | None,
        beside: Records | None = None,
        known: Known | None = None,
    ) -> None:
        """`ref_logps` are those of the reference, None where nothing asks for them.

        From a reward model `logps` are its scores, one for each response; from a critic its values, one for each token.

        beside: per scored token what a record of the whole distributions is made of, by that record.
        known:  of the policy's own replies.
        """
        assert batch.units is not None, "a part of a batch has no units"
        self.batch = batch
        self.units: Units = batch.units
        self.logps = logps
        self._ref_logps = ref_logps
        self._beside = beside or {}
        self._known = known

    @property
    def has_reference(self) -> bool:
        """Whether the log-probs of a reference are there."""
        return self._ref_logps is not None

    @property
    def ref_logps(self) -> Float[Tensor, "S"]:
        """Log-probs of the frozen reference in the dtype of the policy's."""
        assert self._ref_logps is not None, "the objective needs a reference"
        return self._ref_logps.to(self.logps.dtype)

    @property
    def known(self) -> Known:
        """What is known of these replies, which the policy wrote."""
        assert self._known is not None, "the objective needs the policy's own replies"
        return self._known

    @cached_property
    def logp_sum(self) -> Float[Tensor, "R"]:
        """log π(y|x) of each response."""
        return response_sums(self.logps, self.batch.owner, self.batch.n_responses)

    @cached_property
    def ref_logp_sum(self) -> Float[Tensor, "R"]:
        """log π_ref(y|x) of each response."""
        return response_sums(self.ref_logps, self.batch.owner, self.batch.n_responses)

    @cached_property
    def n_tokens(self) -> Float[Tensor, "R"]:
        """Scored tokens of each response."""
        return self.batch.n_scored.to(self.logps.dtype)

    def response_sum(self, record: type) -> Float[Tensor, "R"]:
        """Sum over each response of what is there for `record`."""
        return response_sums(self._beside[record], self.batch.owner, self.batch.n_responses)

    def of_pairs(self, values: Float[Tensor, "R"]) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """Values of the winners and of the losers."""
        winner, loser = self.units.pairs.unbind(1)
        return values[winner], values[loser]


def _tokens(scored: Scored) -> records.Tokens:
    shown = scored.units.shown
    return records.Tokens(scored.logps if len(shown) == len(scored.logps) else scored.logps[shown])


def _pairs(scored: Scored) -> records.Pairs:
    return records.Pairs(*scored.of_pairs(scored.logp_sum), *scored.of_pairs(scored.n_tokens))


def _ref_pairs(scored: Scored) -> records.RefPairs:
    sums, ref, n = (scored.of_pairs(x) for x in (scored.logp_sum, scored.ref_logp_sum, scored.n_tokens))
    return records.RefPairs(*sums, *ref, *n)


def _labels(scored: Scored) -> records.Labels:
    at = scored.units.labelled
    return records.Labels(scored.logp_sum[at], scored.ref_logp_sum[at], scored.n_tokens[at], scored.units.desirable)


def _ranked(scored: Scored) -> records.Ranked:
    at = scored.units.ranked
    return records.Ranked(scored.logp_sum[at], scored.ref_logp_sum[at], scored.n_tokens[at], scored.units.list_size)


def _scores(scored: Scored) -> records.Scores:
    return records.Scores(*scored.of_pairs(scored.logps))


def _confidence(scored: Scored) -> records.Confidence:
    return records.Confidence(scored.units.confidence.to(scored.logps.dtype))


def _margin(scored: Scored) -> records.Margin:
    return records.Margin(scored.units.margin.to(scored.logps.dtype))


def _mismatched(scored: Scored) -> records.Mismatched:
    return records.Mismatched(scored.logp_sum - scored.ref_logp_sum)


def _prefixes(scored: Scored) -> records.Prefixes:
    n_scored = scored.batch.n_scored
    first = n_scored.cumsum(0) - n_scored
    winner, loser = scored.units.pairs.unbind(1)
    length = torch.minimum(n_scored[winner], n_scored[loser])
    pair = torch.repeat_interleave(length)  # [shared tokens] the pair of each
    within = torch.arange(len(pair), device=pair.device) - (length.cumsum(0) - length)[pair]

    def sums(logps: Tensor, side: Tensor) -> Tensor:
        return response_sums(logps[first[side][pair] + within], pair, len(length))

    policy, ref = ([sums(x, side) for side in (winner, loser)] for x in (scored.logps, scored.ref_logps))
    return records.Prefixes(*policy, *ref)


def _sequential_kl(scored: Scored) -> records.SequentialKL:
    return records.SequentialKL(*scored.of_pairs(scored.response_sum(records.SequentialKL)))


def _on_policy(scored: Scored) -> records.OnPolicy:
    sums = scored.logp_sum.detach() - scored.response_sum(records.OnPolicy)
    return records.OnPolicy(*scored.of_pairs(sums / scored.n_tokens.clamp(min=1)))


def _rollout(scored: Scored) -> records.Rollout:
    return records.Rollout(scored.logps, scored.known.old_logp, scored.known.advantage)


def _replies(scored: Scored) -> records.Replies:
    n_tokens, known = scored.batch.n_scored, scored.known
    first = n_tokens.cumsum(0) - n_tokens
    return records.Replies(scored.logps, known.old_logp, scored.ref_logps, n_tokens, known.advantage[first])


def _values(scored: Scored) -> records.Values:
    return records.Values(scored.logps, scored.known.value, scored.known.returns)


BUILD: Mapping[type, Callable[[Scored], Any]] = {
    records.Tokens: _tokens,
    records.Pairs: _pairs,
    records.RefPairs: _ref_pairs,
    records.Labels: _labels,
    records.Ranked: _ranked,
    records.Scores: _scores,
    records.Confidence: _confidence,
    records.Margin: _margin,
    records.Mismatched: _mismatched,
    records.Prefixes: _prefixes,
    records.SequentialKL: _sequential_kl,
    records.OnPolicy: _on_policy,
    records.Rollout: _rollout,
    records.Replies: _replies,
    records.Values: _values,
}
"""How each record is built."""


def build(asked: Collection[type], scored: Scored) -> Records:
    """The records that are asked for."""
    return {record: BUILD[record](scored) for record in asked}


class Whole:
    """Records of a whole step, those of all micro-batches of all ranks one after another, and where this rank's stand."""

    def __init__(self, parts: Sequence[Records], ranks: Ranks) -> None:
        """`parts`: the records of each micro-batch of this rank, of the same types."""
        self.records: dict[type, Any] = {}
        self._spans: dict[type, list[list[slice]]] = {}  # per field, one of each micro-batch
        for record in sorted(parts[0], key=lambda r: r.__name__):  # ranks meet here: in one order on all of them
            fields, self._spans[record] = [], []
            for mine in zip(*(part[record] for part in parts), strict=True):
                everyone = ranks.gather(torch.cat([f.detach() for f in mine]))
                edges = accumulate((len(f) for f in mine), initial=sum(map(len, everyone[: ranks.rank])))
                self._spans[record].append([slice(a, b) for a, b in pairwise(edges)])
                fields.append(torch.cat(everyone))
            self.records[record] = record(*fields)

    def span(self, record: type, i: int, field: int = 0) -> slice:
        """Where micro-batch `i` of this rank stands in a field of a record."""
        return self._spans[record][field][i]
