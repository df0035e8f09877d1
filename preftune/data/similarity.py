"""How alike texts are: the overlap of their character n-grams, and how varied several texts are.

>>> similarity("the cat sat", "the cat sat!")
0.875
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

N_GRAM = 5
"""Characters: long enough that two texts of one language share few by chance."""


def similarity(a: str, b: str) -> float:
    """Jaccard overlap of the sets of character 5-grams, white space counted as one space; 1 for texts with the same set."""
    if a == b:
        return 1.0
    one, other = _grams(a), _grams(b)
    return len(one & other) / len(one | other)


def mean_similarity(texts: Sequence[str]) -> float | None:
    """Mean over all pairs; None for fewer than two texts."""
    pairs = list(itertools.combinations(texts, 2))
    return sum(similarity(a, b) for a, b in pairs) / len(pairs) if pairs else None


def distinct(texts: Sequence[str], n: int) -> float | None:
    """distinct-n (Li et al. 2016, arXiv 1510.03055): different word n-grams over all of them; None where there are none."""
    grams = [tuple(words[k : k + n]) for words in map(str.split, texts) for k in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def _grams(text: str) -> set[str]:
    flat = " ".join(text.split())
    return {flat[k : k + N_GRAM] for k in range(max(1, len(flat) - N_GRAM + 1))}
