"""Findings about whether anything happened: nothing moved, updates lost to rounding, steps that are clipped every time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from preftune.diagnose.case import Case
from preftune.diagnose.finding import Finding, skipped

NO_WIN = 0.10
"""The largest gain in win rate that is called none."""

TINY = 2 * NO_WIN**2
"""Nats a response below which no judge can see more than NO_WIN: a probability differs by √(KL/2) at most (Pinsker)."""

SMALL = 1.0
"""KL of a response in nats up to which a win rate that cannot be told from one half is laid to too little movement."""

TELLING = 0.15
"""A win rate whose interval reaches further than this to either side says nothing either way."""

STILL = 0.5
"""With weights in bf16: the fraction that moved below which updates are called lost."""


class Cause(NamedTuple):
    """Why a policy has not moved: a name, the run's own numbers that say so, and what to do."""

    name: str
    said: str
    remedy: str


def no_effect(case: Case) -> Finding:
    """The policy is where it started: KL near 0, and the win rate is one half where it was measured."""
    name = "no_effect"
    if not case.finished and 2 * case.n_done < case.n_planned:
        return skipped(name, f"{case.n_done} of {case.n_planned} steps are done: too early to tell")
    kl = case.kl()
    far = max(kl.high, 0.0) if kl else case.shift()
    if far is None:
        return skipped(name, f"how far the policy went was not measured; `preftune eval {case.place}` does that")
    wins = case.wins
    numbers: dict[str, Any] = {"kl_per_response": kl.value if kl else far, "kl_per_response_upper": far}
    numbers |= {"win_rate": wins.win_rate.value, "win_interval": [wins.win_rate.low, wins.win_rate.high]} if wins else {}
    said = f"KL from the reference is {kl.value if kl else far:.2g} nats a response (at most {far:.2g})"
    low, high = (wins.win_rate.low / 100, wins.win_rate.high / 100) if wins else (0.0, 1.0)
    half = low <= 0.5 <= high
    telling = wins is not None and half and max(high - 0.5, 0.5 - low) <= TELLING
    rate = f", win rate {wins.win_rate.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]" if wins else ""
    if not half or (far >= TINY and not (telling and far < SMALL)):
        return Finding(name, "ok", said + rate, numbers=numbers)
    cause = why(case, far)
    bound = f"; no judge can see more than {50 + 100 * math.sqrt(far / 2):.0f} %" if far < TINY else ""
    return Finding(
        name,
        "error" if far < TINY else "warning",
        f"alignment had no effect: {said}{bound}{rate}. Cause: {cause.said}",
        cause.remedy,
        numbers | {"cause": cause.name} | _evidence(case),
    )


def why(case: Case, far: float) -> Cause:
    """The likely cause, by the run's own numbers; the first that applies."""
    return (
        _no_gradient(case)
        or _lost(case)
        or _warm_up(case)
        or _few_steps(case)
        or _adapters(case)
        or _beta(case)
        or _labels(case)
        or _learning_rate(case, far)
    )


def _no_gradient(case: Case) -> Cause | None:
    norms = [row["grad_norm"] for row in case.train]
    if not norms or max(norms) > 0:
        return None
    return Cause(
        "frozen",
        f"the gradient was 0 in all {len(norms)} steps: nothing that learns takes part in the answers",
        "check lora.targets (all-linear is safe), and that pairs differ in their responses",
    )


def _lost(case: Case) -> Cause | None:
    moved = _last(case, "weights_moved")
    if case.config.precision != "pure_bf16" or moved is None or moved >= STILL:
        return None
    return Cause(
        "bf16",
        f"updates are lost in bf16: {moved:.1%} of the weights differ from their start after {case.n_done} steps, since an "
        f"update of optim.lr={case.config.optim.lr:g} is below what bf16 resolves",
        "train with precision=bf16 (float32 weights, bf16 products), or fp32",
    )


def _warm_up(case: Case) -> Cause | None:
    peak, rates = case.config.optim.lr, [row["learning_rate"] for row in case.train]
    warmup = case.config.optim.warmup
    n_warmup = warmup * case.n_planned if warmup < 1 else warmup
    if not rates or peak is None or n_warmup < case.n_done or max(rates) > 0.5 * peak:
        return None
    return Cause(
        "warm_up",
        f"the warm-up was never over: {n_warmup:.0f} steps of it, {case.n_done} done; the learning rate came to "
        f"{max(rates):.2g} of {peak:.2g}",
        "set optim.warmup to a fraction below 1, such as 0.1",
    )


def _few_steps(case: Case) -> Cause | None:
    epochs = case.train[-1].get("epoch", 1.0) if case.train else 0.0
    if case.n_done >= 30 or epochs >= 1:
        return None
    return Cause(
        "steps",
        f"few steps: {case.n_done}, {epochs:.2g} of a pass over the data",
        "train for an epoch or more (epochs=1, no steps=), or take smaller steps of more of them (batch.pairs_per_step)",
    )


def _adapters(case: Case) -> Cause | None:
    """Adapters that move while the model does not: scaled to nothing, or at the wrong place."""
    lora, way = case.config.lora, _last(case, "weights_change")
    if not lora.r or way is None or way < 0.005:
        return None
    learns, total = case.about.get("weights_trained"), case.about.get("weights")
    share = f", {learns:,} of {total:,} weights learn" if learns and total else ""
    return Cause(
        "lora",
        f"the adapters moved by {way:.1%} of their norm and the model did not: their product is scaled by alpha / r = "
        f"{lora.alpha / lora.r:.2g}, and they stand at {lora.targets}{share}",
        "set lora.alpha to about 2 · lora.r and lora.targets=all-linear",
    )


def _beta(case: Case) -> Cause | None:
    """The objective is saturated (its rewards differ by much) by log-ratios that hardly differ."""
    beta = case.config.loss_parameters.get("beta")
    margins = [row["rewards/margins"] for row in case.train if row.get("rewards/margins") is not None]
    losses = [row["loss"] for row in case.train]
    if beta is None or len(margins) < 3 or beta < 1:
        return None
    largest, way = max(abs(m) for m in margins), max(abs(loss - losses[0]) for loss in losses)
    if largest < 0.3 and way < 0.2:
        return None
    return Cause(
        "beta",
        f"loss.beta={beta:g} is too large: rewards came to differ by {largest:.2g}, so the loss was content, while "
        f"log-ratios differ by {largest / beta:.2g} nats",
        "set loss.beta to between 0.05 and 0.5: a larger β holds the policy closer to the reference",
    )


def _labels(case: Case) -> Cause | None:
    accuracy, way = case.accuracy(), _last(case, "weights_change")
    if accuracy is None or way is None or way < 0.005 or not accuracy.low <= 0.5 <= accuracy.high:
        return None
    return Cause(
        "labels",
        f"weights moved (by {way:.1%} of their norm), but the labels teach nothing that holds on unseen pairs: accuracy "
        f"there {_percent(accuracy)}",
        "look at the finding `preferences`, and run `preftune check` on the data",
    )


def _learning_rate(case: Case, far: float) -> Cause:
    lr, way = case.config.optim.lr or 0.0, _last(case, "weights_change")
    factor = min(max(1 / math.sqrt(max(far, 1e-12)), 2.0), 1e4)
    moved = f"the weights moved by {way:.2g} of their norm in {case.n_done} steps; " if way is not None else ""
    return Cause(
        "learning_rate",
        f"optim.lr={lr:g} is too low: {moved}KL grows with the square of the learning rate while it is small, so about "
        f"{factor:.2g} times as much gives 1 nat",
        f"try optim.lr={lr * factor:.1g}, or as many more steps",
    )


def _evidence(case: Case) -> dict[str, float]:
    names = ("weights_moved", "weights_change", "learning_rate", "grad_norm")
    found = {name: _last(case, name) for name in names} | {"steps": float(case.n_done)}
    return {name: value for name, value in found.items() if value is not None}


def lost_updates(case: Case) -> Finding:
    """Weights in bf16 that stay where they are."""
    name, moved = "lost_updates", _last(case, "weights_moved")
    if moved is None:
        return skipped(name, "the run has no steps yet, or did not count the weights that moved")
    numbers = {"weights_moved": moved, "steps": case.n_done, "precision": case.config.precision}
    said = f"{moved:.1%} of the weights differ from their start after {max(case.n_done - 1, 0)} updates"
    cause = _lost(case)
    if cause is None or case.n_done < 10:
        return Finding(name, "ok", said, numbers=numbers)
    return Finding(name, "error" if moved < 0.1 else "warning", cause.said, cause.remedy, numbers)


def clipped(case: Case) -> Finding:
    """Gradients that are scaled down at every step: the learning rate is then not what it seems."""
    limit = case.config.optim.clip
    norms = [row["grad_norm"] for row in case.train]
    if not norms or not limit:
        return skipped("clipped", "gradients are not clipped" if norms else "the run has no steps yet")
    share = sum(norm > limit for norm in norms) / len(norms)
    middle = sorted(norms)[len(norms) // 2]
    numbers = {"clipped": round(share, 4), "median_norm": middle, "clip": limit}
    said = (
        f"{share:.0%} of {len(norms)} steps were clipped; the median norm of the gradient is {middle:.3g}, optim.clip={limit:g}"
    )
    if share > 0.9 and middle > 10 * limit:
        return Finding("clipped", "note", said, "harmless with AdamW if it is steady; else raise optim.clip", numbers)
    return Finding("clipped", "ok", said, numbers=numbers)


def _last(case: Case, name: str) -> float | None:
    return next((row[name] for row in reversed(case.train) if row.get(name) is not None), None)


def _percent(share: tuple[float, float, float, int]) -> str:
    return f"{share[0]:.1%} [{share[1]:.1%}, {share[2]:.1%}]"
