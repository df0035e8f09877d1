"""Scores of a forest's responses under a reward model: a transformer with one number at each response's last token.

    reward = RewardModel.choose(model, trees)     # measures which path gives the model's own scores
    scores = reward(batch)                        # [R] one per response, differentiable

The number is `score(h)`, h the hidden state at the last token of prompt + response (Ziegler et al., 2019, arXiv 1909.08593,
section 2.1), which is what transformers' `…ForSequenceClassification` computes for a row whose last token is not padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.data.types import Tree
from preftune.engine.batch import Batch, alone, pack
from preftune.engine.distribution import Predictions
from preftune.engine.policy import Policy
from preftune.errors import ModelError
from preftune.model.lora import plain


class RewardModel(Policy):
    """A sequence-classification model with one output as a scorer of forests; its paths are those of `Policy`."""

    def forward(
        self, batch: Batch, *, as_packed: bool = False, beside: Sequence[Callable[[Predictions], Tensor]] = ()
    ) -> Float[Tensor, "R"]:
        """The score of every response of the batch, in the batch's order; float32, or float64 for a float64 model."""
        assert not beside, "a reward model predicts no tokens"
        if self.path.alone or self._rotations_differ(batch):
            return torch.cat([self._scores(alone(batch, response)) for response in range(batch.n_responses)])
        return self._scores(batch)

    def _scores(self, batch: Batch) -> Float[Tensor, "R"]:
        device = next(self.parameters()).device
        with torch.autocast(device.type, self.autocast) if self.autocast else nullcontext():
            scores = self._own_scores(batch) if self.path.head == "model" else self._hidden(batch, batch.last)
        if self.path.head == "own":  # outside autocast: a score keeps the digits that its head has
            head = plain(self.model).score
            scores = head(scores.to(head.weight.dtype))
        return scores[:, 0].to(torch.promote_types(scores.dtype, torch.float32))

    def _own_scores(self, batch: Batch) -> Float[Tensor, "R 1"]:
        tokens, pad = batch.tokens, plain(self.model).config.pad_token_id
        if batch.mask is not None and pad is not None:  # the model finds a row's last token by what is no padding
            tokens = tokens.masked_fill(~batch.mask, pad)
        scores: Tensor = self.model(input_ids=tokens, attention_mask=batch.mask, use_cache=False).logits
        return scores

    def pack(self, trees: Sequence[Tree]) -> Batch:
        """Trees in the layout of this model's path, on its device, each response to its last token."""
        return pack(trees, layout=self.path.layout, read_last=True).to(next(self.parameters()).device)


class ValueModel(RewardModel):
    """A critic: the same number at every place from which a token is predicted, where it says what the reply will earn."""

    @classmethod
    def choose(cls, model: Any, trees: Sequence[Tree], *, autocast: torch.dtype | None = None) -> ValueModel:
        """On the fastest path that gives the model's own score of a whole reply. Raises ModelError where none has our head."""
        found = RewardModel.choose(model, trees, autocast=autocast)
        if found.path.head == "model" or found.path.alone:
            raise ModelError(f"this architecture cannot be a critic, only its own forward is exact: {found.path.why}")
        return cls(model, found.path, autocast=autocast)

    def forward(
        self, batch: Batch, *, as_packed: bool = False, beside: Sequence[Callable[[Predictions], Tensor]] = ()
    ) -> Float[Tensor, "S"]:
        """The value before every scored token of the batch, in the batch's order; float32, or float64 for a float64 model."""
        assert not beside, "a critic predicts no tokens"
        if self._rotations_differ(batch):
            return torch.cat([self(alone(batch, response)) for response in range(batch.n_responses)])
        with self._casting():
            hidden = self._hidden(batch, batch.source)
        head = plain(self.model).score
        values: Tensor = head(hidden.to(head.weight.dtype))[:, 0]
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def pack(self, trees: Sequence[Tree]) -> Batch:
        """Trees in the layout of this model's path, on its device; a reply's last token is followed by nothing to expect."""
        return Policy.pack(self, trees)
