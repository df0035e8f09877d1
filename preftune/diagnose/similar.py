"""Near-duplicate texts in linear time: word sequences, MinHash signatures, buckets, and an exact look at each candidate.

    >>> near_duplicates(shingles(["a b c d", "a b c d e", "x y z"], 2), 0.7)
    [Link(a=0, b=1, similarity=0.75)]

Broder 1997 ("On the resemblance and containment of documents"): the chance that two signatures agree in a place is the
Jaccard similarity of the sets. With 16 bands of 4 places a pair of similarity 0.8 is a candidate with probability 0.9998, one
of 0.5 with 0.64; candidates are then compared exactly, so no link is below the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.diagnose.corpus import stable_hash, words

BANDS, ROWS = 16, 4
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: places of a sequence get different weights


class Link(NamedTuple):
    """Texts `a` < `b` and their Jaccard similarity."""

    a: int
    b: int
    similarity: float


class Hasher:
    """The hashes of a text's words; each word is hashed once."""

    def __init__(self) -> None:
        """Knows no word yet."""
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> NDArray[np.uint64]:
        """[W] one hash per word, in order."""
        known, said = self._known, words(text)
        for word in said:
            if word not in known:
                known[word] = stable_hash(word)
        return np.array([known[word] for word in said], np.uint64)


def shingles(texts: Sequence[str], n: int) -> list[NDArray[np.uint64]]:
    """Per text the sorted hashes of its different sequences of `n` words; of a shorter text the hash of the whole."""
    hasher = Hasher()
    return [np.unique(sequences(hasher(text), n)) for text in texts]


def sequences(ids: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """[max(W - n + 1, 1)] a hash of every `n` neighbours of [W] word hashes; [0] for no word."""
    n = min(n, len(ids))
    if n == 0:
        return ids
    found = np.zeros(len(ids) - n + 1, np.uint64)
    for at in range(n):
        found = found * _ODD + ids[at : len(ids) - n + 1 + at]
    mixed: NDArray[np.uint64] = (found ^ (found >> np.uint64(31))) * _ODD
    return mixed


def signatures(sets: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """[D, 64] minima of 64 seeded hash functions over each set, none of them empty."""
    starts = np.cumsum([0, *map(len, sets)])[:-1]
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = rng.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)
    found = np.empty((len(sets), BANDS * ROWS), np.uint64)
    block = 20_000  # sets at a time, so that memory stays small
    for begin in range(0, len(sets), block):
        part = np.concatenate(sets[begin : begin + block])
        where = starts[begin : begin + block] - starts[begin]
        for k, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
            hashed = part * factor + offset
            found[begin : begin + block, k] = np.minimum.reduceat(hashed ^ (hashed >> np.uint64(32)), where)
    return found


def near_duplicates(sets: Sequence[NDArray[np.uint64]], threshold: float) -> list[Link]:
    """Links from each set to an earlier one of at least this similarity, one at most per set; empty sets have none.

    Within a bucket a set is compared with the first one only, so a bucket of n costs n.
    """
    filled = [i for i, one in enumerate(sets) if len(one)]
    if len(filled) < 2:
        return []
    marks = signatures([sets[i] for i in filled])
    best: dict[int, Link] = {}
    for band in range(BANDS):
        part = marks[:, band * ROWS : (band + 1) * ROWS]
        first: dict[bytes, int] = {}
        for row, i in enumerate(filled):
            j = first.setdefault(part[row].tobytes(), i)
            if j == i or (i in best and best[i].a == j):
                continue
            alike = jaccard(sets[j], sets[i])
            if alike >= threshold and (i not in best or best[i].similarity < alike):
                best[i] = Link(j, i, alike)
    return [best[i] for i in sorted(best)]


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Of two sorted sets without repeats: what they share, by what is in either."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
