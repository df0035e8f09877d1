"""How a model is fed while it decodes: padded or not, with a cache or not, whichever is exact for its architecture.

reader = measured_reader(model, prompts, max_tokens=64, pad_id=0)
logits = reader.start(prompts)          # [row, vocab] after the last token of each
logits = reader.step(tokens)            # one more token a row
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from preftune.model.lora import autocast_of, plain

log = logging.getLogger(__name__)


def context(model: nn.Module) -> int | None:
    """Most tokens that the model can read, None where its architecture sets no limit."""
    limit = getattr(plain(model).config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit and limit > 0 else None


class Feeding(NamedTuple):
    """How a model is fed."""

    padded: bool  # prompts of unequal length share a batch; else only prompts of equal length do
    cached: bool  # a step feeds one token a row; else the whole sequence again


class Reader:
    """Feeds a batch of sequences to a model and gives the logits after the last token of each."""

    def __init__(self, model: nn.Module, path: Feeding, pad_id: int) -> None:
        """`pad_id` fills the padding, which is masked."""
        self.model, self.path, self.pad_id = model, path, pad_id
        self.base, self.context = plain(model), context(model)
        self.cache: Any = None
        self.autocast = autocast_of(model)
        self.device = self.base.get_input_embeddings().weight.device
        self.accepts = inspect.signature(self.base.forward).parameters

    @torch.inference_mode()
    def start(self, prompts: Sequence[NDArray[np.int32]]) -> Float[Tensor, "row vocab"]:
        """Forget what was, and read prompts, one a row."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.base.config) if self.path.cached else None
        length = np.array([len(p) for p in prompts])
        ids = np.full((len(prompts), int(length.max())), self.pad_id, np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[len(row) - len(prompt) :] = prompt
        real = torch.from_numpy(np.arange(ids.shape[1]) >= (ids.shape[1] - length)[:, None]).to(self.device)
        self.ids = torch.from_numpy(ids).to(self.device)  # [row, token] what a forward feeds
        self.real = None if bool(real.all()) else real.long()  # [row, token so far] 0 where it is padding
        self.position = (real.cumsum(-1) - 1).clamp(min=0)  # [row, token]
        return self._forward()

    def keep(self, rows: NDArray[np.int64]) -> Int[Tensor, "row"]:
        """From now on hold these rows, repeated or left out as wanted; returns them as an index."""
        index = torch.from_numpy(rows).to(self.device)
        if self.cache is not None:
            self.cache.reorder_cache(index)  # the one selection of rows that every kind of cache layer has
        self.ids, self.position = self.ids[index], self.position[index]
        self.real = None if self.real is None else self.real[index]
        return index

    @torch.inference_mode()
    def step(self, token: Int[Tensor, "row"]) -> Float[Tensor, "row vocab"]:
        """Append a token to every row."""
        token = token.to(self.device)[:, None]
        # A row that is finished but still held may run past the last position: what it computes there is thrown away.
        position = (self.position[:, -1:] + 1).clamp(max=(self.context or 2**31) - 1)
        if self.cache is None:
            self.ids, self.position = torch.cat([self.ids, token], 1), torch.cat([self.position, position], 1)
        else:
            self.ids, self.position = token, position
        if self.real is not None:
            self.real = torch.cat([self.real, torch.ones_like(token)], 1)
        return self._forward()

    def _forward(self) -> Float[Tensor, "row vocab"]:
        arguments: dict[str, Any] = {"input_ids": self.ids, "position_ids": self.position, "use_cache": self.cache is not None}
        if self.real is not None:
            arguments["attention_mask"] = self.real
        if self.cache is not None:  # state-space models call theirs cache_params
            arguments["cache_params" if "cache_params" in self.accepts else "past_key_values"] = self.cache
        arguments["logits_to_keep"] = 1
        # An architecture that takes no positions needs none. One that takes no mask or no cache computes something else without
        # them, which `measured_reader` notices.
        with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
            logits: Tensor = self.model(**{name: value for name, value in arguments.items() if name in self.accepts}).logits
        return logits[:, -1]


_EXACT: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], bool]] = WeakKeyDictionary()  # what was measured before


def measured_reader(model: nn.Module, prompts: Sequence[NDArray[np.int32]], *, max_tokens: int, pad_id: int) -> Reader:
    """The fastest reader that computes what a plain forward of each sequence alone does; the log says when it is a slow one."""
    base = plain(model)
    slow = Reader(model, Feeding(padded=False, cached=False), pad_id)  # exact by definition
    rope = getattr(base.config.get_text_config(), "rope_parameters", None) or {}
    trained = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and trained and max(map(len, prompts)) + max_tokens > trained:
        log.warning("replies are sampled without a cache: past %d tokens this model changes all its rotations", trained)
        return slow
    exact = _EXACT.setdefault(model, {})
    for path in (Feeding(padded=True, cached=True), Feeding(padded=False, cached=True)):
        reader = Reader(model, path, pad_id)
        case = (path, base.config._attn_implementation, next(model.parameters()).dtype)
        if case not in exact:
            why_not = _inexact(reader, slow, prompts[0])
            exact[case] = not why_not
            if why_not:
                log.warning("%s is sampled more slowly, not with %s: %s", type(base).__name__, path, why_not)
        if exact[case]:
            return reader
    return slow


def _inexact(reader: Reader, plain: Reader, prompt: NDArray[np.int32]) -> str:
    """Why `reader` does not compute what `plain` does, "" where it does: measured on two short sequences, a few steps.

    The measure is the mean of |Δ log-prob| over the next token, in nats. What is the same mathematics differs by rounding.
    Sequences this short do not reach beyond a sliding window: that those are exact is for the tests to show.
    """
    n_steps = 3
    longest = max(1, min(12, (reader.context or 2**31) - n_steps))
    short = max(1, longest - 5) if reader.path.padded else longest
    rows = [np.resize(prompt, longest + n_steps), np.resize(prompt[::-1], short + n_steps)]
    try:
        fed = [reader.start([row[:-n_steps] for row in rows[::-1]])]
        fed[0] = fed[0][reader.keep(np.array([1, 0]))]  # the cache has to follow its rows too
        for t in range(-n_steps, 0):
            fed.append(reader.step(torch.tensor([int(row[t]) for row in rows])))
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as refusal:
        return f"its code refuses ({type(refusal).__name__}: {refusal})"  # what other people's code raises is theirs to choose
    worst = 0.0
    for n, ids in enumerate(rows):
        for t, logits in enumerate(fed):
            expected = plain.start([ids[: len(ids) - n_steps + t]])[0].double().cpu().log_softmax(-1)
            difference = (logits[n].double().cpu().log_softmax(-1) - expected).abs()
            worst = max(worst, float((expected.exp() * difference).sum()))
    products = reader.autocast or next(reader.model.parameters()).dtype
    bound = 1e-4 if products in (torch.float32, torch.float64) else 0.1
    return "" if worst <= bound else f"log-probs differ by {worst:.2g} nats, which rounding (up to {bound}) does not explain"
