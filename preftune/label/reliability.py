"""How far judgments can be trusted: unscored, ties, order, position, agreement with what is known; and votes of several judges.

>>> [one] = reliability(judgments, examples)
>>> one.order_consistency, one.p_first, one.agreement
(0.94, 0.51, 0.95)
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from preftune.data.judgments import settled, share_of_i
from preftune.data.similarity import similarity
from preftune.data.types import Example, Judgment, Verdict
from preftune.evaluate.winrate import WinRate, preferences_for, win_rate
from preftune.label.template import transcript

_NEAR = 0.9  # overlap from which two answers are called near-duplicates
_SHOWN = 3
_VERDICTS = {"i": "first better", "j": "second better", "tie": "tie", "both_bad": "both bad", "unscored": "unscored"}


@dataclass(frozen=True)
class Reliability:
    """One annotator's judgments in figures. Fractions are None where there is nothing that they could rest on.

    n_pairs:            pairs of responses with a verdict, unscored ones included.
    n_judgments:        acts of judging: with both orders two a pair.
    verdicts:           verdict -> pairs, both orders settled.
    n_unscored:         acts without a verdict.
    unscored:           the most frequent reasons -> acts.
    order_consistency:  of the pairs that were judged in both orders, the fraction with the same verdict both times.
    p_first:            mean probability that the first one shown wins, where orders vary; one half for a judge without bias.
    agreement:          of the acts over pairs whose better response the data states, the fraction that says so; a tie is ½.
    agreement_settled:  the same after both orders are settled.
    n_known:            acts that `agreement` rests on.
    win_rate:           of the second response over the first, where every example has two.
    """

    annotator: str
    n_pairs: int
    n_judgments: int
    verdicts: dict[str, int]
    n_unscored: int
    unscored: dict[str, int]
    order_consistency: float | None
    p_first: float | None
    agreement: float | None
    agreement_settled: float | None
    n_known: int
    win_rate: WinRate | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"win_rate": None if self.win_rate is None else self.win_rate.as_dict()}

    def lines(self) -> list[str]:
        """For a terminal."""
        verdicts = ", ".join(f"{_VERDICTS[v]} {n}" for v, n in sorted(self.verdicts.items()))
        found = [f"{self.annotator}: {self.n_pairs} pairs in {self.n_judgments} judgments: {verdicts}"]
        if self.order_consistency is not None:
            found.append(f"  the same verdict in both orders: {self.order_consistency:.1%}")
        if self.p_first is not None:
            found.append(f"  the first one shown wins: {self.p_first:.1%}")
        if self.agreement is not None and self.agreement_settled is not None:
            found.append(
                f"  agrees with the preferences of the data in {self.agreement:.2%} of {self.n_known} judgments, "
                f"{self.agreement_settled:.2%} of pairs once orders are settled"
            )
        if self.win_rate is not None and self.win_rate.n_total > 1:
            found.append(f"  the second response wins: {self.win_rate.win_rate:.2f} % ± {self.win_rate.standard_error:.2f}")
        found += [f"  unscored: {n} × {reason}" for reason, n in list(self.unscored.items())[:5]]
        return found


def reliability(judgments: Iterable[Judgment], examples: Sequence[Example]) -> list[Reliability]:
    """The figures of each annotator, in the order of their first judgments."""
    groups: dict[str, list[Judgment]] = defaultdict(list)
    by_id = {e.id: e for e in examples}
    for judgment in judgments:
        if judgment.example in by_id:
            groups[judgment.annotator].append(judgment)
    return [_reliability(name, _latest(acts), by_id) for name, acts in groups.items()]


def votes(judgments: Iterable[Judgment]) -> list[Judgment]:
    """The majority of annotators on each pair; a tie where no verdict has more than half, unscored ones not counted."""
    groups: dict[tuple[str, int, int], list[Judgment]] = defaultdict(list)
    for one in settled(judgments):
        groups[one.example, one.i, one.j].append(one)
    found = []
    for (example, i, j), group in groups.items():
        count = Counter(one.verdict for one in group if one.verdict != "unscored")
        likeliest, n = count.most_common(1)[0] if count else ("unscored", 0)
        verdict: Verdict = likeliest if not count or 2 * n > count.total() else "tie"  # type: ignore[assignment]
        why = ", ".join(f"{name} {n}" for name, n in sorted(count.items()))
        found.append(Judgment(example, i, j, verdict, f"vote of {len(group)}", (i, j), why=why))
    return found


def flags(examples: Sequence[Example]) -> list[str]:
    """What a judge cannot tell apart or should not be asked: identical, near-identical and constant answers, in words."""
    identical, near = [], []
    said: dict[str, set[str]] = defaultdict(set)
    for e in examples:
        texts = [transcript(r) for r in e.responses]
        for text in set(texts):
            said[text].add(e.prompt_key)
        for i in range(len(texts)):
            for j in range(i + 1, len(texts)):
                if texts[i] == texts[j]:
                    identical.append(e.id)
                elif _alike(texts[i], texts[j]) and similarity(texts[i], texts[j]) >= _NEAR:
                    near.append(e.id)
    constant = {text: len(prompts) for text, prompts in said.items() if len(prompts) > 2}
    lines = []
    if identical:
        lines.append(f"{len(identical)} pairs of identical answers: a tie, nobody is asked ({_some(identical)})")
    if near:
        lines.append(
            f"{len(near)} pairs share {_NEAR:.0%} or more of their character 5-grams: hardly a preference ({_some(near)})"
        )
    for text, n in sorted(constant.items(), key=lambda item: -item[1])[:_SHOWN]:
        shown = " ".join(text.split())
        lines.append(f"one answer stands under {n} prompts: {shown[:60]!r}{' …' if len(shown) > 60 else ''}")
    return lines


def _alike(a: str, b: str) -> bool:
    """Whether comparing closely is worth its time: lengths within a third, and half the words shared where there are words."""
    if abs(len(a) - len(b)) > max(len(a), len(b)) / 3:
        return False
    one, other = {*a.split()}, {*b.split()}
    return min(len(one), len(other)) < 10 or 2 * len(one & other) >= len(one | other)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _latest(acts: list[Judgment]) -> list[Judgment]:
    """The last act on each pair in each order."""
    return list({(a.example, min(a.i, a.j), max(a.i, a.j), a.shown_order): a for a in acts}.values())


def _reliability(name: str, acts: list[Judgment], by_id: Mapping[str, Example]) -> Reliability:
    both: dict[tuple[str, frozenset[int]], list[Judgment]] = defaultdict(list)
    for act in acts:
        if act.verdict != "unscored":
            both[act.example, frozenset((act.i, act.j))].append(act)
    twice = [group for group in both.values() if len(group) == 2]
    same = [float(one.verdict == other.verdict) for one, other in twice]
    real = [a for a in acts if by_id[a.example].responses[a.i] != by_id[a.example].responses[a.j]]
    first = [p if a.shown_order[0] == a.i else 1 - p for a in real if (p := share_of_i(a)) is not None]
    per_act, per_pair = _agreements(real, by_id), _agreements(one := settled(acts), by_id)
    two = all(len(by_id[a.example].responses) == 2 for a in acts)
    return Reliability(
        annotator=name,
        n_pairs=len(one),
        n_judgments=len(acts),
        verdicts=dict(Counter(a.verdict for a in one)),
        n_unscored=sum(a.verdict == "unscored" for a in acts),
        unscored=dict(Counter(a.why for a in acts if a.verdict == "unscored").most_common(20)),
        order_consistency=_mean(same),
        p_first=_mean(first) if any(a.shown_order[0] != a.i for a in real) else None,
        agreement=_mean(per_act),
        agreement_settled=_mean(per_pair),
        n_known=len(per_act),
        win_rate=win_rate(preferences_for(one)) if two else None,
    )


def _agreements(judgments: Iterable[Judgment], by_id: Mapping[str, Example]) -> list[float]:
    """1 where the verdict is the data's own preference, 0 where it is its opposite, one half for a tie."""
    found = []
    for a in judgments:
        for pair in by_id[a.example].pairs:
            if {pair.winner, pair.loser} == {a.i, a.j} and a.verdict != "unscored":
                winner = _winner(a)
                found.append(0.5 if winner is None else float(winner == pair.winner))
    return found


def _winner(judgment: Judgment) -> int | None:
    return {"i": judgment.i, "j": judgment.j}.get(judgment.verdict)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
