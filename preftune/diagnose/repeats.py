"""Checks for what is there more than once: copies, near copies, contradicting preferences, one prompt too often."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from preftune.diagnose.corpus import Corpus, canonical
from preftune.diagnose.finding import N_EXAMPLES, Evidence, Finding, Severity, excerpt, skipped
from preftune.diagnose.share import graded, share
from preftune.diagnose.similar import near_duplicates, shingles

ALIKE = 0.8
"""Jaccard similarity from which two texts are near copies: of 30 words, one is another."""

Node = tuple[str, str]


def duplicates(corpus: Corpus) -> Finding:
    """The same prompt with the same responses and the same winner, again."""
    first: dict[tuple[str, ...], int] = {}
    copies = []
    for i, _ in enumerate(corpus.units):
        if first.setdefault(_content(corpus, i), i) != i:
            copies.append(i)
    n = len(corpus.units)
    said = f"{len(copies)} of {n} rows or preferences repeat an earlier one (case and white space aside)"
    if not copies:
        return Finding("duplicates", "ok", said, numbers={"n": n, "n_copies": 0})
    # a share d of copies is as if 1 - d of the data were there, and each copied one counts twice
    severity: Severity = "error" if len(copies) > 0.2 * n else "warning"
    return Finding(
        "duplicates",
        severity,
        said,
        "leave the copies out (--fix does): they count twice in training and make an evaluation look surer than it is",
        {"n": n, "n_copies": len(copies), "share": round(len(copies) / n, 4)},
        tuple(
            Evidence(corpus.evidence(i).place, f"repeats {corpus.evidence(first[_content(corpus, i)]).place}")
            for i in copies[:N_EXAMPLES]
        ),
        tuple(copies),
    )


def near_copies(corpus: Corpus) -> Finding:
    """Different prompts that say nearly the same, so that a split by prompt can put one on each side."""
    texts: dict[str, int] = {}
    for at, prompt in enumerate(corpus.prompts):
        texts.setdefault(canonical(prompt), at)
    where = list(texts.values())
    links = near_duplicates(shingles([corpus.prompts[at] for at in where], 3), ALIKE)
    n = len(where)
    numbers = {"n_prompts": n, "n_near_copies": len(links)}
    split = 0.18 * len(links)  # two prompts part with probability 2 · 0.1 · 0.9
    said = f"{len(links)} of {n} different prompts are nearly an earlier one (at least {ALIKE:.0%} of the word triples shared)"
    if not links:
        return Finding("near_copies", "ok", said, numbers=numbers)
    found = share([True] * len(links) + [False] * (n - len(links)), range(n))
    severity = graded(found, note=0.0, warning=0.05, error=0.5)
    return Finding(
        "near_copies",
        severity,
        said,
        f"with a tenth held out, about {max(split, 1):.0f} of them will have the twin on the other side of the split: keep one "
        "of each group, or hold out whole groups",
        numbers | {"share": round(found.value, 4), "share_interval": found.interval},
        tuple(
            Evidence(_place(corpus, where[link.b]), f"{link.similarity:.0%} like {_place(corpus, where[link.a])}: "
                     f"{excerpt(corpus.prompts[where[link.b]], 100)}")
            for link in links[:N_EXAMPLES]
        ),
    )  # fmt: skip


def contradictions(corpus: Corpus) -> Finding:
    """The same two responses to the same prompt preferred both ways, and circles (a over b over c over a)."""
    edges: dict[tuple[Node, Node], list[int]] = defaultdict(list)
    for i, unit in enumerate(corpus.units):
        if unit.winner >= 0 and unit.confidence > 0.5:
            prompt = corpus.keys[unit.example]
            sides = corpus.canonical[unit.example]
            if sides[unit.winner] != sides[unit.loser]:
                edges[(prompt, sides[unit.winner]), (prompt, sides[unit.loser])].append(i)
    circle = _in_circles(edges)
    both_ways = {e for e in edges if e[::-1] in edges}
    wrong = sorted(i for edge in {*circle, *both_ways} for i in edges[edge])
    n = sum(map(len, edges.values()))
    if not n:
        return skipped("contradictions", "there are no preferences")
    numbers: dict[str, float | list[float] | None] = {
        "n": n,
        "n_both_ways": sum(len(edges[e]) for e in both_ways),
        "n_in_longer_circles": len(wrong) - sum(len(edges[e]) for e in both_ways),
    }
    repeated = _flips(edges)
    if repeated:
        apart = share([a != b for a, b, _ in repeated], [key for _, _, key in repeated])
        numbers |= {"n_repeated": apart.n, "disagree": round(apart.value, 4), "disagree_interval": apart.interval}
        numbers["noise"] = _noise(apart.value)
    said = (
        f"{len(wrong)} of {n} preferences contradict others: {numbers['n_both_ways']} prefer the same two responses both ways, "
        f"{numbers['n_in_longer_circles']} are in longer circles"
    )
    if not wrong:
        return Finding("contradictions", "ok", said, numbers=numbers)
    noise = numbers.get("noise")
    if isinstance(noise, float):
        said += f"; comparisons made twice suggest that {noise:.0%} or more of the labels are wrong"
    n_both = sum(len(edges[e]) for e in both_ways)  # circles come with any noisy ranking of several: a warning is enough there
    surely = share([True] * n_both + [False] * (n - n_both), range(n))
    severity = graded(surely, note=-1.0, warning=-1.0, error=0.1)
    return Finding(
        "contradictions",
        severity,
        said,
        "both directions together teach nothing: have them judged again, or leave them out (--fix does, but for a direction "
        "that has the majority)",
        numbers,
        tuple(corpus.evidence(i) for i in wrong[:N_EXAMPLES]),
        tuple(_to_drop(edges, {*circle, *both_ways})),
    )  # fmt: skip


def same_sides(corpus: Corpus) -> Finding:
    """Chosen and rejected that differ in case, white space or punctuation alone, or hardly at all."""
    pairs = corpus.contrast
    if not pairs.winners:
        return skipped("same_sides", "there are no preferences")
    equal, close = [], []
    for at, (winner, loser) in enumerate(zip(pairs.winners, pairs.losers, strict=True)):
        bags = [Counter(canonical(text).split()) for text in (winner, loser)]
        both = (bags[0] & bags[1]).total()
        either = (bags[0] | bags[1]).total()
        if _letters(winner) == _letters(loser):
            equal.append(at)
        elif either >= 10 and both >= 0.9 * either:
            close.append(at)
    n = len(pairs.winners)
    said = (
        f"in {len(equal)} of {n} preferences the responses differ in case, spacing or punctuation alone, in {len(close)} by no "
        "more than a tenth of their words"
    )
    numbers: dict[str, float] = {"n": n, "n_equal": len(equal), "n_close": len(close)}
    if not equal and not close:
        return Finding("same_sides", "ok", said, numbers=numbers)
    alike = share([at in {*equal, *close} for at in range(n)], pairs.groups)
    severity = graded(alike, note=0.0, warning=0.05, error=0.3)
    return Finding(
        "same_sides",
        "warning" if equal and severity in ("ok", "note") else severity,
        said,
        "leave out those that differ in form alone (--fix does); pairs that hardly differ can lower the log-prob of both "
        "(likelihood displacement): watch rewards/chosen, or add an SFT term",
        numbers,
        tuple(corpus.evidence(int(pairs.units[at])) for at in [*equal, *close][:N_EXAMPLES]),
        tuple(int(pairs.units[at]) for at in equal),
    )


def stock_responses(corpus: Corpus) -> Finding:
    """One and the same response to many prompts."""
    prompts: dict[str, set[str]] = defaultdict(set)
    for at, texts in enumerate(corpus.canonical):
        for text in texts:
            prompts[text].add(corpus.keys[at])
    n = len(set(corpus.keys))
    stock = {text: len(keys) for text, keys in prompts.items() if len(keys) > 1}
    if not stock:
        return Finding("stock_responses", "ok", f"no response is given to two of the {n} prompts", numbers={"n_prompts": n})
    top, most = max(stock.items(), key=lambda item: item[1])
    often = share([True] * most + [False] * (n - most), range(n))
    severity = graded(often, note=0.0, warning=0.02, error=0.2)
    severity = "note" if severity in ("ok", "note") else severity
    if len(top.split()) < 4 and severity == "warning":  # yes, no, a number: answers of a kind of task
        severity = "note"
    return Finding(
        "stock_responses",
        severity,
        f"{len(stock)} responses are given to two prompts or more; the most frequent one to {most} of {n} prompts",
        "" if severity == "note" else "the model will learn this text by heart; keep a few, or have others written",
        {"n_prompts": n, "n_stock": len(stock), "most": most, "share": round(often.value, 4)},
        (Evidence(f"{most} prompts", excerpt(top)),),
    )  # fmt: skip


def concentration(corpus: Corpus) -> Finding:
    """A few prompts that hold most of the preferences."""
    counts = Counter(corpus.keys[unit.example] for unit in corpus.units)
    n, (key, most) = sum(counts.values()), counts.most_common(1)[0]
    effective = n**2 / sum(c * c for c in counts.values())
    severity: Severity = "error" if most > max(0.25 * n, 50) else "warning" if most > max(0.05 * n, 20) else "ok"
    return Finding(
        "concentration",
        severity,
        f"{n} rows or preferences over {len(counts)} prompts, which weigh as much as {effective:.0f} equal ones; "
        f"the most frequent has {most}",
        "" if severity == "ok" else "that prompt's answers will be learnt by heart: thin it out, or collect others",
        {"n": n, "n_prompts": len(counts), "n_effective": round(effective, 1), "most": most},
        () if severity == "ok" else (Evidence(f"{most} preferences", excerpt(corpus.prompts[corpus.keys.index(key)])),),
    )  # fmt: skip


def _content(corpus: Corpus, unit: int) -> tuple[str, ...]:
    """What a unit says: copies have the same."""
    one = corpus.units[unit]
    texts = corpus.canonical[one.example]
    if one.winner >= 0:
        return corpus.keys[one.example], texts[one.winner], texts[one.loser]
    return corpus.keys[one.example], *texts, *map(str, corpus.examples[one.example].labels)


def _letters(text: str) -> str:
    """What is left without white space and punctuation: letters, marks, digits and symbols."""
    return "".join(c for c in canonical(text) if unicodedata.category(c)[0] not in "ZPC")


def _place(corpus: Corpus, example: int) -> str:
    return corpus.examples[example].source or corpus.examples[example].id


def _flips(edges: Mapping[tuple[Node, Node], Sequence[int]]) -> list[tuple[bool, bool, str]]:
    """Per comparison that was made more than once its first two directions: whether each is that of the edge."""
    found = []
    for edge, units in edges.items():
        other = edges.get(edge[::-1], ())
        if edge[0] < edge[1] or not other:
            inward = sorted([(i, True) for i in units] + [(i, False) for i in other])
            if len(inward) > 1:
                found.append((inward[0][1], inward[1][1], edge[0][0]))
    return found


def _noise(disagree: float) -> float | None:
    """The rate e of wrong labels at which two disagree as often, 2 e (1 - e); None where they do so by chance or more."""
    return None if disagree >= 0.5 else round((1 - math.sqrt(1 - 2 * disagree)) / 2, 4)


def _in_circles(edges: Iterable[tuple[Node, Node]]) -> set[tuple[Node, Node]]:
    """Edges that lie on a directed circle: both ends in one strongly connected component (Kosaraju's two passes)."""
    onward: dict[Node, list[Node]] = defaultdict(list)
    back: dict[Node, list[Node]] = defaultdict(list)
    for a, b in edges:
        onward[a].append(b)
        back[b].append(a)
    order: list[Node] = []
    seen: set[Node] = set()
    for start in list(onward):
        stack = [(start, iter(onward.get(start, ())))] if start not in seen else []
        seen.add(start)
        while stack:
            node, rest = stack[-1]
            after = next((b for b in rest if b not in seen), None)
            if after is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(after)
                stack.append((after, iter(onward.get(after, ()))))
    part: dict[Node, int] = {}
    for number, start in enumerate(reversed(order)):
        todo = [start] if start not in part else []
        while todo:
            node = todo.pop()
            if node not in part:
                part[node] = number
                todo += [a for a in back.get(node, ()) if a not in part]
    return {(a, b) for a, b in edges if a != b and part[a] == part[b]}


def _to_drop(edges: Mapping[tuple[Node, Node], Sequence[int]], wrong: set[tuple[Node, Node]]) -> list[int]:
    """Units of contradicting edges, but for a direction that has the majority and lies on no longer circle."""
    found: list[int] = []
    for edge in wrong:
        mine, theirs = len(edges[edge]), len(edges.get(edge[::-1], ()))
        if not (theirs and mine > theirs):
            found += edges[edge]
    return sorted(found)
