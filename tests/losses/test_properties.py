"""What must hold of objectives beside their formulas: what they reduce to, what they pull on, and where they are content."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from objectives_for_tests import CASES, call, columns, defaults, plain_rows
from oracles_for_losses import Row
from torch import Tensor

from preftune.losses.records import PairLoss

ONE_PAIR = st.tuples(st.floats(-30, 0), st.floats(-30, 0), st.floats(-30, 0), st.floats(-30, 0)).map(lambda r: Row(*r))
FLIPPED = {"w": "l", "l": "w", "rw": "rl", "rl": "rw", "nw": "nl", "nl": "nw"}
CONTRASTIVE = ["dpo", "odpo", "dpo_norm", "hinge", "aot_unpaired", "tdpo1", "tdpo2", "simpo", "bradley_terry", "beta_dpo"]
"""Functions of the difference of two rewards, which fall as it grows."""
MONOTONE = [*CONTRASTIVE, "dpop", "dpo_soft", "aot", "apo_zero", "bco_pair", "cpo", "orpo", "exo"]
"""They fall, for one pair, as the chosen gains probability, and rise as the rejected does (exo: until it is as sure as 1−ε)."""


def losses(name: str, rows: list[Row], **parameters: Any) -> Tensor:
    return call(CASES[name].function, columns(rows), parameters).loss.detach()


def gradients(name: str, rows: list[Row], **parameters: Any) -> dict[str, Tensor]:
    values = columns(rows)
    call(CASES[name].function, values, parameters).loss.sum().backward()
    return {column: values[column].grad for column in ("w", "l") if values[column].grad is not None}  # type: ignore[misc]


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
@given(plain=plain_rows(most=6), data=st.data())
def test_order_of_units_changes_nothing(name: str, plain: list[tuple[Any, ...]], data: st.DataObject) -> None:
    rows = [Row(*r)._replace(opens=True) for r in plain]
    order = data.draw(st.permutations(range(len(rows))))
    there, back = losses(name, rows), losses(name, [rows[i] for i in order])
    if CASES[name].by_rank:  # equals may change places
        there, back, order = there.sort().values, back.sort().values, list(range(len(rows)))
    torch.testing.assert_close(back, there[list(order)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MONOTONE)
@given(row=ONE_PAIR)
def test_falls_as_the_chosen_gains_on_the_rejected(name: str, row: Row) -> None:
    for column, gradient in gradients(name, [row]).items():
        sign = -1 if column == "w" else 1
        assert sign * gradient.item() >= -1e-12


@pytest.mark.parametrize("name", CONTRASTIVE)
@given(row=ONE_PAIR)
def test_who_has_the_larger_reward_has_the_smaller_loss(name: str, row: Row) -> None:
    """Accuracy, which is read off the rewards, never disagrees with the loss."""
    row = row._replace(nw=3.0, nl=7.0)
    other = row._replace(**{mine: getattr(row, theirs) for mine, theirs in FLIPPED.items()})
    found = call(CASES[name].function, columns([row]), {})
    assert isinstance(found, PairLoss)
    if found.chosen_reward > found.rejected_reward:
        assert found.loss.item() <= losses(name, [other]).item() + 1e-12


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "dpop", "beta_dpo", "aot", "aot_unpaired", "tdpo1", "tdpo2"])
def test_at_the_reference_the_loss_is_ln_2(name: str) -> None:
    assert losses(name, [Row(-7.0, -9.0, -7.0, -9.0, 3.0, 4.0)]).item() == pytest.approx(math.log(2), abs=1e-15)


def test_a_larger_beta_asks_for_a_smaller_log_ratio() -> None:
    """β is the tie to the reference: at the same log-ratio a larger one is sooner content."""
    pulls = [abs(gradients("dpo", [Row(5.0)], beta=beta)["w"].item()) / beta for beta in (0.01, 0.1, 1.0)]
    assert pulls[0] > pulls[1] > pulls[2]


# What reduces to what

REDUCTIONS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "robust without noise is dpo": ("robust", {"label_smoothing": 0.0}, "dpo", {}),
    "odpo without offset is dpo": ("odpo", {"offset": 0.0}, "dpo", {}),
    "dpop without penalty is dpo": ("dpop", {"penalty": 0.0, "beta": 0.1}, "dpo", {}),
    "beta_dpo that is not sensitive is dpo": ("beta_dpo", {"sensitivity": 0.0}, "dpo", {}),
    "tdpo1 is tdpo2 with a weight of 1": ("tdpo2", {"kl_weight": 1.0}, "tdpo1", {}),
    "tdpo2 without weight is dpo": ("tdpo2", {"kl_weight": 0.0}, "dpo", {}),
    "cpo without likelihood is dpo of a uniform reference": ("cpo", {"nll_weight": 0.0}, "dpo", {}),
    "orpo without odds is preferred_ft": ("orpo", {"odds_weight": 0.0}, "preferred_ft", {}),
}


@pytest.mark.parametrize("what", REDUCTIONS)
@given(plain=plain_rows())
def test_reduces_to_what_it_generalises(what: str, plain: list[tuple[Any, ...]]) -> None:
    name, parameters, simple, its = REDUCTIONS[what]
    rows = [Row(*r) for r in plain]
    if "uniform reference" in what:
        rows = [r._replace(rw=0.0, rl=0.0) for r in rows]
    torch.testing.assert_close(losses(name, rows, **parameters), losses(simple, rows, **its), rtol=1e-12, atol=1e-12)


@given(plain=plain_rows())
def test_what_depends_on_the_data_reduces_too(plain: list[tuple[Any, ...]]) -> None:
    rows = [Row(*r)._replace(confidence=1.0, margin=0.0, kl_w=0.0, kl_l=0.0) for r in plain]
    as_dpo = losses("dpo", rows)
    for name in ("dpo_soft", "odpo", "tdpo1", "tdpo2"):
        assert torch.equal(losses(name, rows), as_dpo), name
    lists = [Row(w=logp, rw=ref, opens=k == 0) for r in rows for k, (logp, ref) in enumerate(((r.w, r.rw), (r.l, r.rl)))]
    torch.testing.assert_close(losses("plackett_luce", lists), as_dpo, rtol=1e-12, atol=1e-12)
    one_token = [r._replace(nw=1.0, nl=1.0) for r in rows]
    assert torch.equal(losses("dpo_norm", one_token, beta=0.1), as_dpo)
    assert torch.equal(losses("ipo", one_token), losses("ipo", one_token, lengths="sum"))


@given(plain=plain_rows())
def test_paired_and_unpaired_are_the_same_terms(plain: list[tuple[Any, ...]]) -> None:
    rows = [Row(*r) for r in plain]
    good = [r._replace(desirable=True) for r in rows]
    bad = [Row(w=r.l, rw=r.rl, desirable=False) for r in rows]
    terms = losses("apo_zero_unpaired", good + bad).view(2, -1).sum(0)
    torch.testing.assert_close(terms, losses("apo_zero", rows), rtol=1e-12, atol=1e-12)
    terms = losses("bco", good + bad).view(2, -1).sum(0)
    torch.testing.assert_close(terms, losses("bco_pair", rows), rtol=1e-12, atol=1e-12)
    without_kl = [r._replace(other=-1.0) for r in good + bad]
    assert torch.equal(losses("kto", without_kl), losses("apo_zero_unpaired", good + bad)), "below 0 the KL counts as 0"


def test_one_response_has_no_rank() -> None:
    assert losses("plackett_luce", [Row(-3.0), Row(-1.0)]).tolist() == [0.0, 0.0]


# What they aim at


@pytest.mark.parametrize(
    ("name", "parameters", "confidence", "target"),
    [
        ("ipo", {"beta": 0.25, "lengths": "sum"}, 1.0, 2.0),
        ("exo", {"beta": 0.5, "label_smoothing": 0.2}, 1.0, math.log(0.8 / 0.2) / 0.5),
        ("dpo", {"beta": 0.5, "label_smoothing": 0.2}, 1.0, math.log(0.8 / 0.2) / 0.5),
        ("dpo_soft", {"beta": 0.5}, 0.8, math.log(0.8 / 0.2) / 0.5),
        ("sppo", {"beta": 0.25}, 0.75, 1.0),
    ],
)
def test_is_least_where_the_paper_says(name: str, parameters: dict[str, Any], confidence: float, target: float) -> None:
    rows = [Row(w=target + d, confidence=confidence) for d in (-0.1, 0.0, 0.1)]
    below, at, above = losses(name, rows, **parameters)
    assert at < below and at < above
    assert gradients(name, [rows[1]], **parameters)["w"].item() == pytest.approx(0, abs=1e-12)


@given(st.floats(-20, 20), st.floats(0.01, 0.45))
def test_robust_is_unbiased_under_its_noise(h: float, noise: float) -> None:
    """On average over swapping a pair with probability ε it is DPO's loss of the pair as it should be."""
    right, swapped = losses("robust", [Row(w=h), Row(w=-h)], label_smoothing=noise)
    expected = (1 - noise) * right + noise * swapped
    assert expected.item() == pytest.approx(losses("dpo", [Row(w=h)]).item(), rel=1e-9, abs=1e-12)


def test_a_class_that_the_step_lacks_counts_as_the_reference() -> None:
    rows = [Row(w=3.0), Row(w=5.0)]
    delta = 0.1 * (3.0 + 5.0) / 2 / 2
    assert losses("bco", rows).tolist() == pytest.approx([math.log1p(math.exp(delta - 0.1 * r.w)) for r in rows], rel=1e-12)


def test_kto_weighs_the_classes() -> None:
    rows = [Row(w=1.0), Row(w=1.0, desirable=False)]
    plain, weighted = losses("kto", rows), losses("kto", rows, desirable_weight=2.0, undesirable_weight=0.5)
    assert (weighted / plain).tolist() == [2.0, 0.5]


def test_defaults_are_what_the_docs_say() -> None:
    """A default that changes is a change that users have to hear of."""
    assert {
        name: defaults(case.function) for name, case in CASES.items() if defaults(case.function) != {"beta": 0.1}
    } == DEFAULTS


DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "odpo": {"beta": 0.1, "offset": 1.0},
    "dpo_norm": {"beta": 5.0},
    "dpop": {"beta": 0.3, "penalty": 50.0},
    "beta_dpo": {"beta": 0.1, "sensitivity": 0.6, "typical_margin": 0.0},
    "ipo": {"beta": 0.1, "lengths": "mean"},
    "exo": {"beta": 0.1, "label_smoothing": 1e-3},
    "discopop": {"beta": 0.05, "tau": 0.05},
    "nca": {"beta": 0.01},
    "bco_pair": {"beta": 0.1, "shift": True},
    "tdpo2": {"beta": 0.1, "kl_weight": 0.5},
    "orpo": {"odds_weight": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "cpo": {"beta": 0.1, "nll_weight": 1.0, "nll": "mean"},
    "preferred_ft": {"lengths": "mean"},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "bco": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "apo_zero_unpaired": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "bradley_terry": {"margin": 0.0, "centering": 0.0},
}
