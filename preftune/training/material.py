"""Trees in the form that a goal trains on: branches that no unit uses are not read, and what is left out is said.

Pairs make labels where labels are asked for (the chosen is desirable, the rejected is not); labels make no pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.data.types import Branch, Pair, Tree
from preftune.errors import DataError
from preftune.loss_settings import first_record
from preftune.losses.objective import Objective
from preftune.losses.records import Confidence, Labels, Mismatched, Ranked, Tokens
from preftune.registry import LOSSES


class Material(NamedTuple):
    """Trees in the form that a goal trains on, with what was left out and why."""

    trees: list[Tree]
    n_units: NDArray[np.int64]  # [tree, objective]: pairs, responses, lists, or scored tokens
    dropped: list[tuple[str, str]]  # id, reason
    notes: list[str]
    mismatched: list[Tree] | None = None  # per tree its prompt with a response to another prompt, where they are asked for


_TIE = "a tie: neither response is preferred"


class _Use(NamedTuple):
    """What one objective makes of a tree: the branches that it reads, and how many units they are."""

    branches: set[int]
    n_units: int


def material(trees: Sequence[Tree], goal: Sequence[Objective]) -> Material:
    """Only what the objectives need. Raises DataError when nothing is left, or an objective would get nothing."""
    kept, units, dropped = [], [], []
    reasons: dict[int, str] = {}  # of each objective, why it cannot use the first example that it cannot
    for tree in trees:
        whole = _labelled(_without_ties(tree), goal)
        uses = [_USES.get(o.record, _pairs)(whole) for o in goal]
        usable = [u for u in uses if isinstance(u, _Use)]
        tied = bool(tree.pairs) and not whole.pairs
        reasons = {k: _TIE if tied else u for k, u in enumerate(uses) if isinstance(u, str)} | reasons
        if not usable:
            dropped.append((tree.id, _TIE if tied else next(u for u in uses if isinstance(u, str))))
            continue
        kept.append(_only(whole, sorted(set().union(*(u.branches for u in usable)))))
        units.append([u.n_units if isinstance(u, _Use) else 0 for u in uses])
    n_units = np.array(units, np.int64).reshape(-1, len(goal))
    for k, (objective, n) in enumerate(zip(goal, n_units.sum(0), strict=True)):
        if not n:
            reason = f"the first: {reasons[k]}" if k in reasons else "there are none"
            raise DataError(f"loss.name={objective.name}: none of the {len(trees)} examples can be used; {reason}")
    others = _mismatched(kept) if any(Mismatched in o.given for o in goal) else None
    return Material(kept, n_units, dropped, _notes(kept, goal, from_pairs=any(t.pairs for t in trees)), others)


def _without_ties(tree: Tree) -> Tree:
    """Without pairs that prefer nothing, and without the branches that were in no other pair."""
    clear = tuple(p for p in tree.pairs if p.confidence > 0.5)
    tied = {k for p in tree.pairs for k in p[:2]} - {k for p in clear for k in p[:2]}
    if len(clear) == len(tree.pairs):
        return tree
    return _only(replace(tree, pairs=clear), [k for k in range(len(tree.branches)) if k not in tied])


def _labelled(tree: Tree, goal: Sequence[Objective]) -> Tree:
    """With labels and ranks exactly where an objective asks for them."""
    records = {o.record for o in goal}
    if Labels in records and not tree.labels:
        won, lost = {p.winner for p in tree.pairs}, {p.loser for p in tree.pairs}
        labels = tuple(None if (k in won) == (k in lost) else k in won for k in range(len(tree.branches)))
        tree = replace(tree, labels=labels)
    ranks = _ranks(tree) if Ranked in records else ()
    return replace(tree, scores=ranks) if ranks or tree.scores else tree


def _ranks(tree: Tree) -> tuple[float, ...]:
    """Per response minus its place, the best 0, NaN where it has none: by the scores, or by pairs that decide the order.

    () where there is no strict order of two or more.
    """
    if len(tree.scores) == len(tree.branches):
        points: dict[int, float] = {k: s for k, s in enumerate(tree.scores) if not math.isnan(s)}
    else:
        wins = Counter({(p.winner, p.loser) for p in tree.pairs})
        among = {k for pair in wins for k in pair}
        points = {k: sum(winner == k for winner, _ in wins) for k in among}
        if len(wins) < len(among) * (len(among) - 1) // 2 or set(points.values()) != set(range(len(among))):
            return ()  # not every two were compared, or in a circle
    order = sorted(points, key=lambda k: -points[k])
    if len(order) < 2 or len(set(points.values())) < len(order):
        return ()
    return tuple(float(-order.index(k)) if k in order else math.nan for k in range(len(tree.branches)))


def _pairs(tree: Tree) -> _Use | str:
    if tree.pairs:
        return _Use({k for p in tree.pairs for k in p[:2]}, len(tree.pairs))
    fits = _taking(Labels) if any(label is not None for label in tree.labels) else _taking(Tokens)
    what = "labelled responses are" if tree.labels else "demonstrations are"
    return f"it has no preference (no chosen and rejected response); {what} for loss.name={' or '.join(fits)}"


def _tokens(tree: Tree) -> _Use | str:
    losers = {p.loser for p in tree.pairs}
    good = {k for k, b in enumerate(tree.branches) if k not in losers and b.scored.any()}
    good -= {k for k, label in enumerate(tree.labels) if label is False}
    n = sum(int(tree.branches[k].scored.sum()) for k in good)
    return _Use(good, n) if good else "every response of it is a rejected one"


def _labels(tree: Tree) -> _Use | str:
    known = {k for k, label in enumerate(tree.labels) if label is not None}
    if known:
        return _Use(known, len(known))
    return f"it has neither labels nor a preference; demonstrations are for loss.name={' or '.join(_taking(Tokens))}"


def _ranked(tree: Tree) -> _Use | str:
    listed = {k for k, place in enumerate(tree.scores) if not math.isnan(place)}
    return _Use(listed, 1) if listed else "its responses have no strict order (scores without ties, or every two compared)"


_USES = {Tokens: _tokens, Labels: _labels, Ranked: _ranked}


def _taking(record: type) -> list[str]:
    return sorted(name for name in LOSSES if first_record(LOSSES[name]) is record)


def _only(tree: Tree, used: Sequence[int]) -> Tree:
    """The tree with these branches alone, in order."""
    if len(used) == len(tree.branches):
        return tree
    new = {old: k for k, old in enumerate(used)}
    pairs = tuple(
        Pair(new[p.winner], new[p.loser], p.confidence, p.margin) for p in tree.pairs if {p.winner, p.loser} <= set(new)
    )
    labels, scores = (tuple(x[k] for k in used) if x else () for x in (tree.labels, tree.scores))
    return Tree(tree.id, tree.prompt, tuple(tree.branches[k] for k in used), pairs, labels, scores)  # type: ignore[arg-type]


def _mismatched(trees: Sequence[Tree]) -> list[Tree]:
    """Each prompt with a response to another: of the next example with another prompt, its responses taken in turn.

    It follows from the data alone, not from seed or step, so that the reference scores it once. Where both together are longer
    than any example, the response is cut to what the model is known to read. Raises DataError if all have one prompt.
    """
    keys = [t.prompt.tobytes() for t in trees]
    longest = max(len(t.prompt) + len(b.ids) for t in trees for b in t.branches)
    if len(set(keys)) < 2:
        raise DataError(
            "responses to other prompts are asked for (an estimate of the KL), but all examples have the same prompt"
        )
    made, other = [], 0
    for i, tree in enumerate(trees):
        other = max(other, i + 1)  # never far: the examples of one prompt are walked over once
        while keys[other % len(trees)] == keys[i]:
            other += 1
        branches = trees[other % len(trees)].branches
        branch, room = branches[i % len(branches)], longest - len(tree.prompt)
        made.append(Tree(tree.id, tree.prompt, (Branch(branch.ids[:room], branch.scored[:room]),)))
    return made


def _notes(trees: Sequence[Tree], goal: Sequence[Objective], *, from_pairs: bool) -> list[str]:
    notes = []
    records = {o.record for o in goal}
    if records == {Tokens} and from_pairs:
        notes.append("the data are preferences: sft trains on the chosen responses alone (preferred fine-tuning)")
    if Labels in records:
        balance = Counter(label for t in trees for label in t.labels)
        made = ", from preferences: a chosen and a rejected of each" if from_pairs else ""
        notes.append(f"{balance[True]} desirable and {balance[False]} undesirable responses{made}")
    pairs = [p for t in trees for p in t.pairs]
    unsure = sum(p.confidence < 1 for p in pairs)
    if unsure and records - {Tokens, Labels, Ranked} and not any(Confidence in o.units | o.given for o in goal):
        names = " and ".join(o.name for o in goal)
        notes.append(f"{unsure} of {len(pairs)} preferences are less than certain; {names} counts each as certain")
    return notes
