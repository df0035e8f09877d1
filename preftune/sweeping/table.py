"""The table of a sweep: a line for each candidate, by the settings that set it apart, with the figures and their intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from preftune.errors import printable
from preftune.sweeping.grid import text_of
from preftune.sweeping.record import COLUMNS
from preftune.sweeping.verdict import candidates, shown, varied

if TYPE_CHECKING:
    from rich.table import Table

    from preftune.sweeping.job import Sweep

BEST, NEAR, FRONTIER = "best", "within noise", "frontier"


def rows_of(found: Sweep) -> tuple[list[str], list[list[str]]]:
    """Heads and rows as text: settings, the metric, KL, win rate, length, accuracy, and what is to be said of the row."""
    names = varied(found.plan.axes)
    done = candidates(found.rows)
    measured = [n for n in dict.fromkeys([found.plan.metric, *COLUMNS]) if any(n in c.figures for c in done)]
    heads = [*names, *(["runs"] if "seed" in found.plan.axes else []), *(COLUMNS.get(n, n) for n in measured), ""]
    rows = []
    for c in done:
        said = [BEST] if c == found.verdict.best or c in found.verdict.tied else [NEAR] if c in found.verdict.near else []
        said += [FRONTIER] if c in found.frontier else []
        count = [str(len(c.runs))] if "seed" in found.plan.axes else []
        figures = [shown(c.figures.get(n)) for n in measured]
        rows.append([*(text_of(c.settings[n]) for n in names), *count, *figures, ", ".join(said)])
    for row in found.rows:
        if row.status != "done":
            settings = [text_of(row.settings[n]) for n in names]
            count = [f"seed {row.settings['seed']}"] if "seed" in found.plan.axes else []
            rows.append([*settings, *count, *("" for _ in measured), row.status])
    return heads, rows


def table(found: Sweep) -> Table:
    """The same for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    heads, rows = rows_of(found)
    drawn = Table(title="95 % intervals" + (" over seeds" if "seed" in found.plan.axes else ""))
    n_settings = len(varied(found.plan.axes))
    for at, head in enumerate(heads):
        drawn.add_column(escape(head), justify="left" if at < n_settings or at == len(heads) - 1 else "right")
    for row in rows:
        drawn.add_row(*(escape(printable(cell)) for cell in row))
    return drawn


def best_of_table(found: Sweep) -> Table:
    """Best of n of the reference: what it wins, and the KL that this takes."""
    from rich.table import Table

    drawn = Table(title="Best of n answers of the reference")
    for head in ("n", "win rate, %", "score", "KL, nats a reply", "without ties"):
        drawn.add_column(head, justify="right")
    for one in found.best_of:
        drawn.add_row(str(one.n), shown(one.win_rate), shown(one.score), shown(one.kl), f"{one.kl_at_most:.3f}")
    return drawn
