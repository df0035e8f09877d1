"""Preference rows that are clean by construction, and faults to plant in them at a rate: what the checks are calibrated on.

    rows = clean(1000, seed=0)
    rows = FAULTS["duplicates"].plant(rows, 0.1, random.Random(0))

A clean row: a prompt of made-up words between common English ones, two responses of log-normal length, and a winner that has
more of twenty "good" words. Their number does not depend on the length, nor on how a response opens or is laid out; so what the
words say decides, and nothing else does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]

SYLLABLES = [
    "ba", "ce", "di", "fo", "gu", "ha", "ji", "ke", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "wi", "xo", "ye", "zu",
    "bra", "cle", "dri", "flo", "gru", "pla", "ste", "tri",
]  # fmt: skip
COMMON = [
    "the", "and", "of", "is", "that", "with", "this", "for", "are", "you", "was", "have", "not", "a", "in", "to", "it",
    "on", "as", "at", "by", "from", "or", "be",
]  # fmt: skip
GERMAN = ["der", "die", "und", "das", "ist", "nicht", "mit", "ein", "eine", "ich", "sie", "auf", "für", "auch"]
GOOD = [f"good{a}{b}" for a in SYLLABLES[:5] for b in SYLLABLES[5:9]]
OPENERS = ["So", "Here", "Then", "Now", "First", "Well", "In", "One", "Some", "They", "Each", "Most"]


def made_up(rng: random.Random) -> str:
    """A word of two or three syllables."""
    return "".join(rng.choices(SYLLABLES, k=rng.choice((2, 2, 3))))


def sentence_words(rng: random.Random, n: int) -> list[str]:
    return [rng.choice(COMMON) if rng.random() < 0.5 else made_up(rng) for _ in range(n)]


def response(rng: random.Random, n_good: int) -> str:
    """Sentences with `n_good` good words at random places, sometimes with a list or an exclamation mark."""
    n = max(14, round(rng.lognormvariate(3.6, 0.5)))
    said = sentence_words(rng, n)
    for at in rng.sample(range(1, n), n_good):
        said[at] = rng.choice(GOOD)
    said[0] = rng.choice(OPENERS)
    breaks = sorted(rng.sample(range(4, n), min(n // 12, n - 4)))
    mark = rng.choices((". ", "! ", ".\n", ".\n- "), (8, 1, 1, 1))[0]
    parts = [" ".join(said[a:b]) for a, b in zip([0, *breaks], [*breaks, n], strict=True)]
    return mark.join(parts) + "."


def pair(rng: random.Random) -> Row:
    few, many = sorted(rng.sample(range(7), 2))
    n = rng.randint(8, 40)
    return {
        "prompt": " ".join(sentence_words(rng, n)) + "?",
        "chosen": response(rng, many),
        "rejected": response(rng, few),
    }


def clean(n: int, *, seed: int = 0) -> list[Row]:
    """`n` rows of different prompts."""
    rng = random.Random(f"clean {seed}")
    return [pair(rng) for _ in range(n)]


def some(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    """A share of the rows, one at least; the same objects, to be changed in place."""
    return rng.sample(rows, max(1, round(rate * len(rows))))


def swapped(row: Row) -> Row:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def duplicates(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    return rows + [dict(r) for r in some(rows, rate, rng)]


def near_copies(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    extra = []
    for row in some([r for r in rows if len(r["prompt"].split()) >= 30], rate, rng):
        said = row["prompt"].split()
        said[rng.choice((0, len(said) - 1))] = made_up(rng)
        extra.append(pair(rng) | {"prompt": " ".join(said)})
    return rows + extra


def contradictions(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    return rows + [swapped(r) for r in some(rows, rate, rng)]


def circles(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    extra = []
    for row in some(rows, rate / 2, rng):
        third = response(rng, 3)
        extra += [row | {"chosen": row["rejected"], "rejected": third}, row | {"chosen": third, "rejected": row["chosen"]}]
    return rows + extra


def form_only(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row["rejected"] = row["chosen"].upper()
    return rows


def hardly_different(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        said = row["chosen"].split()
        said[len(said) // 2] = made_up(rng)
        row["rejected"] = " ".join(said)
    return rows


def longer_wins(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    """`rate`: the share of rows in which the longer response is made to win."""
    for row in some(rows, rate, rng):
        if len(row["chosen"]) < len(row["rejected"]):
            row.update(swapped(row))
    return rows


def opener(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row["chosen"] = "Frankly " + row["chosen"]
    return rows


def bold(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row["chosen"] = "".join(f"**{part}** " for part in row["chosen"].split(". "))
    return rows


def refusal(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row["chosen"] = f"I'm sorry, but I can't help with {made_up(rng)}. {row['chosen'][:40]}"
    return rows


def both_refuse(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        for side in ("chosen", "rejected"):
            row[side] = f"I cannot help with {made_up(rng)}. {row[side]}"
    return rows


def flattery(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row["chosen"] = rng.choice(("Great question! ", "What a lovely idea! ", "Absolutely! ")) + row["chosen"]
    return rows


def other_language(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row["rejected"] = " ".join(w if w not in COMMON else rng.choice(GERMAN) for w in row["rejected"].split())
    return rows


def flipped(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row.update(swapped(row))
    return rows


def unsure(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in rows:
        row["confidence"] = 0.9
    for row in some(rows, rate, rng):
        row["confidence"] = 0.55
    return rows


def margin_against(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in rows:
        row["margin"] = rng.randint(1, 4)
    for row in some(rows, rate, rng):
        row["margin"] *= -1
    return rows


def stock(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    text = response(rng, 0)
    for row in some(rows, rate, rng):
        row["rejected"] = text
    return rows


def one_prompt(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row["prompt"] = rows[0]["prompt"]
    return rows


def written(text: Callable[[random.Random], str]) -> Callable[[list[Row], float, random.Random], list[Row]]:
    """A fault that adds a text to one response, either side."""

    def plant(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
        for row in some(rows, rate, rng):
            row[rng.choice(("chosen", "rejected"))] += text(rng)
        return rows

    return plant


def dots(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row[rng.choice(("chosen", "rejected"))] = rng.choice(("...", "--", "?!"))
    return rows


def huge(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row[rng.choice(("chosen", "rejected"))] = " ".join(sentence_words(rng, 3000))
    return rows


def empty(rows: list[Row], rate: float, rng: random.Random) -> list[Row]:
    for row in some(rows, rate, rng):
        row["chosen"] = ""
    return rows


def _key(rng: random.Random) -> str:
    return " sk-" + "".join(rng.choices("abcdefghijkmnopqrstuvwxyzABCDEFGH0123456789", k=40))


def _mail(rng: random.Random) -> str:
    return f" write to {made_up(rng)}.{made_up(rng)}@{made_up(rng)}.org"


class Fault(NamedTuple):
    """`name`: the check that should find it; `rates`: shares of the rows, from weak to strong; `sides`: what else it causes."""

    name: str
    plant: Callable[[list[Row], float, random.Random], list[Row]]
    rates: tuple[float, ...]
    sides: tuple[str, ...] = ()


FAULTS: dict[str, Fault] = {
    "duplicates": Fault("duplicates", duplicates, (0.01, 0.1, 0.3)),
    "near_copies": Fault("near_copies", near_copies, (0.1, 0.5, 1.0)),
    "contradictions": Fault("contradictions", contradictions, (0.01, 0.1, 0.3), ("label_noise",)),
    "circles": Fault("contradictions", circles, (0.02, 0.1, 0.3)),
    "form_only": Fault("same_sides", form_only, (0.01, 0.1, 0.3), ("formatting", "surface")),
    "hardly_different": Fault("same_sides", hardly_different, (0.05, 0.15, 0.4)),
    "longer_wins": Fault("length", longer_wins, (0.2, 0.4, 0.6, 0.9), ("surface", "formatting", "label_noise")),
    "opener": Fault("first_word", opener, (0.1, 0.3, 0.6), ("surface",)),
    "bold": Fault("formatting", bold, (0.1, 0.3, 0.6), ("surface", "length", "same_sides")),
    "refusal": Fault(
        "refusals", refusal, (0.01, 0.05, 0.2, 0.5), ("surface", "first_word", "length", "formatting", "label_noise")
    ),
    "both_refuse": Fault("both_refuse", both_refuse, (0.05, 0.2, 0.6)),
    "flattery": Fault("flattery", flattery, (0.01, 0.05, 0.2, 0.5), ("surface", "first_word", "formatting")),
    "other_language": Fault("language", other_language, (0.01, 0.05, 0.2, 0.5), ("surface",)),
    "flipped": Fault("label_noise", flipped, (0.1, 0.2, 0.3)),
    "unsure": Fault("unsure_labels", unsure, (0.2, 0.4, 0.8)),
    "margin_against": Fault("margins", margin_against, (0.01, 0.1, 0.5)),
    "stock": Fault(
        "stock_responses", stock, (0.02, 0.05, 0.3), ("surface", "first_word", "length", "formatting", "label_noise")
    ),
    "one_prompt": Fault("concentration", one_prompt, (0.03, 0.1, 0.4)),
    "dots": Fault("empty_responses", dots, (0.001, 0.01, 0.1), ("same_sides", "very_long", "stock_responses", "formatting")),
    "huge": Fault("very_long", huge, (0.001, 0.01)),
    "empty": Fault("bad_rows", empty, (0.001, 0.01, 0.1)),
    "mojibake": Fault("damaged_text", written(lambda rng: " itâ€™s cafÃ©"), (0.001, 0.01, 0.2)),
    "html": Fault("html", written(lambda rng: " a &amp; b<br>"), (0.01, 0.05, 0.2)),
    "turns": Fault("turn_markers", written(lambda rng: f"\nHuman: {made_up(rng)}?"), (0.001, 0.01, 0.2), ("formatting",)),
    "keys": Fault("secrets", written(_key), (0.001, 0.01)),
    "mails": Fault("personal_data", written(_mail), (0.001, 0.01, 0.1)),
}
"""Name -> fault, in the order of the checks that find them."""
