"""Findings about what was learnt of the preferences: nothing, the opposite, by heart, or too easily."""

from __future__ import annotations

import math

from preftune.diagnose.case import Case
from preftune.diagnose.finding import Finding, Severity, skipped
from preftune.evaluate.estimate import Estimate, wilson

GUESS, SWAPPED = 0.60, 0.45
"""Accuracy on unseen pairs: up to GUESS, with one half in the interval, it is guessing; below SWAPPED, and surely below one
half (or where answers surely lose), it is the opposite."""

GAP = 0.10
"""Accuracy on pairs learnt from less that on unseen ones, from which (surely) a policy is called overfitted."""

TRIVIAL = 0.95
"""Accuracy on unseen pairs of the first epoch from which (surely) pairs are called trivial."""

WORSE = 1.1
"""A held-out loss of so many times its best, where the gap is sure but small."""

FALLS = (0.05, 0.5, 1.0)
"""Nats a token by which the chosen fall: a note, a warning, an error."""


def preferences(case: Case) -> Finding:
    """Whether the preferences teach anything that holds on pairs that were not learnt from."""
    name, accuracy = "preferences", case.accuracy()
    if case.config.needs_rollouts:
        return skipped(name, f"{case.config.loss_name} learns from a reward of its own replies, and not from preferences")
    if accuracy is None:
        return skipped(name, f"no accuracy on unseen pairs yet; `preftune eval {case.place} --data HELD_OUT` measures one")
    held_out = case.held_out_accuracy or accuracy
    numbers = {"accuracy": accuracy.value, "interval": [accuracy.low, accuracy.high], "n_independent": accuracy.n,
               "held_out_accuracy": held_out.value, "held_out_interval": [held_out.low, held_out.high]}  # fmt: skip
    said = f"accuracy on pairs that were not learnt from is {percent(accuracy)} (worth {accuracy.n} independent ones)"
    lost = case.wins is not None and case.wins.win_rate.high < 50
    if held_out.value < SWAPPED and (held_out.high < 0.5 or lost):
        return Finding(
            name, "error", f"the opposite was learnt: {percent(held_out)} on held-out pairs{'; answers lose' if lost else ''}",
            "chosen and rejected are swapped in one of the files: look at a few rows of both, and swap the columns (fields=)",
            numbers | {"cause": "swapped"},
        )  # fmt: skip
    won = case.wins is not None and case.wins.win_rate.low > 50  # then something was learnt
    if accuracy.low <= 0.5 <= accuracy.high and accuracy.high < GUESS and not won:
        return Finding(
            name, "error", f"{said}: guessing. The preferences are noise, contradict each other, or are beyond the model",
            f"run `preftune check {data_of(case)}` (label_noise, contradictions), have a sample judged again (--audit), and "
            "train on pairs with clear winners",
            numbers | {"cause": "noise"},
        )  # fmt: skip
    severity: Severity = "note" if accuracy.low <= 0.5 else "ok"
    more = ": too few to tell from guessing" if severity == "note" else ""
    return Finding(name, severity, said + more, "hold out more (eval.fraction)" if more else "", numbers)


def overfitting(case: Case) -> Finding:
    """Pairs that were learnt from are right, unseen ones are not: memorised; and at which step it was best."""
    name = "overfitting"
    trained, held_out = case.trained_accuracy(), case.held_out_accuracy
    evals = [row for row in case.held_out if row.get("loss") is not None]
    if trained is None or held_out is None or len(evals) < 2:
        return skipped(
            name, "needs accuracy on held-out pairs (eval.fraction, eval.every) and more than one epoch, or an evaluation"
        )
    gap = trained.value - held_out.value
    half = math.hypot(trained.value - trained.low, held_out.high - held_out.value)  # Newcombe 1998, method 10
    best = min(evals, key=lambda row: row["loss"])
    worse = evals[-1]["loss"] / best["loss"] if best["loss"] > 0 else 1.0
    numbers = {"gap": gap, "gap_low": gap - half, "trained": trained.value, "held_out": held_out.value,
               "best_step": best["step"], "best_loss": best["loss"], "last_loss": evals[-1]["loss"]}  # fmt: skip
    said = (
        f"accuracy is {trained.value:.1%} on pairs learnt from and {held_out.value:.1%} on held-out ones, a gap of {gap:.1%} "
        f"[{gap - half:.1%}, {gap + half:.1%}]; held-out loss {evals[-1]['loss']:.3f}, at its best {best['loss']:.3f} after "
        f"{best['step']} steps"
    )
    if gap - half < GAP and not (gap - half > 0 and worse > WORSE and best["step"] < evals[-1]["step"]):
        return Finding(name, "ok", said, numbers=numbers)
    severity: Severity = "error" if evals[-1]["loss"] > evals[0]["loss"] and evals[0]["step"] == 0 else "warning"
    ahead = "; held out, the loss is above that of the untrained policy" if severity == "error" else ""
    stop = f"stop earlier: steps={best['step']}, or eval.patience=2 (which keeps the best step); " if best["step"] else (
        f"no step was better than none: lower optim.lr (now {case.config.optim.lr or 0:g}); "
    )  # fmt: skip
    remedy = f"{stop}fewer epochs, more prompts, a larger loss.beta or LoRA also help"
    return Finding(name, severity, f"overfitted: {said}{ahead}", remedy, numbers)


def trivial_pairs(case: Case) -> Finding:
    """Accuracy near 1 at once: the two sides differ in something trivial, or the held-out prompts were trained on."""
    name = "trivial_pairs"
    rows = [row for row in case.first_pass if row.get("rewards/accuracies") is not None]
    if len(rows) < 3:
        return skipped(name, "fewer than four steps with accuracies in the first epoch")
    n = len(rows) * case.config.batch.pairs_per_step * case.independent("train")
    early = wilson(sum(row["rewards/accuracies"] for row in rows) / len(rows) * round(n), round(n))
    leaked = next((event["message"] for event in case.events if "stand in the training data" in event.get("message", "")), "")
    numbers = {"accuracy": early.value, "interval": [early.low, early.high], "leaked": bool(leaked)}
    said = f"accuracy in the first epoch, before pairs were learnt from, is {percent(early)}"
    if early.low < TRIVIAL:
        return Finding(name, "note" if leaked else "ok", leaked or said, numbers=numbers)
    return Finding(
        name, "warning", f"{said}: the pairs are told apart by something trivial{'; ' + leaked if leaked else ''}",
        f"see what gives the winner away (`preftune check {data_of(case)}`: length, first_word, formatting, surface), and take "
        "rejected responses that are nearly as good; split by prompt",
        numbers,
    )  # fmt: skip


def displacement(case: Case) -> Finding:
    """Chosen responses become less likely: both sides fall, and what rises instead is in neither."""
    name = "displacement"
    chosen, rejected = case.log_ratio("chosen"), case.log_ratio("rejected")
    if chosen is None or rejected is None:
        return skipped(name, "log-probs of chosen responses were not measured against a start (eval.every above 0 does that)")
    falls = [-nats / max(tokens, 1.0) for nats, tokens in (chosen, rejected)]
    numbers = {"chosen_per_token": -falls[0], "rejected_per_token": -falls[1], "chosen": chosen[0], "rejected": rejected[0]}
    said = (
        f"log π/π_ref of chosen responses is {chosen[0]:+.2f} nats ({-falls[0]:+.3f} a token), of rejected ones "
        f"{rejected[0]:+.2f} ({-falls[1]:+.3f})"
    )
    if falls[0] < FALLS[0]:
        return Finding(name, "ok", said, numbers=numbers)
    severity: Severity = "error" if falls[0] >= FALLS[2] else "warning" if falls[0] >= FALLS[1] else "note"
    both = "both fall" if falls[1] > 0 else "chosen ones fall"
    return Finding(
        name, severity, f"likelihood is displaced, {both}: {said}. What becomes likelier is in neither of them",
        "add an SFT term on the chosen (loss: [dpo, {name: preferred_ft, weight: 0.1}]) or use dpop; larger loss.beta, lower "
        "optim.lr; pairs whose responses differ in more than a few words" if severity != "note" else
        "usual in DPO, and reward of chosen below 0 is the same thing; watch that samples stay good",
        numbers,
    )  # fmt: skip


def percent(share: Estimate) -> str:
    """A share with its interval."""
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


def data_of(case: Case) -> str:
    """The training data, as a command names it."""
    data = case.config.data
    return str(data[0] if isinstance(data, list) else data)
