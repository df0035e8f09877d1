"""Models of published shapes with random weights, and token trees with made-up lengths: nothing is downloaded or read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from preftune.config import Lora
from preftune.data.types import Branch, Pair, Tree
from preftune.model.lora import add_lora, cast_frozen

SEED, LORA_RANK = 0, 16


@dataclass(frozen=True)
class Shape:
    """A decoder: which family's code runs it, and its sizes."""

    family: str
    hidden: int
    layers: int
    heads: int
    groups: int  # heads of keys and values
    inner: int
    vocabulary: int
    tied: bool


MODELS = {
    "0.5B": Shape("qwen2", 896, 24, 14, 2, 4864, 151_936, True),  # Qwen2.5-0.5B
    "1.5B": Shape("qwen2", 1536, 28, 12, 2, 8960, 151_936, True),  # Qwen2.5-1.5B
    "7B": Shape("qwen2", 3584, 28, 28, 4, 18944, 152_064, False),  # Qwen2.5-7B
    "8B": Shape("llama", 4096, 32, 32, 8, 14336, 128_256, False),  # Llama-3.1-8B
}
TINY = Shape("llama", 32, 2, 4, 2, 64, 512, False)


@dataclass(frozen=True)
class Lengths:
    """Quantiles of the lengths in tokens, of the prompt and of an answer; straight lines between them."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LENGTHS = {
    "hh": Lengths(prompt=(8, 30, 80, 160, 280, 520, 760), answer=(2, 8, 20, 40, 75, 150, 240)),  # long prompts, short answers
    "long": Lengths(prompt=(6, 12, 20, 35, 60, 200, 300), answer=(10, 80, 250, 420, 560, 680, 720)),  # the other way round
}
TINY_LENGTHS = {
    name: Lengths(*(tuple(max(2, n // 16) for n in q) for q in (x.prompt, x.answer))) for name, x in LENGTHS.items()
}


def describe_lengths(lengths: dict[str, Lengths]) -> dict[str, Any]:
    return {name: {"quantiles": QUANTILES, "prompt": x.prompt, "answer": x.answer} for name, x in lengths.items()}


def make_trees(lengths: Lengths, n: int, *, vocabulary: int, longest: int) -> list[Tree]:
    """Pairs of random tokens; no prompt + answer is longer than `longest`."""
    rng = np.random.default_rng(SEED)

    def draw(quantiles: tuple[int, ...]) -> int:
        return int(np.interp(rng.random(), QUANTILES, quantiles))

    def ids(n_tokens: int) -> Any:
        return rng.integers(0, vocabulary, n_tokens).astype(np.int32)

    trees = []
    for i in range(n):
        n_prompt = draw(lengths.prompt)
        answers = [min(draw(lengths.answer), longest - n_prompt) for _ in range(2)]
        branches = tuple(Branch(ids(k), np.ones(k, np.bool_)) for k in answers)
        trees.append(Tree(str(i), ids(n_prompt), branches, (Pair(0, 1),)))
    return trees


def make_model(shape: Shape, device: torch.device, *, longest: int) -> Any:
    """A model of this shape in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    configuration, architecture = {
        "llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[shape.family]  # fmt: skip
    torch.manual_seed(SEED)
    with torch.device(device):
        model: Any = architecture(configuration(
            hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups, intermediate_size=shape.inner, vocab_size=shape.vocabulary,
            tie_word_embeddings=shape.tied, max_position_embeddings=max(4096, longest), use_cache=False,
        )).train()  # fmt: skip
    model._preftune_inference_attention = "sdpa"
    return model


def with_adapters(model: Any) -> Any:
    """LoRA on all linear layers, over a frozen base whose matrices are in bf16."""
    adapted = add_lora(model, Lora(r=LORA_RANK), base="random", seed=SEED).to(model.device)
    cast_frozen(adapted, torch.bfloat16)
    return adapted
