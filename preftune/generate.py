"""Responses from a local Hugging Face causal language model: prompts as token ids in, replies as token ids out.

    >>> replies = sample(model, [prompt_ids], Sampling(n=4, max_tokens=64, seed=1), stop_ids={end_of_turn})
    >>> replies[0][2].ids, replies[0][2].ended
    (array([17, 5, 2], dtype=int32), True)

The text of a reply depends on the weights, the prompt and the `Sampling`, and on nothing else: token t of sample k of a
prompt is the inverse of the next-token distribution at a uniform number that comes from (seed, prompt, k, t) alone. Batch size,
the order of the prompts and their number change no reply, except where rounding moves a probability across that number: about
once in a million tokens in float32, far more often in bfloat16.

Decoding is a loop of our own over the model's forward. Each prompt is read once and its cache shared by its samples, prompts
are padded on the left, and rows that are finished leave the batch. Whether an architecture computes the same with padding and
with a cache is measured (`engine.decode`), never assumed; one that does not is served without, more slowly.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from preftune.engine.decode import Reader, context, measured_reader
from preftune.errors import ConfigError, DataError, ModelError, listing
from preftune.model.attention import inference_attention
from preftune.model.lora import plain


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. Truncations apply after the temperature, in the order top_k, top_p, min_p.

    n:                 replies per prompt.
    temperature:       divides the logits; 0 takes the most likely token always.
    top_p:             keep the fewest most likely tokens that hold this fraction of the probability; 1 keeps all.
    top_k:             keep this many most likely tokens; 0 keeps all.
    min_p:             keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    max_tokens:        longest reply, in tokens, the stop token included.
    seed:              same seed, same text.
    tokens_per_batch:  prompt and reply tokens that are held at once; 0 decides by the model's size and the memory.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    tokens_per_batch: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError that lists every value out of range."""
        expected = {
            "n": (self.n >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0 (0: off)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "tokens_per_batch": (self.tokens_per_batch >= 0, "at least 0 (0: automatic)"),
        }
        bad = [f"{name}={getattr(self, name)}: expected {range_}" for name, (good, range_) in expected.items() if not good]
        if bad:
            raise ConfigError("sampling settings are out of range:\n" + listing(bad))


class Reply(NamedTuple):
    """One sampled response."""

    ids: NDArray[np.int32]  # [L] token ids, the stop token included where the reply ended by itself
    logp: NDArray[np.float32]  # [L] nats, under the model's own distribution: no temperature, nothing truncated
    ended: bool  # True: by a stop token; False: cut at max_tokens or at the end of the model's context


def sample(
    model: nn.Module,
    prompts: Sequence[NDArray[np.int32]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    pad_id: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[Reply]]:
    """`sampling.n` replies to each prompt, as [prompt][sample]. A prompt that occurs twice gets different replies.

    `pad_id` fills the padding, which is masked: any id of the vocabulary does. `on_progress(done, total)` counts replies, batch
    by batch. The model's training flags and its attention implementation are as before when this returns.

    Raises DataError for a prompt that is empty, outside the vocabulary or leaves no room in the model's context, ModelError
    where the model's log-probs are not finite.
    """
    if not prompts:
        return []
    _check_prompts(model, prompts)
    drawn = 1 if sampling.temperature == 0 else sampling.n  # greedy replies to one prompt are all the same
    rows: list[_Row] = []
    seen: Counter[bytes] = Counter()
    for i in range(len(prompts)):
        content = prompts[i].tobytes()
        rows += [_Row(i, _key(sampling.seed, prompts[i], seen[content], k)) for k in range(drawn)]
        seen[content] += 1
    rows.sort(key=lambda row: -len(prompts[row.prompt]))  # the largest batch first: one that does not fit fails at once
    replies: list[list[Reply]] = [[] for _ in prompts]
    n_done = 0
    with _inference(model):
        reader = measured_reader(model, prompts, max_tokens=sampling.max_tokens, pad_id=pad_id)
        for batch in _batches(rows, prompts, reader, sampling):
            for row, reply in zip(batch, _decode(reader, prompts, batch, sampling, stop_ids), strict=True):
                replies[row.prompt] += [reply] * (sampling.n // drawn)
            n_done += len(batch) * (sampling.n // drawn)
            if on_progress:
                on_progress(n_done, len(prompts) * sampling.n)
    return replies


def stream(
    model: nn.Module,
    prompt_ids: NDArray[np.int32],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    decode: Callable[[Sequence[int]], str],
) -> Iterator[str]:
    """The first reply that `sample` would give, in pieces of text as they come, the stop token left out; for a terminal.

    A piece never ends within a character: bytes that are no whole character yet wait for the next token. The model stays in
    inference mode until the iterator is exhausted or closed. Raises as `sample` does.
    """
    _check_prompts(model, [prompt_ids])
    ids: list[int] = []
    shown = text = ""
    with _inference(model):
        reader = measured_reader(model, [prompt_ids], max_tokens=sampling.max_tokens, pad_id=0)
        row = _Row(0, _key(sampling.seed, prompt_ids, 0, 0))
        for _, tokens, _ in _steps(reader, [prompt_ids], [row], sampling, stop_ids):
            if int(tokens[0]) in stop_ids:
                break
            ids.append(int(tokens[0]))
            text = decode(ids)  # always from the start: what a token reads as depends on those before it
            if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                if len(text) > len(shown):
                    yield text[len(shown) :]
                shown = text
    if len(text) > len(shown):  # bytes that never became a character: what `decode` makes of the whole reply
        yield text[len(shown) :]


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and inference attention inside; every module's own training flag afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with inference_attention(model):
            yield
    finally:
        for module, flag in training:
            module.training = flag


def _check_prompts(model: nn.Module, prompts: Sequence[NDArray[np.int32]]) -> None:
    limit, vocabulary = context(model), int(plain(model).config.get_text_config().vocab_size)
    problems = []
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            problems.append(f"prompt {i} is empty: expected at least one token")
        elif limit is not None and len(prompt) >= limit:
            problems.append(f"prompt {i} has {len(prompt)} tokens: the model's context holds {limit}, the reply included")
        elif prompt.min() < 0 or prompt.max() >= vocabulary:
            problems.append(f"prompt {i} has token ids {prompt.min()}…{prompt.max()}: the model knows 0…{vocabulary - 1}")
    if problems:
        raise DataError("prompts that the model cannot answer; shorten them or leave them out:\n" + listing(problems))


class _Row(NamedTuple):
    """One reply to draw."""

    prompt: int  # index of the prompt
    key: int  # of the generator of its uniform numbers


def _key(seed: int, prompt: NDArray[np.int32], occurrence: int, k: int) -> int:
    """128 bits, the same on every machine; `occurrence` counts the same prompt earlier in the list."""
    content = f"{seed}/{occurrence}/{k}/".encode() + prompt.astype("<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")


def _uniforms(key: int, n: int) -> NDArray[np.float64]:
    """The first n numbers of a sequence; so far below 1 that multiplying by a sum keeps them below that sum."""
    return np.random.Generator(np.random.Philox(key=key)).random(n) * (1 - 2.0**-50)


def _batches(
    rows: list[_Row], prompts: Sequence[NDArray[np.int32]], reader: Reader, sampling: Sampling
) -> Iterator[list[_Row]]:
    """Neighbouring rows that fit in memory together.

    What a token takes is its keys and values in all layers; what a row takes is the vocabulary, a few times in float64, while
    its next token is drawn. The last caps are where larger batches stopped being faster for tiny models.
    """
    config, weight = reader.base.config.get_text_config(), next(reader.model.parameters())
    cuda = weight.device.type == "cuda"
    memory = torch.cuda.mem_get_info(weight.device)[0] // 2 if cuda else 2**30  # bytes
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    n_states = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    max_tokens = sampling.tokens_per_batch or min(memory // (n_states * weight.element_size()), 2**20 if cuda else 2**15)
    max_rows = max(1, min(memory // (40 * config.vocab_size), 4096))
    batch: list[_Row] = []
    longest = 0
    for row in rows:
        length = len(prompts[row.prompt])
        full = len(batch) >= max_rows or (len(batch) + 1) * (longest + sampling.max_tokens) > max_tokens
        if batch and (full or (length != longest and not reader.path.padded)):
            yield batch
            batch = []
        longest = longest if batch else length
        batch.append(row)
    yield batch


def _decode(
    reader: Reader, prompts: Sequence[NDArray[np.int32]], batch: list[_Row], sampling: Sampling, stop_ids: Collection[int]
) -> list[Reply]:
    """The replies of one batch, in its order."""
    ids = np.zeros((len(batch), sampling.max_tokens), np.int32)
    logps = np.zeros((len(batch), sampling.max_tokens), np.float32)
    length = np.zeros(len(batch), np.int64)
    for rows, tokens, logp in _steps(reader, prompts, batch, sampling, stop_ids):
        ids[rows, length[rows]] = tokens
        logps[rows, length[rows]] = logp
        length[rows] += 1
    ended = np.isin(ids[np.arange(len(batch)), length - 1], list(stop_ids))
    return [Reply(ids[r, :n].copy(), logps[r, :n].copy(), bool(ended[r])) for r, n in enumerate(length)]


def _steps(
    reader: Reader, prompts: Sequence[NDArray[np.int32]], batch: list[_Row], sampling: Sampling, stop_ids: Collection[int]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]]:
    """Per step: the rows of the batch that still go on, their new token, its log-prob."""
    place = {i: n for n, i in enumerate(dict.fromkeys(row.prompt for row in batch))}  # each prompt is read once
    room = [sampling.max_tokens if reader.context is None else reader.context - len(prompts[row.prompt]) for row in batch]
    limit = np.minimum(room, sampling.max_tokens)
    uniform = np.stack([_uniforms(row.key, int(limit.max())) for row in batch])
    stop = list(stop_ids)
    logits = reader.start([prompts[i] for i in place])
    logits = logits[reader.keep(np.array([place[row.prompt] for row in batch]))]
    rows, going = np.arange(len(batch)), np.ones(len(batch), bool)
    for t in range(int(limit.max())):
        token, token_logp = _draw(logits, torch.from_numpy(uniform[rows, t]), sampling)
        tokens, logp = token.cpu().numpy().astype(np.int32), token_logp.cpu().numpy()
        if not np.isfinite(logp).all():
            raise ModelError(
                "the model's next-token log-probs are NaN or infinite: its weights are damaged, or this dtype overflows; "
                "expected finite numbers (try float32)"
            )
        yield rows[going], tokens[going], logp[going]
        going &= ~np.isin(tokens, stop) & (t + 1 < limit[rows])
        if not going.any():
            return
        if going.mean() <= 0.8:  # to leave costs a copy of the cache, to stay costs a row of each step
            token = token[reader.keep(np.flatnonzero(going)).to(token.device)]
            rows, going = rows[going], going[going]
        logits = reader.step(token)


@torch.inference_mode()
def _draw(
    logits: Float[Tensor, "row vocab"], uniform: Float[Tensor, "row"], sampling: Sampling
) -> tuple[Int[Tensor, "row"], Float[Tensor, "row"]]:
    """The next token of each row, and its log-prob under the model's own distribution."""
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    logp = logits.float().log_softmax(-1)
    if sampling.temperature == 0:
        token = logp.argmax(-1)
    else:
        # Float64, in the order of token ids: the cumulative sum of a large vocabulary is then exact to far below the rounding
        # of the logits, so that which batch a row is in hardly moves a boundary.
        cumulative = _truncated((logits.double() / sampling.temperature).softmax(-1), sampling).cumsum(-1)
        target = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)  # NaN: past the end
    return token, logp.gather(-1, token[:, None])[:, 0]


def _truncated(p: Float[Tensor, "row vocab"], sampling: Sampling, *, n_ranked: int = 1024) -> Float[Tensor, "row vocab"]:
    """Probabilities with 0 for the tokens that top_k, top_p and min_p exclude; not normalised.

    Only the `n_ranked` most likely tokens are put in order, since sorting a large vocabulary can take longer than the model's
    forward; rows so flat that top_p needs more of them are sorted whole.
    """
    likely = p >= sampling.min_p * p.amax(-1, keepdim=True)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return p.where(likely, 0)
    kept, token = p.topk(min(sampling.top_k or n_ranked, p.shape[-1]))  # most likely first
    mass = (kept if sampling.top_k else p).sum(-1, keepdim=True)
    flat = (kept.sum(-1, keepdim=True) < sampling.top_p * mass)[:, 0]
    if sampling.top_p < 1:
        before = kept.cumsum(-1) - kept  # mass of the more likely ones; the token that crosses the bound is kept
        kept = kept.where(before < sampling.top_p * mass, 0)
    truncated = torch.zeros_like(p).scatter(-1, token, kept).where(likely, 0)
    if n_ranked < p.shape[-1] and bool(flat.any()):
        truncated[flat] = _truncated(p[flat], sampling, n_ranked=p.shape[-1])
    return truncated
