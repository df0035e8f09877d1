"""Held-out prompts: a prompt belongs to one side, with all of its examples.

    >>> train, held_out = split_by_prompt(examples, 0.1, seed=0)

A prompt's side follows from (seed, prompt) alone: its hash, a number from 0 to 1, is below `fraction` or it is not. So rows
that are added, removed or moved never change the side of another prompt, as a shuffle or a ranking would. The price is that
the share is met on average only: of n prompts, n·fraction ± sqrt(n·fraction·(1-fraction)).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from preftune.data.types import Example
from preftune.errors import ConfigError


def split_by_prompt(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, eval), in the order of `examples`, with `Example.split` set.

    With fraction 0, or a single prompt, all is for training. Else each side has at least one prompt: where the threshold leaves
    a side empty (few prompts), the prompt with the hash nearest to it goes over.

    Raises:
        ConfigError: `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"eval.fraction is {fraction}, expected a fraction from 0 up to, not including, 1")
    keys = [e.prompt_key for e in examples]
    place = {key: _unit(seed, key) for key in keys}
    held_out = {key for key, at in place.items() if at < fraction}
    if fraction > 0 and len(place) > 1:
        if not held_out:
            held_out = {min(place, key=lambda key: (place[key], key))}
        elif len(held_out) == len(place):
            held_out -= {max(place, key=lambda key: (place[key], key))}
    else:
        held_out = set()
    train = [replace(e, split="train") for e, key in zip(examples, keys, strict=True) if key not in held_out]
    evaluation = [replace(e, split="eval") for e, key in zip(examples, keys, strict=True) if key in held_out]
    return train, evaluation


def leaked_prompts(train: Iterable[Example], evaluation: Iterable[Example]) -> list[Example]:
    """The evaluation examples whose prompt also stands in the training data; their metrics flatter the model."""
    trained = {e.prompt_key for e in train}
    return [e for e in evaluation if e.prompt_key in trained]


def _unit(seed: int, key: str) -> float:
    """A number in [0, 1) that follows from the seed and the prompt alone."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
