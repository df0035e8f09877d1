"""Length-controlled win rate: how often the model would win if its answers were as long as the baseline's.

    >>> found = length_controlled([0.0, 1.0, …], lengths=[812, 640, …], lengths_base=[700, 655, …])
    >>> found.win_rate, found.low, found.high
    (43.1, 39.8, 46.2)

AlpacaEval 2's method (Dubois et al. 2024, arXiv:2404.04475): a logistic regression explains each preference by the difference
in length, by how hard the instruction is, and by the model; the win rate is what it says with the difference set to zero:

    P(model is better) = σ(w₁·tanh(d / sd(d)) + w₂·difficulty + w₃),   d = length of the baseline's answer − the model's

Fitted are ‖w‖₁ + C·Σ sᵢ·CE(yᵢ, σ(w·xᵢ)) with soft labels yᵢ and no intercept beside w₃; C comes from cross-validation. Rows of
the baseline against itself told to be verbose or concise (`Gamed`) keep w₁ near what length alone is worth.

For prompts of one's own there is neither a difficulty nor such rows: the same regression on [tanh(d / sd(d)), 1].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.errors import DataError

Floats = NDArray[np.float64]

GAMED_WEIGHT = 0.1
"""Of a gamed row, beside 1 for a row of the model: λ = 0.2 over two gamed baselines."""
STRENGTHS = np.logspace(-4, 4, 10)
"""The values of C to choose from."""
FOLDS = 5
RESAMPLES = 400
FEWEST = 10
"""Rows with a preference below which nothing is fitted: two a fold."""


class Gamed(NamedTuple):
    """Rows of the baseline against gamed versions of itself; [row] each."""

    preference: Floats  # probability that the gamed version is better
    std_delta_len: Floats  # d / sd(d), within each version
    difficulty: Floats


class LengthControlled(NamedTuple):
    """Win rates and their errors are percent."""

    win_rate: float
    low: float  # 95 % bootstrap interval over the rows, at the C that was chosen
    high: float
    standard_error: float | None  # AlpacaEval's: spread of the rows' probabilities over √n; None without difficulties
    length: float  # w₁: above 0, shorter answers win more
    difficulty: float | None  # w₂
    model: float  # w₃
    strength: float  # C
    n: int  # rows with a preference


class Rows(NamedTuple):
    """What a regression is fitted to."""

    x: Floats  # [row, feature]
    y: Floats  # [row] probability that the answer is 1
    weight: Floats  # [row]


def length_controlled(
    preferences: Sequence[float | None],
    lengths: Sequence[int],
    lengths_base: Sequence[int],
    *,
    difficulty: Sequence[float] | None = None,
    gamed: Gamed | None = None,
    seed: int = 0,
) -> LengthControlled:
    """The win rate at equal lengths; row by row, with `difficulty` and `gamed` as AlpacaEval 2 counts it.

    preferences:   [row] probability that the model's answer is better; None, or what lies outside 0…1, is no verdict. Such a
                   row is not fitted, but counts in sd(d) and in the mean over rows, as in AlpacaEval.
    lengths:       [row] of the model's answers, in characters (any unit does: only d / sd(d) counts).
    lengths_base:  [row] of the baseline's.
    seed:          of the bootstrap.

    Raises DataError for fewer than ten rows with a preference, and where every answer differs from its counterpart by the same
    length, so that nothing tells the effect of length from the model's.
    """
    delta = np.asarray(lengths_base, np.float64) - np.asarray(lengths, np.float64)
    kept = np.array([p is not None and 0 <= p <= 1 for p in preferences], np.bool_)
    if kept.sum() < FEWEST:
        raise DataError(f"length control: {int(kept.sum())} rows have a preference, expected {FEWEST} or more")
    at_equal = np.column_stack([np.zeros(len(delta)), *_columns(difficulty), np.ones(len(delta))])
    x = at_equal.copy()
    x[:, 0] = np.tanh(standardised(delta))
    own = Rows(
        x[kept], np.array([p for p, keep in zip(preferences, kept, strict=True) if keep], np.float64), np.ones(kept.sum())
    )
    extra = Rows(np.zeros((0, x.shape[1])), np.zeros(0), np.zeros(0)) if gamed is None else _gamed_rows(gamed, x.shape[1])
    rows = Rows(*(np.concatenate(parts) for parts in zip(extra, own, strict=True)))
    strength = best_strength(rows)
    w = fit(rows, strength)
    p = _sigmoid(at_equal @ w)
    low, high = _interval(rows, len(extra.y), strength, w, at_equal[kept], seed)
    return LengthControlled(
        win_rate=100 * float(p.mean()),
        low=low,
        high=high,
        standard_error=None if difficulty is None else 100 * float(p.std(ddof=1)) / float(np.sqrt(len(p))),
        length=float(w[0]),
        difficulty=None if difficulty is None else float(w[1]),
        model=float(w[-1]),
        strength=strength,
        n=len(own.y),
    )


def standardised(delta: Floats) -> Floats:
    """Differences over their standard deviation (n − 1), not centred; zeros stay. Raises DataError where all are equal."""
    if not delta.any():
        return delta
    sd = delta.std(ddof=1)
    if sd <= 1e-12 * abs(delta).max():
        raise DataError(
            f"length control: every answer is {abs(delta[0]):g} characters {'shorter' if delta[0] > 0 else 'longer'} than the "
            "baseline's, so nothing tells the effect of length from the model's; lengths must differ from row to row"
        )
    return np.asarray(delta / sd, np.float64)


def best_strength(rows: Rows) -> float:
    """C with the lowest weighted log loss in five-fold cross-validation, the mean over folds of the mean over rows.

    Folds go round from the last row: row i of n is in fold (n − 1 − i) mod 5, as scikit-learn's GroupKFold puts groups of equal
    size. Of equal losses the smallest C.
    """
    n = len(rows.y)
    fold = (n - 1 - np.arange(n)) % FOLDS
    losses = np.zeros((FOLDS, len(STRENGTHS)))
    for k in range(FOLDS):
        train = Rows(*(part[fold != k] for part in rows))
        test = Rows(*(part[fold == k] for part in rows))
        w = np.zeros(rows.x.shape[1])
        for c, strength in enumerate(STRENGTHS):
            w = fit(train, float(strength), start=w)
            losses[k, c] = float((test.weight * cross_entropy(test.x @ w, test.y)).mean())
    return float(STRENGTHS[losses.mean(0).argmin()])


def fit(rows: Rows, strength: float, *, start: Floats | None = None) -> Floats:
    """argmin over w [feature] of ‖w‖₁ + C·Σ weight·CE(y, σ(x·w)).

    Proximal Newton: each step minimises ‖w‖₁ plus the quadratic model of the rest exactly, by trying every pattern of signs
    (3^features of them), and is halved until the objective falls. Ends where the optimality conditions hold to rounding.
    """
    w = np.zeros(rows.x.shape[1]) if start is None else start
    patterns = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=len(w))))  # [pattern, feature]
    value, (gradient, hessian) = _objective(rows, strength, w), _derivatives(rows, strength, w)
    for _ in range(200):
        residual = optimality(gradient, w)
        if residual <= 1e-10 * max(1.0, strength):
            break
        step, size = _newton_point(w, gradient, hessian, patterns) - w, 1.0
        while True:
            point = w + size * step
            tried, derivatives = _objective(rows, strength, point), _derivatives(rows, strength, point)
            if tried < value or (tried <= value * (1 + 1e-12) and optimality(derivatives[0], point) < residual):
                break  # at the end rounding hides what the objective falls by, but not what the gradient does
            size /= 2
            if size < 1e-9:
                return w
        w, value, (gradient, hessian) = point, tried, derivatives
    return w


def optimality(gradient: Floats, w: Floats) -> float:
    """How far w is from optimal: 0 is a subgradient of ‖w‖₁ + f there, to within this much in each feature."""
    moved = np.abs(gradient + np.sign(w))
    return float(np.where(w == 0, np.maximum(np.abs(gradient) - 1, 0), moved).max())


def cross_entropy(z: Floats, y: Floats) -> Floats:
    """−y·log σ(z) − (1 − y)·log(1 − σ(z)), without overflow."""
    return np.asarray(np.logaddexp(0, z) - y * z, np.float64)


def _objective(rows: Rows, strength: float, w: Floats) -> float:
    return float(np.abs(w).sum() + strength * (rows.weight * cross_entropy(rows.x @ w, rows.y)).sum())


def _derivatives(rows: Rows, strength: float, w: Floats) -> tuple[Floats, Floats]:
    """Gradient and Hessian of the objective without ‖w‖₁."""
    p = _sigmoid(rows.x @ w)
    gradient = strength * ((rows.weight * (p - rows.y)) @ rows.x)
    hessian = strength * (rows.x.T * (rows.weight * p * (1 - p))) @ rows.x
    return gradient, hessian


def _newton_point(w: Floats, gradient: Floats, hessian: Floats, patterns: Floats) -> Floats:
    """argmin over z of ‖z‖₁ + gradient·(z − w) + ½(z − w)ᵀ·hessian·(z − w)."""
    hessian = hessian + np.eye(len(w)) * (1e-12 * hessian.trace() + 1e-300)  # a feature that is always 0 has no curvature
    active = patterns != 0
    both = active[:, :, None] & active[:, None, :]
    system = np.where(both, hessian, 0.0) + np.eye(len(w)) * ~active[:, :, None]
    points = np.linalg.solve(system, np.where(active, hessian @ w - gradient - patterns, 0.0)[..., None])[..., 0]
    away = points - w
    model = np.abs(points).sum(1) + away @ gradient + 0.5 * np.einsum("pi,ij,pj->p", away, hessian, away)
    consistent = (points * patterns >= 0).all(1)  # the others are no minimum of anything
    return np.asarray(points[np.where(consistent, model, np.inf).argmin()], np.float64)


def _interval(rows: Rows, n_extra: int, strength: float, w: Floats, at_equal: Floats, seed: int) -> tuple[float, float]:
    """2.5 % and 97.5 % of the win rate when the model's rows are drawn again with replacement; a draw is a weight."""
    random, n = np.random.default_rng(seed), len(at_equal)
    found = []
    for counts in random.multinomial(n, np.full(n, 1 / n), size=RESAMPLES):
        weight = rows.weight.copy()
        weight[n_extra:] *= counts
        again = fit(rows._replace(weight=weight), strength, start=w)
        found.append(100 * float(counts @ _sigmoid(at_equal @ again)) / n)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _columns(difficulty: Sequence[float] | None) -> list[Floats]:
    return [] if difficulty is None else [np.asarray(difficulty, np.float64)]


def _gamed_rows(gamed: Gamed, n_features: int) -> Rows:
    x = np.column_stack(
        [np.tanh(gamed.std_delta_len), *([gamed.difficulty] * (n_features - 2)), np.zeros(len(gamed.preference))]
    )
    return Rows(x, np.asarray(gamed.preference, np.float64), np.full(len(x), GAMED_WEIGHT))


def _sigmoid(z: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -z)), np.float64)
