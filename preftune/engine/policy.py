"""Log-probabilities of a forest under a Hugging Face model: one wrapping module whose forward is the scoring.

    policy = Policy.choose(model, trees)          # measures which path is exact for this model, and says why
    logps = policy(batch)                         # [S] nats, one per scored token, differentiable

Four paths, the fastest exact one is taken:

    forest + own head      the prompt once, no padding, logits only where something is scored, never held whole
    rows + own head        padded rows for a model whose layers the forest does not model
    rows + model's head    the model's own forward on padded rows, logits and all
    alone + model's head   the same, each prompt + response by itself: the definition
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from preftune.data.types import Branch, Tree
from preftune.engine.attention import FOREST, Forest
from preftune.engine.backends import CANNOT, Measured, available, fastest, register
from preftune.engine.batch import Batch, Layout, alone, even_rows, pack, rows_of
from preftune.engine.distribution import Predictions
from preftune.engine.fused import use_fused
from preftune.engine.head import HeadShape, token_logps
from preftune.engine.narrow import use_narrow
from preftune.errors import ModelError
from preftune.model.attention import own_attention
from preftune.model.lora import plain


@dataclass(frozen=True, slots=True)
class Path:
    """How a model is scored, and the sentence for the log that says why."""

    layout: Layout
    head: Literal["own", "model"]
    why: str = ""
    alone: bool = False  # one response at a time
    attention: str = FOREST  # of a forest: which of `backends`


class Policy(nn.Module):
    """A language model as a scorer of forests. `model` is the Hugging Face (or PEFT) model, shared and not copied."""

    def __init__(self, model: Any, path: Path, *, autocast: torch.dtype | None = None) -> None:
        """`autocast` is the dtype of matrix products in the forward pass (weights keep theirs); None for none."""
        super().__init__()
        self.training = bool(model.training)
        self.model = model
        if path.head == "own" and hasattr(plain(model).get_output_embeddings(), "base_layer"):
            path = Path("rows", "model", f"the model's own forward on padded rows: its head carries an adapter; {path.why}")
        self.path = path
        self.autocast = autocast
        self.head_shape = head_shape(plain(model).config)
        register()
        wanted = path.attention if path.layout == "forest" else own_attention(model)
        if wanted != plain(model).config._attn_implementation:
            plain(model).set_attn_implementation(wanted)
        on_cpu = next(model.parameters()).device.type == "cpu"
        use_fused(model, path.head == "own" and on_cpu)
        use_narrow(model, path.layout == "forest" and on_cpu)
        self._longest_together = _longest_together(plain(model).config)

    def forward(
        self, batch: Batch, *, as_packed: bool = False, beside: Sequence[Callable[[Predictions], Tensor]] = ()
    ) -> Float[Tensor, "*n S"]:
        """Log-probability in nats of every scored token of the batch, in the batch's order.

        Rows of very different width are read in several passes, so that what is read is little more than the tokens that the
        planner counts; `as_packed`: in one, so that a measurement sees all the padding.

        beside: functions of the distributions at the scored tokens; with n of them the result is [1 + n, S].
        """
        if beside:
            found = self.predictions(batch)
            return torch.stack([_token_logps(found, batch.target), *(function(found) for function in beside)])
        if self.path.alone or self._rotations_differ(batch):
            return torch.cat([self._logps(alone(batch, response)) for response in range(batch.n_responses)])
        if self.path.layout == "rows" and not as_packed and len(groups := even_rows(batch)) > 1:
            parts, scored = zip(*(rows_of(batch, rows) for rows in groups), strict=True)
            return torch.cat([self._logps(part) for part in parts])[torch.cat(scored).argsort()]
        return self._logps(batch)

    def _rotations_differ(self, batch: Batch) -> bool:
        if self._longest_together is None:
            return False
        longest = max(span.prompt + max(span.branches, default=0) for span in batch.spans)  # known without asking the device
        return longest > self._longest_together

    def predictions(self, batch: Batch) -> Predictions:
        """The distributions at the scored tokens, in the batch's order."""
        if not (self.path.alone or self._rotations_differ(batch)):
            return self._predictions(batch)
        parts = [self._predictions(alone(batch, response)) for response in range(batch.n_responses)]
        return parts[0]._replace(hidden=torch.cat([part.hidden for part in parts]))

    def _predictions(self, batch: Batch) -> Predictions:
        with self._casting():
            if self.path.head == "model":
                logits = self.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
                return Predictions(logits.flatten(0, 1).index_select(0, batch.source), None, None, HeadShape())
            hidden = self._hidden(batch, batch.source)
        head = plain(self.model).get_output_embeddings()
        return Predictions(hidden, head.weight, head.bias, self.head_shape)

    def _logps(self, batch: Batch) -> Float[Tensor, "S"]:
        return _token_logps(self._predictions(batch), batch.target)

    def _casting(self) -> AbstractContextManager[object]:
        return torch.autocast(next(self.parameters()).device.type, self.autocast) if self.autocast else nullcontext()

    def _hidden(self, batch: Batch, read: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        """The last hidden states at these flat indices; at others they need not be computed."""
        body = plain(self.model).base_model
        if self.path.layout == "forest":
            out = body(input_ids=batch.tokens, position_ids=batch.position, use_cache=False, forest=Forest(batch, read))
        else:
            out = body(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        hidden: Tensor = out.last_hidden_state.flatten(0, 1).index_select(0, read)
        return hidden.to(self.autocast) if self.autocast else hidden

    def pack(self, trees: Sequence[Tree]) -> Batch:
        """Trees in the layout of this policy's path, on its device."""
        return pack(trees, layout=self.path.layout).to(next(self.parameters()).device)

    def tokens_read(self, tree: Tree) -> int:
        """Tokens that one pass over this tree reads: in a forest the prompt once, in padded rows once a response."""
        if self.path.layout == "forest":
            return tree.n_tokens
        return len(tree.branches) * (len(tree.prompt) + max(len(b.ids) for b in tree.branches))

    def adapter_off(self) -> AbstractContextManager[None]:
        """The reference: the same weights without the adapters. Only for a LoRA policy."""
        return self.model.disable_adapter()  # type: ignore[no-any-return]

    @classmethod
    def choose(cls, model: Any, trees: Sequence[Tree], *, autocast: torch.dtype | None = None) -> Policy:
        """The fastest path that gives the model's own log-probs on a real batch (the longest and shortest of `trees`).

        Raises ModelError when even padded rows do not give finite log-probs.
        """
        probe = _probe(trees)
        # what is measured is the architecture, so without the rounding of an autocast
        expected = _score(cls(model, _DEFINITION), probe)
        if not bool(torch.isfinite(expected).all()):
            raise ModelError(
                "the model gives log-probs that are not finite: its weights are broken, or the precision is too low"
            )
        reasons: list[str] = []
        allowed = tolerance(expected, next(model.parameters()).dtype)
        for path in (Path("forest", "own"), Path("rows", "own"), Path("rows", "model")):
            name = f"{path.layout} with {'our' if path.head == 'own' else 'its'} head"
            try:
                off = float((_score(cls(model, path), probe) - expected).abs().max())
            except CANNOT as error:
                reasons.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                continue
            if off <= allowed:
                why = f"{name}, largest difference from the model's own forward {off:.1e} nats per token"
                path = replace(path, why="; ".join([why, *reasons]))
                return cls(model, _with_attention(cls, model, path, probe, autocast), autocast=autocast)
            reasons.append(f"{name}: log-probs differ by {off:.1e} nats")
        why = "; ".join(["one response at a time, by the model's own forward", *reasons])
        return cls(model, replace(_DEFINITION, why=why), autocast=autocast)


_DEFINITION = Path("rows", "model", alone=True)


def _token_logps(found: Predictions, target: Int[Tensor, "S"]) -> Float[Tensor, "S"]:
    """Log-prob of each target; outside autocast, since the head decides its own precision."""
    if found.weight is not None:
        return token_logps(found.hidden, found.weight, target, bias=found.bias, shape=found.shape)
    logits = found.hidden.to(torch.promote_types(found.hidden.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def tolerance(logps: Float[Tensor, "S"], computed_in: torch.dtype) -> float:
    """Largest difference per token that rounding explains where matrix products are in `computed_in`, in nats."""
    if computed_in == torch.float64:
        return 1e-9
    bound = 1e-3 if computed_in == torch.float32 else 0.3
    return bound * max(1.0, float(logps.abs().max()) / 20 if len(logps) else 0.0)


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
    """log π(y|x) of each response: the sum of its tokens' log-probs, in nats, in float64.

    A sum of thousands of nats has a last place of 2e-4 nats in float32, and a loss is a difference of such sums.
    """
    return logps.new_zeros(n_responses, dtype=torch.float64).index_add(0, owner, logps.double())


def _longest_together(config: Any) -> int | None:
    """Longest sequence, in tokens, up to which a model's rotations do not depend on what else is in the batch; None: any.

    LongRoPE has two sets of rotations and picks one by the longest sequence of a forward pass (transformers'
    `dynamic_rope_update`), so beyond this length responses are scored one by one. A dynamic RoPE changes only beyond the
    model's context, which no example exceeds.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    found = [r.get("original_max_position_embeddings") for r in _dicts(rope) if r.get("rope_type") == "longrope"]
    return min((int(n) for n in found if n), default=None)


def _dicts(nested: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration's rotations: one set, or one per kind of layer."""
    yield nested
    for value in nested.values():
        if isinstance(value, dict):
            yield value


def _probe(trees: Sequence[Tree]) -> list[Tree]:
    """The shortest tree, the two with the longest sequences (they exercise windows and positions), and one of two branches.

    The last is the shortest turned round: also where all the data is one example, or has one response each, what leaks from a
    tree or a branch into the next shows.
    """

    def length(tree: Tree) -> int:
        return len(tree.prompt) + max(len(b.ids) for b in tree.branches)

    shortest = min(trees, key=length)
    ids, scored = shortest.branches[0]
    turned = Tree("", shortest.prompt[::-1], (Branch(ids[::-1], scored[::-1]), Branch(ids, scored)))
    return [shortest, *heapq.nlargest(2, trees, key=length), turned]


def _score(policy: Policy, trees: Sequence[Tree]) -> Float[Tensor, "S"]:
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            logps: Tensor = policy(policy.pack(trees), as_packed=True)
            return logps
    finally:
        policy.train(was_training)


def _with_attention(kind: type[Policy], model: Any, path: Path, probe: Sequence[Tree], autocast: torch.dtype | None) -> Path:
    """`path` with the fastest attention that is exact in the precision of the run."""
    backends = available(next(model.parameters()).device) if path.layout == "forest" else []
    if not backends:
        return path
    small = [probe[0], probe[-1]]  # a gradient holds on to every layer

    def measure(name: str) -> Measured:
        policy = kind(model, replace(path, attention=name), autocast=autocast)
        return Measured(_score(policy, probe), _embedding_gradient(policy, small))

    name, why = fastest(backends, measure)
    return replace(path, attention=name, why=f"{path.why}; attention: {why}")


def _embedding_gradient(policy: Policy, trees: Sequence[Tree]) -> Float[Tensor, "N T D"]:
    """Gradient of a weighted sum of the log-probs with respect to the embedded tokens: it has passed through every layer."""
    cut: list[Tensor] = []

    def leaf(module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
        cut.append(embedded.detach().requires_grad_())
        return cut[-1]

    was_training = policy.training
    policy.eval()
    hook = plain(policy.model).get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            logps = policy(policy.pack(trees), as_packed=True)
            weight = torch.linspace(-1, 2, len(logps), device=logps.device, dtype=logps.dtype)
            return torch.autograd.grad((logps * weight).sum(), cut)[0]
    finally:
        hook.remove()
        policy.train(was_training)
