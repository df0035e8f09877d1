from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from preftune.diagnose.corpus import words
from preftune.diagnose.similar import jaccard, near_duplicates, sequences, shingles

texts = st.lists(st.lists(st.sampled_from("abcdef"), max_size=12).map(" ".join), max_size=8)


@given(texts, st.integers(1, 4))
def test_shingles_are_the_sets_of_word_sequences(said: list[str], n: int) -> None:
    def slow(text: str) -> set[tuple[str, ...]]:
        w = words(text)
        return {tuple(w[i : i + min(n, len(w))]) for i in range(len(w) - min(n, len(w)) + 1)} if w else set()

    found = shingles(said, n)
    assert [len(one) for one in found] == [len(slow(text)) for text in said]
    for (a, x), (b, y) in itertools.combinations(zip(said, found, strict=True), 2):
        if len(x) and len(y):
            assert jaccard(x, y) == len(slow(a) & slow(b)) / len(slow(a) | slow(b))


def test_near_copies_are_found_among_many_and_nothing_below_the_threshold() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{n}" for n in range(500)]
    said = [rng.choices(vocabulary, k=60) for _ in range(400)]
    for at in range(0, 100, 2):  # each odd one a copy with one other word at the end, of similarity 57 / 59
        said[at + 1] = [*said[at][:-1], "new"]
    sets = shingles([" ".join(one) for one in said], 3)
    links = near_duplicates(sets, 0.8)
    assert [(link.a, link.b) for link in links] == [(at, at + 1) for at in range(0, 100, 2)]
    assert all(link.similarity == 57 / 59 for link in links)


def test_a_bucket_of_equals_is_linked_to_its_first() -> None:
    links = near_duplicates(shingles(["a b c d e"] * 50 + ["", "x"], 3), 0.9)
    assert [(link.a, link.b) for link in links] == [(0, n) for n in range(1, 50)]


def test_order_of_words_matters_and_so_does_the_number() -> None:
    one, two, three = shingles(["a b c", "c b a", "a b c c"], 2)
    assert jaccard(one, two) == 0 and jaccard(one, three) == 2 / 3
    assert len(sequences(one[:0], 3)) == 0
