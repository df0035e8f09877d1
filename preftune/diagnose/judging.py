"""Findings about who judged: answers in a policy's evaluation, and the run's own judgments."""

from __future__ import annotations

from collections.abc import Sequence

from preftune.data.types import Judgment
from preftune.diagnose.case import Case
from preftune.diagnose.finding import Finding, Severity, skipped
from preftune.diagnose.fit import percent
from preftune.evaluate.estimate import Estimate, wilson

CONSISTENT = (0.75, 0.60)
"""Share of pairs with the same verdict in both orders, surely below: a warning, an error. A coin comes to 0.5."""

UNSCORED, TIED = (0.05, 0.25), 0.5
"""Shares without a verdict (a warning, an error, surely above), and of ties."""

FIRST = 0.10
"""How far from one half the share of wins of the answer shown first may lie, surely."""


def judge(case: Case) -> Finding:
    """Whether verdicts can be trusted: the same in both orders, hardly any missing, few ties, no favourite place."""
    name, wins = "judge", case.wins
    if wins is None and not case.judgments:
        return skipped(name, f"nobody judged yet; `preftune eval {case.place}` with a judge (--judge-model, or --by)")
    faults: list[tuple[Severity, str]] = []
    numbers: dict[str, object] = {}
    if wins is not None:
        n = wins.n_total + wins.n_unscored
        missing, tied = wilson(float(wins.n_unscored), n), wilson(float(wins.n_draws), max(wins.n_total, 1))
        faults += _faults(wins.order_consistency, wins.first_wins, missing, tied, numbers)
    else:
        n = len(case.judgments)
        faults += _faults(None, None, *_of_judgments(case.judgments), numbers)
    who = wins.judge if wins else ", ".join(sorted({one.annotator for one in case.judgments})[:3])
    if not faults:
        return Finding(name, "ok", f"{who}: {n} verdicts, nothing wrong with them", numbers=numbers)
    severity: Severity = "error" if any(one == "error" for one, _ in faults) else "warning"
    return Finding(
        name, severity, f"{who} is unreliable: {'; '.join(text for _, text in faults)}",
        "judge both orders, take a stronger judge or a clearer template (`preftune judge` says how it agrees with labels), and "
        "more comparisons",
        numbers,
    )  # fmt: skip


def _faults(
    same: Estimate | None, first: Estimate | None, missing: Estimate, tied: Estimate, numbers: dict[str, object]
) -> list[tuple[Severity, str]]:
    found: list[tuple[Severity, str]] = []
    if same is not None:
        numbers |= {"order_consistency": same.value, "order_interval": [same.low, same.high]}
        if same.high < CONSISTENT[0]:
            found.append(
                ("error" if same.high < CONSISTENT[1] else "warning", f"the same verdict in both orders in {percent(same)}")
            )
    if first is not None:
        numbers |= {"first_wins": first.value, "first_interval": [first.low, first.high]}
        if first.low > 0.5 + FIRST or first.high < 0.5 - FIRST:
            found.append(("warning", f"the answer shown first wins {percent(first)}"))
    numbers |= {"unscored": missing.value, "ties": tied.value}
    if missing.low > UNSCORED[0]:
        found.append(("error" if missing.low > UNSCORED[1] else "warning", f"{percent(missing)} have no verdict"))
    if tied.low > TIED:
        found.append(("warning", f"{percent(tied)} are ties"))
    return found


def _of_judgments(judgments: Sequence[Judgment]) -> tuple[Estimate, Estimate]:
    n = len(judgments)
    ties = sum(one.verdict in ("tie", "both_bad") for one in judgments)
    return wilson(float(sum(one.verdict == "unscored" for one in judgments)), n), wilson(float(ties), n)
