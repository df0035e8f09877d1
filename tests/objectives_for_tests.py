"""The table of objectives that tests run through, each with its oracle and parameters, and plain rows as records."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import oracles_for_losses as oracles
import torch
from hypothesis import strategies as st
from oracles_for_losses import Oracle, Row, Rows
from torch import Tensor

from preftune.losses import dpo, margins, ranked, records, reference_free, reward, sides, token_level, transport, unpaired
from preftune.losses.records import PairLoss, ResponseLoss

BETA = st.sampled_from([0.01, 0.1, 0.5, 2.0])
HALF = st.sampled_from([0.0, 0.1, 0.4])
WEIGHT = st.sampled_from([0.0, 0.3, 3.0])
POSITIVE = st.sampled_from([0.3, 1.0, 3.0])
LENGTHS = st.sampled_from(["mean", "sum"])
CLASSES = {"beta": BETA, "desirable_weight": POSITIVE, "undesirable_weight": POSITIVE}
SMOOTH_EVERYWHERE: Callable[..., bool] = lambda rows, **_: True  # noqa: E731


class Case(NamedTuple):
    """An objective, its oracle, values for its parameters, and where it has no corner."""

    function: Callable[..., Any]
    oracle: Oracle
    parameters: dict[str, st.SearchStrategy[Any]]
    smooth: Callable[..., bool] = SMOOTH_EVERYWHERE
    by_rank: bool = False  # the oracle's losses stand in the order of ranks


def _no_corner_of_dpop(rows: Rows, **_: Any) -> bool:
    return all(r.w != r.rw for r in rows)


def _no_corner_of_hinge(rows: Rows, *, beta: float) -> bool:
    return all(abs(beta * r.h - 1) > 1e-9 for r in rows)


def _no_equals(rows: Rows, **_: Any) -> bool:
    """Which of two equal values is matched with what is open: the sum of losses is the same, the gradients change places."""
    return all(len({round(f(r), 9) for r in rows}) == len(rows) for f in (lambda r: r.w - r.l, Row.h_w.fget, Row.h_l.fget))


CASES: dict[str, Case] = {
    "dpo": Case(dpo.dpo, oracles.dpo, {"beta": BETA, "label_smoothing": HALF}),
    "robust": Case(dpo.robust, oracles.robust, {"beta": BETA, "label_smoothing": HALF}),
    "dpo_soft": Case(dpo.dpo_soft, oracles.dpo_soft, {"beta": BETA}),
    "odpo": Case(dpo.odpo, oracles.odpo, {"beta": BETA, "offset": WEIGHT}),
    "dpo_norm": Case(dpo.dpo_norm, oracles.dpo_norm, {"beta": BETA}),
    "dpop": Case(dpo.dpop, oracles.dpop, {"beta": BETA, "penalty": st.sampled_from([0.0, 5.0, 50.0])}, _no_corner_of_dpop),
    "beta_dpo": Case(
        dpo.beta_dpo,
        oracles.beta_dpo,
        {"beta": BETA, "sensitivity": WEIGHT, "typical_margin": st.sampled_from([-1.0, 0.0, 2.0])},
    ),
    "ipo": Case(margins.ipo, oracles.ipo, {"beta": BETA, "lengths": LENGTHS}),
    "hinge": Case(margins.hinge, oracles.hinge, {"beta": BETA}, _no_corner_of_hinge),
    "exo": Case(margins.exo, oracles.exo, {"beta": BETA, "label_smoothing": st.sampled_from([1e-6, 1e-3, 0.4])}),
    "discopop": Case(margins.discopop, oracles.discopop, {"beta": BETA, "tau": st.sampled_from([0.01, 0.05, 0.9])}),
    "nca": Case(sides.nca, oracles.nca, {"beta": BETA}),
    "sppo": Case(sides.sppo, oracles.sppo, {"beta": BETA}),
    "apo_zero": Case(sides.apo_zero, oracles.apo_zero, {"beta": BETA}),
    "apo_down": Case(sides.apo_down, oracles.apo_down, {"beta": BETA}),
    "bco_pair": Case(sides.bco_pair, oracles.bco_pair, {"beta": BETA, "shift": st.booleans()}),
    "aot": Case(transport.aot, oracles.aot, {"beta": BETA}, _no_equals, by_rank=True),
    "aot_unpaired": Case(transport.aot_unpaired, oracles.aot_unpaired, {"beta": BETA}, _no_equals, by_rank=True),
    "tdpo1": Case(token_level.tdpo1, oracles.tdpo1, {"beta": BETA}),
    "tdpo2": Case(token_level.tdpo2, oracles.tdpo2, {"beta": BETA, "kl_weight": WEIGHT}),
    "plackett_luce": Case(ranked.plackett_luce, oracles.plackett_luce, {"beta": BETA}),
    "orpo": Case(reference_free.orpo, oracles.orpo, {"odds_weight": WEIGHT}),
    "simpo": Case(reference_free.simpo, oracles.simpo, {"beta": BETA, "gamma": WEIGHT}),
    "cpo": Case(reference_free.cpo, oracles.cpo, {"beta": BETA, "nll_weight": WEIGHT, "nll": LENGTHS}),
    "preferred_ft": Case(reference_free.preferred_ft, oracles.preferred_ft, {"lengths": LENGTHS}),
    "kto": Case(unpaired.kto, oracles.kto, CLASSES),
    "bco": Case(unpaired.bco, oracles.bco, CLASSES),
    "apo_zero_unpaired": Case(unpaired.apo_zero_unpaired, oracles.apo_zero_unpaired, CLASSES),
    "bradley_terry": Case(reward.bradley_terry, oracles.bradley_terry, {"margin": WEIGHT, "centering": WEIGHT}),
}


# Rows as the records that a function asks for

LEARNT = ("w", "l", "kl_w", "kl_l")
FIELDS = {
    records.RefPairs: ("w", "l", "rw", "rl", "nw", "nl"),
    records.Pairs: ("w", "l", "nw", "nl"),
    records.Labels: ("w", "rw", "nw", "desirable"),
    records.Ranked: ("w", "rw", "nw"),
    records.Scores: ("w", "l"),
    records.Confidence: ("confidence",),
    records.Margin: ("margin",),
    records.SequentialKL: ("kl_w", "kl_l"),
    records.Mismatched: ("other",),
}


def columns(rows: Rows, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = {name: torch.tensor([getattr(r, name) for r in rows]) for name in ("desirable", "opens")}
    made |= {name: torch.tensor([getattr(r, name) for r in rows], dtype=dtype) for name in Row._fields if name not in made}
    for name in LEARNT:
        made[name].requires_grad_()
    return made


def record(kind: type, values: dict[str, Tensor]) -> Any:
    fields = [values[name] for name in FIELDS[kind]]
    if kind is records.Ranked:
        starts = [*values["opens"].nonzero().flatten().tolist(), len(values["opens"])]
        fields.append(torch.tensor([b - a for a, b in zip(starts, starts[1:], strict=False)]))
    return kind(*fields)


def call(function: Callable[..., Any], values: dict[str, Tensor], parameters: dict[str, Any]) -> PairLoss | ResponseLoss:
    """The function on records with these columns. What it asks for beside the units of a step carries no gradient."""
    hints = get_type_hints(function)
    kinds = [hints[p.name] for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    constant = {name: tensor.detach() for name, tensor in values.items()}
    args = [
        record(kind, values if place == 0 or kind is records.SequentialKL else constant) for place, kind in enumerate(kinds)
    ]
    return function(*args, **parameters)


# Inputs

NATS = st.floats(-300, 0).map(lambda x: x - 1e-6)
TOKENS = st.integers(1, 200).map(float)


@st.composite
def plain_rows(draw: st.DrawFn, most: int = 4) -> list[tuple[Any, ...]]:
    row = st.tuples(
        NATS, NATS, NATS, NATS, TOKENS, TOKENS, st.floats(0.5, 1), st.floats(0, 5), st.floats(0, 50), st.floats(0, 50),
        st.booleans(), st.floats(-20, 20), st.booleans(),
    )  # fmt: skip
    rows = draw(st.lists(row, min_size=1, max_size=most))
    return [(*rows[0][:-1], True), *rows[1:]]


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    own = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY}


def some_parameters(case: Case) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(case.parameters)
