"""Tiny models of many architectures, random trees, and the textbook.

The textbook is one plain forward per response with the model's own attention, log_softmax of all its logits, and a gather.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from preftune.data.types import Branch, Pair, Tree

VOCAB = 61
_SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": None}
_MOE = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
_WINDOWS = ["sliding_attention", "full_attention"]

# name -> (configuration class, what differs from _SMALL)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-dynamic-rope": ("LlamaConfig", {"rope_parameters": _DYNAMIC}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "mistral-no-window": ("MistralConfig", {"sliding_window": None}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 5, "layer_types": _WINDOWS, "attn_logit_softcapping": 2.0,
                                "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 5, "layer_types": _WINDOWS, "query_pre_attn_scalar": 24}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", {}),
    "phi3-longrope": ("Phi3Config", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None, **_MOE}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, **_MOE}),
    "cohere": ("CohereConfig", {"logit_scale": 0.3}),
    "granite": ("GraniteConfig", {"logits_scaling": 1.7, "attention_multiplier": 0.3, "residual_multiplier": 0.6,
                                  "embedding_multiplier": 1.3}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", _GPT),
    "opt": ("OPTConfig", {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0, "layerdrop": 0.0}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "sliding_window": 5, "layer_types": _WINDOWS, **_MOE}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "falcon-alibi": ("FalconConfig", {"alibi": True, "new_decoder_architecture": False, "multi_query": True}),
    "mamba": ("MambaConfig", {"state_size": 4}),
}  # fmt: skip
_KV = {"bloom", "falcon-alibi", "gpt-neox", "opt", "mamba", "gpt2"}


def config(name: str, **changes: Any) -> Any:
    """A fresh configuration, shared with nothing."""
    import transformers

    kind, own = ARCHITECTURES[name]
    values = {} if own is _GPT else dict(_SMALL)
    if name in _KV:
        values.pop("num_key_value_heads", None)
    own = {**own, **changes}
    experts = own.pop("experts_implementation", None)
    made = getattr(transformers, kind)(**copy.deepcopy({**values, **own}))
    if experts:
        made._experts_implementation = experts
    return made


def model(name: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A tiny model whose weights are large enough that every token matters to every later one."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(config(name, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in made.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "A_log" in key or key.endswith(".D") or "dt_proj" in key:
                p += 0.1 * noise
            elif p.ndim >= 2:
                p.copy_(noise * (0.3 if "embed" not in key and "wte" not in key else 0.7))
            else:
                p.copy_(noise * 0.2 + float("norm" in key or "ln_" in key) * (0.0 if "bias" in key or "gemma" in name else 1.0))
    return made.to(dtype).eval()


class Float64(TorchFunctionMode):
    """Inside, what a model computes in float32 whatever its dtype (norms, router and attention softmax) stays float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "float":
            func, args = torch.Tensor.double, args[:1]
        elif name in {"to", "type"}:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def textbook(model: Any, trees: Sequence[Tree], *, read_last: bool = True) -> Tensor:
    """[S] log-probs of the scored tokens: prompt + response alone, no padding, log_softmax of all logits, gather.

    The last token of a response predicts nothing that is scored. Whether it is read matters to LongRoPE alone.
    """
    parts = []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.from_numpy(np.concatenate([tree.prompt, branch.ids]).astype(np.int64))[None]
            read = ids if read_last else ids[:, :-1]
            logps = model(input_ids=read, use_cache=False).logits[0].log_softmax(-1)
            at = torch.from_numpy(np.flatnonzero(branch.scored)) + len(tree.prompt)
            parts.append(logps[at - 1, ids[0, at]])
    return torch.cat(parts)


def oracle(model: Any) -> Any:
    """A copy of the model, its configuration too, with eager attention."""
    twin = copy.deepcopy(model)
    if twin._can_set_attn_implementation():
        twin.set_attn_implementation("eager")
    return twin


def random_tree(
    rng: np.random.Generator, *, prompt: int, lengths: Sequence[int], scored: float = 1.0, name: str = "t", pairs: bool = True
) -> Tree:
    """A prompt of `prompt` tokens and a branch of each length; each token is scored with probability `scored`."""

    def ids(n: int) -> Any:
        return rng.integers(0, VOCAB, n).astype(np.int32)

    branches = []
    for n in lengths:
        mask = rng.random(n) < scored
        if n and not mask.any():
            mask[rng.integers(n)] = True
        branches.append(Branch(ids(n), mask))
    pair = (Pair(0, 1),) if pairs and len(lengths) > 1 else ()
    return Tree(name, ids(prompt), tuple(branches), pair)


def forest(seed: int = 0, *, n: int = 4, k: int = 2, longest: int = 9, scored: float = 1.0) -> list[Tree]:
    """`n` random trees of `k` branches."""
    rng = np.random.default_rng(seed)
    return [
        random_tree(
            rng, prompt=int(rng.integers(1, longest)), lengths=rng.integers(1, longest, k).tolist(), scored=scored, name=f"t{i}"
        )
        for i in range(n)
    ]


_TOKEN = st.integers(0, VOCAB - 1)
Plain = list[tuple[list[int], list[tuple[list[int], list[bool]]]]]


def forests(*, k: tuple[int, int] = (1, 4), empty: bool = False) -> st.SearchStrategy[Plain]:
    """One to four random trees of k branches, some partly scored, as plain lists for `grow`; with `empty` some have no token.

    The records themselves are made in the test: where annotations are checked, the checks draw random numbers, which hypothesis
    does not allow inside a strategy.
    """
    length = st.integers(0 if empty else 1, 7)

    def branch(n: int) -> st.SearchStrategy[tuple[list[int], list[bool]]]:
        some = st.lists(st.booleans(), min_size=n, max_size=n)
        return st.tuples(st.lists(_TOKEN, min_size=n, max_size=n), st.just([True] * n) | some)

    branches = st.lists(length.flatmap(branch), min_size=k[0], max_size=k[1])
    return st.lists(st.tuples(st.lists(_TOKEN, min_size=1, max_size=6), branches), min_size=1, max_size=4)


def grow(plain: Plain) -> list[Tree]:
    """The trees of `forests`; the first of two branches is preferred."""
    trees = []
    for i, (prompt, parts) in enumerate(plain):
        branches = tuple(Branch(np.array(ids, np.int32), np.array(scored, np.bool_)) for ids, scored in parts)
        pairs = (Pair(0, 1),) if len(branches) > 1 else ()
        trees.append(Tree(f"t{i}", np.array(prompt, np.int32), branches, pairs))
    return trees


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradient of each parameter by name, zeros where there is none; cleared afterwards."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            p.grad = None
    return found


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference over all tensors of `a` and `b`, relative to the largest entry of `b`."""
    assert a.keys() == b.keys()
    scale = max(float(x.abs().max()) for x in b.values())
    return max(float((a[n] - b[n]).abs().max()) for n in b) / scale
