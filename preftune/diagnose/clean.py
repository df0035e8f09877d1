"""A cleaned copy of a data set: what the findings ask to be left out is left out, and everything that was done is said.

>>> examples, account = cleaned(check)
>>> account
{'duplicates': 4, 'bad_rows': 1, 'kept': 211}
"""

from __future__ import annotations

from dataclasses import replace

from preftune.data.types import Example, Pair
from preftune.diagnose.check import Check


def cleaned(check: Check) -> tuple[list[Example], dict[str, int]]:
    """The examples that are left, and how many preferences (or rows without any) each finding took.

    What two findings ask for counts for the worse one. An example that loses its last preference goes; scores and labels stay.
    `kept` + the others = preferences and rows of the data.
    """
    gone: dict[int, str] = {}
    for finding in check.findings:
        gone = dict.fromkeys(finding.drop, finding.name) | gone
    account = {finding.name: 0 for finding in check.findings if finding.drop}
    for name in gone.values():
        account[name] += 1
    kept: dict[int, list[Pair]] = {}
    for i, unit in enumerate(check.corpus.units):
        if i not in gone:
            pairs = kept.setdefault(unit.example, [])
            if unit.winner >= 0:
                pairs.append(Pair(unit.winner, unit.loser, unit.confidence, unit.margin))
    if check.corpus.bad:
        account["bad_rows"] = len(check.corpus.bad)
    account["kept"] = len(check.corpus.units) - len(gone)
    return [replace(check.corpus.examples[at], pairs=tuple(pairs)) for at, pairs in kept.items()], account
