"""What a simple model could learn from the pairs: a linear preference over sparse features, judged on prompts it has not seen.

    >>> table = rows_of([{"w:sorry": 1.0}, {"w:sorry": 1.0, "w:no": -1.0}])
    >>> outcome = cross_validated(table, groups=["p1", "p2"])
    >>> outcome.correct.mean()
    0.5

A row is features of the chosen response minus those of the rejected one, so the model has no intercept and swapping the two
turns its sign: P(chosen wins) = sigmoid(w · x), the Bradley-Terry model with linear strengths. Fitted with a ridge by
accelerated gradient steps (Nesterov 1983) under a diagonal bound of the curvature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.diagnose.corpus import stable_hash

FOLDS = 5
STEPS = 60
RIDGE = 1.0
MIN_ROWS = 3
"""Rows in which a feature must differ to be one: rarer ones can be remembered, and not learnt."""


class Table(NamedTuple):
    """Sparse rows: row r holds `values[start[r]:start[r + 1]]` in the columns `columns[...]`, which are named by `names`."""

    start: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float64]
    names: list[str]

    @property
    def n_rows(self) -> int:
        """How many rows."""
        return len(self.start) - 1

    def take(self, rows: NDArray[np.int64]) -> Table:
        """Some of the rows, all of the columns."""
        lengths = np.diff(self.start)[rows]
        start = np.concatenate([[0], np.cumsum(lengths)])
        where = np.repeat(self.start[rows] - start[:-1], lengths) + np.arange(start[-1])
        return Table(start, self.columns[where], self.values[where], self.names)

    def times(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """[R] the product of each row with [C] weights."""
        product: NDArray[np.float64] = np.bincount(self.row, self.values * weights[self.columns], self.n_rows).astype(
            np.float64
        )
        return product

    @property
    def row(self) -> NDArray[np.int64]:
        """[N] the row of each value."""
        return np.repeat(np.arange(self.n_rows), np.diff(self.start))


class Outcome(NamedTuple):
    """How each row fared in the fold that had not seen its prompt.

    score:    [R] log-odds that the chosen response wins.
    correct:  [R] 1 where it is above 0, one half where it is 0: no feature that was learnt differs.
    weights:  feature -> weight, fitted to all rows.
    """

    score: NDArray[np.float64]
    correct: NDArray[np.float64]
    weights: dict[str, float]


def rows_of(differences: Sequence[Mapping[str, float]], *, min_rows: int = MIN_ROWS) -> Table:
    """A table of features by name, without those that differ in fewer than `min_rows` rows; each column is scaled to RMS 1."""
    counts: dict[str, int] = {}
    for difference in differences:
        for name in difference:
            counts[name] = counts.get(name, 0) + 1
    names = [name for name, n in counts.items() if n >= min_rows]
    index = {name: at for at, name in enumerate(names)}
    kept = [[(index[name], value) for name, value in row.items() if name in index] for row in differences]
    start = np.concatenate([[0], np.cumsum([len(row) for row in kept])]).astype(np.int64)
    columns = np.array([c for row in kept for c, _ in row], np.int64)
    values = np.array([v for row in kept for _, v in row], np.float64)
    power = np.sqrt(np.bincount(columns, values**2, len(names)) / np.maximum(np.bincount(columns, minlength=len(names)), 1))
    return Table(start, columns, values / np.maximum(power, 1e-12)[columns], names)


def cross_validated(table: Table, groups: Sequence[str]) -> Outcome:
    """Each row scored by a model of the other folds; a prompt's rows are in one fold, which follows from the prompt alone."""
    fold = np.array([stable_hash(group) % FOLDS for group in groups])
    score = np.zeros(table.n_rows)
    for k in range(FOLDS):
        inside, outside = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        if len(inside) and len(outside):
            score[inside] = table.take(inside).times(fit(table.take(outside)))
    correct = np.where(score > 0, 1.0, np.where(score < 0, 0.0, 0.5))
    return Outcome(score, correct, dict(zip(table.names, fit(table).tolist(), strict=True)))


def fit(table: Table) -> NDArray[np.float64]:
    """[C] weights that minimise the sum of log(1 + exp(-w · x)) over rows + RIDGE / 2 · |w|²."""
    row, size = table.row, np.abs(table.values)
    weights = ahead = np.zeros(len(table.names))
    if not len(row):
        return weights
    reach = np.bincount(row, size, table.n_rows)  # |x|₁ of each row: Σ_r |x_rc| |x_r|₁ / 4 bounds the curvature of column c
    curvature = np.bincount(table.columns, size * reach[row], len(table.names)) / 4 + RIDGE
    for step in range(STEPS):
        wrong = 1 / (1 + np.exp(np.clip(np.bincount(row, table.values * ahead[table.columns], table.n_rows), -30, 30)))
        slope = RIDGE * ahead - np.bincount(table.columns, table.values * wrong[row], len(table.names))
        moved = ahead - slope / curvature
        ahead = moved + step / (step + 3) * (moved - weights)
        weights = moved
    return weights
