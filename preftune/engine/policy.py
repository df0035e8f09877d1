"""Log-probabilities of a forest under a Hugging Face model: one wrapping module whose forward is the scoring.

    policy = Policy.choose(model, trees)          # measures which path is exact for this model, and says why
    logps = policy(batch)                         # [S] nats, one per scored token, differentiable

Three paths, the fastest exact one is taken:

    forest + own head      the prompt once, no padding, logits only where something is scored, never held whole
    rows + own head        padded rows for a model whose layers the forest does not model
    rows + model's head    the model's own forward, logits and all: the definition
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from preftune.data.types import Tree
from preftune.engine.attention import FOREST, Forest, Unmodelled, register
from preftune.engine.batch import Batch, Layout, pack
from preftune.engine.head import HeadShape, token_logps
from preftune.errors import ModelError
from preftune.model.lora import plain


@dataclass(frozen=True, slots=True)
class Path:
    """How a model is scored, and the sentence for the log that says why."""

    layout: Layout
    head: Literal["own", "model"]
    why: str = ""


class Policy(nn.Module):
    """A language model as a scorer of forests. `model` is the Hugging Face (or PEFT) model, shared and not copied."""

    def __init__(self, model: Any, path: Path, *, autocast: torch.dtype | None = None) -> None:
        """`autocast` is the dtype of matrix products in the forward pass (weights keep theirs); None for none."""
        super().__init__()
        self.model = model
        self.path = path
        self.autocast = autocast
        self.head_shape = head_shape(plain(model).config)
        register()
        inference = getattr(model, "_preftune_inference_attention", "sdpa")
        plain(model).set_attn_implementation(FOREST if path.layout == "forest" else inference)

    def forward(self, batch: Batch) -> Float[Tensor, "S"]:
        """Log-probability in nats of every scored token of the batch, in the batch's order."""
        device = next(self.parameters()).device
        with torch.autocast(device.type, self.autocast) if self.autocast else nullcontext():
            if self.path.head == "model":
                return self._model_logps(batch)
            hidden = self._hidden(batch).flatten(0, 1).index_select(0, batch.source)
        # outside autocast: the head decides its own precision
        head = plain(self.model).get_output_embeddings()
        return token_logps(hidden, head.weight, batch.target, bias=head.bias, shape=self.head_shape)

    def _hidden(self, batch: Batch) -> Float[Tensor, "N T D"]:
        body = plain(self.model).base_model
        if self.path.layout == "forest":
            out = body(input_ids=batch.tokens, position_ids=batch.position, use_cache=False, forest=Forest(batch))
        else:
            out = body(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden.to(self.autocast) if self.autocast else hidden

    def _model_logps(self, batch: Batch) -> Float[Tensor, "S"]:
        logits = self.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
        chosen = logits.flatten(0, 1).index_select(0, batch.source)
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        logps: Tensor = chosen.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
        return logps

    def pack(self, trees: Sequence[Tree]) -> Batch:
        """Trees in the layout of this policy's path, on its device."""
        return pack(trees, layout=self.path.layout).to(next(self.parameters()).device)

    def adapter_off(self) -> AbstractContextManager[None]:
        """The reference: the same weights without the adapters. Only for a LoRA policy."""
        return self.model.disable_adapter()  # type: ignore[no-any-return]

    @classmethod
    def choose(cls, model: Any, trees: Sequence[Tree], *, autocast: torch.dtype | None = None) -> Policy:
        """The fastest path that gives the model's own log-probs on a real batch (the longest and shortest of `trees`).

        Raises ModelError when even padded rows do not give finite log-probs.
        """
        probe = _probe(trees)
        definition = cls(model, Path("rows", "model"), autocast=autocast)
        expected = _score(definition, probe)
        if not bool(torch.isfinite(expected).all()):
            raise ModelError(
                "the model gives log-probs that are not finite: its weights are broken, or the precision is too low"
            )
        reasons = []
        layouts: tuple[Layout, ...] = ("forest", "rows")
        for layout in layouts:
            try:
                policy = cls(model, Path(layout, "own"), autocast=autocast)
                off = float((_score(policy, probe) - expected).abs().max())
            except _CANNOT as error:
                reasons.append(f"{layout}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                continue
            if off <= tolerance(expected):
                why = f"{layout} path, largest difference from the model's own forward {off:.1e} nats per token"
                return cls(model, Path(layout, "own", "; ".join([why, *reasons])), autocast=autocast)
            reasons.append(f"{layout}: log-probs differ by {off:.1e} nats")
        return cls(
            model, Path("rows", "model", "; ".join(["the model's own forward on padded rows", *reasons])), autocast=autocast
        )


_CANNOT = (Unmodelled, TypeError, ValueError, AttributeError, RuntimeError, IndexError, NotImplementedError)


def tolerance(logps: Float[Tensor, "S"]) -> float:
    """Largest difference per token that rounding explains, in nats: of float64, float32, or of a bf16 forward pass."""
    if logps.dtype == torch.float64:
        return 1e-9
    return 1e-3 * max(1.0, float(logps.abs().max()) / 20)


def head_shape(config: Any) -> HeadShape:
    """Scale and soft-cap of the logits, by the names that transformers' configurations give them."""
    config = config.get_text_config()
    scale = 1.0
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere multiplies
        scale *= float(factor)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite divides
        scale /= float(divisor)
    return HeadShape(scale, getattr(config, "final_logit_softcapping", None))


def response_sums(logps: Float[Tensor, "S"], owner: Int[Tensor, "S"], n_responses: int) -> Float[Tensor, "R"]:
    """log π(y|x) of each response: the sum of its tokens' log-probs, in nats."""
    return logps.new_zeros(n_responses).index_add(0, owner, logps)


def _probe(trees: Sequence[Tree]) -> list[Tree]:
    """The longest two trees (they exercise windows and positions) and the shortest, of the first 1000."""
    ordered = sorted(trees[:1000], key=lambda t: t.n_tokens)
    return [ordered[0], *ordered[1:][-2:]]


def _score(policy: Policy, trees: Sequence[Tree]) -> Float[Tensor, "S"]:
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            logps: Tensor = policy(policy.pack(trees))
            return logps
    finally:
        policy.train(was_training)
