"""Every objective again, as its paper writes it: on plain numbers of fifty digits, one function each, no torch.

A unit is a `Row` of numbers. An oracle gets the units of a step, and the same units once more as `given`: what a formula takes
from there has no gradient. It returns one loss per unit. `Row` has the fields of all records; an oracle reads those it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mpmath import mp, mpf

DIGITS = 50


class Row(NamedTuple):
    """One unit. `w` and `l`: the chosen and the rejected response (`w` where there is one); `r`: reference; nats, tokens."""

    w: Any = 0.0
    l: Any = 0.0  # noqa: E741
    rw: Any = 0.0
    rl: Any = 0.0
    nw: Any = 1.0
    nl: Any = 1.0
    confidence: Any = 1.0
    margin: Any = 0.0
    kl_w: Any = 0.0
    kl_l: Any = 0.0
    desirable: bool = True
    other: Any = 0.0  # log-ratio of a mismatched response
    opens: bool = True  # the first of a ranked list

    @property
    def h_w(self) -> Any:
        return self.w - self.rw

    @property
    def h_l(self) -> Any:
        return self.l - self.rl

    @property
    def h(self) -> Any:
        return self.h_w - self.h_l


Rows = Sequence[Row]
Oracle = Callable[..., list[Any]]


def exact(row: Row) -> Row:
    """The same numbers with fifty digits."""
    return Row(*(x if isinstance(x, bool) else mpf(x) for x in row))


def each(formula: Callable[..., Any]) -> Oracle:
    """An oracle from the formula of one unit."""

    def oracle(units: Rows, given: Rows, **parameters: Any) -> list[Any]:
        return [formula(u, **parameters) for u in units]

    return oracle


def sigma(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def nls(x: Any) -> Any:
    """−log σ(x)"""
    return mp.log(1 + mp.exp(-x))


def mean(values: Sequence[Any]) -> Any:
    return sum(values) / len(values)


# Pairs with a reference


@each
def dpo(p: Row, *, beta: Any, label_smoothing: Any) -> Any:
    return (1 - label_smoothing) * nls(beta * p.h) + label_smoothing * nls(-beta * p.h)


@each
def robust(p: Row, *, beta: Any, label_smoothing: Any) -> Any:
    return ((1 - label_smoothing) * nls(beta * p.h) - label_smoothing * nls(-beta * p.h)) / (1 - 2 * label_smoothing)


@each
def dpo_soft(p: Row, *, beta: Any) -> Any:
    return p.confidence * nls(beta * p.h) + (1 - p.confidence) * nls(-beta * p.h)


@each
def odpo(p: Row, *, beta: Any, offset: Any) -> Any:
    return nls(beta * p.h - offset * p.margin)


@each
def dpo_norm(p: Row, *, beta: Any) -> Any:
    return nls(beta * p.h_w / p.nw - beta * p.h_l / p.nl)


@each
def dpop(p: Row, *, beta: Any, penalty: Any) -> Any:
    return nls(beta * (p.h - penalty * max(mpf(0), p.rw - p.w)))


def beta_dpo(units: Rows, given: Rows, *, beta: Any, sensitivity: Any, typical_margin: Any) -> list[Any]:
    dynamic = (1 + sensitivity * (mean([beta * g.h for g in given]) - typical_margin)) * beta
    return [nls(max(dynamic, mpf("0.001")) * u.h) for u in units]


@each
def ipo(p: Row, *, beta: Any, lengths: str) -> Any:
    h = p.h_w / p.nw - p.h_l / p.nl if lengths == "mean" else p.h
    return (h - 1 / (2 * beta)) ** 2


@each
def hinge(p: Row, *, beta: Any) -> Any:
    return max(mpf(0), 1 - beta * p.h)


@each
def exo(p: Row, *, beta: Any, label_smoothing: Any) -> Any:
    ours = [mp.exp(beta * p.h_w), mp.exp(beta * p.h_l)]
    data = [1 - label_smoothing, label_smoothing]
    return sum(o / sum(ours) * mp.log(o / sum(ours) / d) for o, d in zip(ours, data, strict=True))


@each
def discopop(p: Row, *, beta: Any, tau: Any) -> Any:
    rho = beta * p.h
    switch = sigma(rho / tau)
    return (1 - switch) * mp.log(1 + mp.exp(-rho)) + switch * mp.exp(-rho)


@each
def nca(p: Row, *, beta: Any) -> Any:
    return nls(beta * p.h_w) + (nls(-beta * p.h_w) + nls(-beta * p.h_l)) / 2


@each
def sppo(p: Row, *, beta: Any) -> Any:
    eta = 1 / beta
    wins, loses = p.confidence, 1 - p.confidence
    return (p.h_w - eta * (wins - mpf(1) / 2)) ** 2 + (p.h_l - eta * (loses - mpf(1) / 2)) ** 2


@each
def apo_zero(p: Row, *, beta: Any) -> Any:
    return 1 - sigma(beta * p.h_w) + sigma(beta * p.h_l)


@each
def apo_down(p: Row, *, beta: Any) -> Any:
    return sigma(beta * p.h_w) + 1 - sigma(beta * p.h_w - beta * p.h_l)


def bco_pair(units: Rows, given: Rows, *, beta: Any, shift: bool) -> list[Any]:
    delta = (mean([beta * g.h_w for g in given]) + mean([beta * g.h_l for g in given])) / 2 if shift else 0
    return [nls(beta * u.h_w - delta) + nls(-(beta * u.h_l - delta)) for u in units]


def aot(units: Rows, given: Rows, *, beta: Any) -> list[Any]:
    """In the order of the sorted margins: the losses belong to ranks."""
    policy, reference = sorted(u.w - u.l for u in units), sorted(u.rw - u.rl for u in units)
    return [nls(beta * (a - b)) for a, b in zip(policy, reference, strict=True)]


def aot_unpaired(units: Rows, given: Rows, *, beta: Any) -> list[Any]:
    chosen, rejected = sorted(u.h_w for u in units), sorted(u.h_l for u in units)
    return [nls(beta * (a - b)) for a, b in zip(chosen, rejected, strict=True)]


@each
def tdpo1(p: Row, *, beta: Any) -> Any:
    u, delta = beta * p.h, beta * p.kl_l - beta * p.kl_w
    return nls(u - delta)


def tdpo2(units: Rows, given: Rows, *, beta: Any, kl_weight: Any) -> list[Any]:
    return [nls(beta * p.h - kl_weight * (beta * p.kl_l - beta * g.kl_w)) for p, g in zip(units, given, strict=True)]


def plackett_luce(units: Rows, given: Rows, *, beta: Any) -> list[Any]:
    lists: list[list[Any]] = []
    for u in units:
        if u.opens:
            lists.append([])
        lists[-1].append(mp.exp(beta * u.h_w))
    return [-sum(mp.log(odds[k] / sum(odds[k:])) for k in range(len(odds))) for odds in lists]


# Pairs without one


@each
def orpo(p: Row, *, odds_weight: Any) -> Any:
    chosen, rejected = mp.exp(p.w / p.nw), mp.exp(p.l / p.nl)
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    return -mp.log(chosen) + odds_weight * mp.log(1 + 1 / ratio)


@each
def simpo(p: Row, *, beta: Any, gamma: Any) -> Any:
    return nls(beta / p.nw * p.w - beta / p.nl * p.l - gamma)


@each
def cpo(p: Row, *, beta: Any, nll_weight: Any, nll: str) -> Any:
    return nls(beta * p.w - beta * p.l) - nll_weight * (p.w / p.nw if nll == "mean" else p.w)


@each
def preferred_ft(p: Row, *, lengths: str) -> Any:
    return -p.w / p.nw if lengths == "mean" else -p.w


# Responses by themselves, and scores


def kto(units: Rows, given: Rows, *, beta: Any, desirable_weight: Any, undesirable_weight: Any) -> list[Any]:
    z = max(mpf(0), mean([g.other for g in given]))

    def value(u: Row) -> Any:
        if u.desirable:
            return desirable_weight * sigma(beta * (u.h_w - z))
        return undesirable_weight * sigma(beta * (z - u.h_w))

    return [(desirable_weight if u.desirable else undesirable_weight) - value(u) for u in units]


def bco(units: Rows, given: Rows, *, beta: Any, desirable_weight: Any, undesirable_weight: Any) -> list[Any]:
    means = [mean([beta * g.h_w for g in given if g.desirable is kind] or [mpf(0)]) for kind in (True, False)]
    delta = sum(means) / 2
    return [
        desirable_weight * nls(beta * u.h_w - delta) if u.desirable else undesirable_weight * nls(-(beta * u.h_w - delta))
        for u in units
    ]


@each
def apo_zero_unpaired(u: Row, *, beta: Any, desirable_weight: Any, undesirable_weight: Any) -> Any:
    return desirable_weight * (1 - sigma(beta * u.h_w)) if u.desirable else undesirable_weight * sigma(beta * u.h_w)


@each
def bradley_terry(p: Row, *, margin: Any, centering: Any) -> Any:
    return nls(p.w - p.l - margin * p.margin) + centering * (p.w + p.l) ** 2


# Modifiers: what a log-ratio becomes


def f_prime(u: Any, divergence: Any) -> Any:
    """f'(u) of table 1 of f-DPO, each without its constant: 0 at u = 1."""
    if divergence == "reverse_kl":
        return mp.log(u)
    if divergence == "forward_kl":
        return 1 - 1 / u
    if divergence == "js":
        return mp.log(2 * u / (1 + u))
    return (1 - u ** (-mpf(divergence))) / mpf(divergence)
