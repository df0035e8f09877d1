"""Findings about what came out: drifted, longer, forgetful, timid, or no better although the loss fell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from preftune.diagnose.case import Case, scaled
from preftune.diagnose.effect import SMALL, TINY
from preftune.diagnose.features import refuses
from preftune.diagnose.finding import ORDER, Finding, Severity, skipped
from preftune.diagnose.fit import data_of, percent
from preftune.diagnose.share import Share, share
from preftune.evaluate.estimate import Estimate, wilson

FAR, LOST = 0.3, 1.0
"""KL in nats a token: far, which harms where something else shows it too; and lost, e times as likely at every token."""

DAMAGE = 0.05
"""Fractions (of answers that end, of repeated 4-grams) from which a surely larger change is called damage."""

LONGER, MUCH_LONGER = 1.25, 1.5
"""Ratio of the lengths of policy's and reference's answers, surely."""

FORGOTTEN = (0.1, 0.3, 0.693)
"""Nats a token by which other text became less likely, surely: perplexity up by a tenth, by a third, and doubled."""

WORSE_AT = (0.0, 0.01, 0.1)
"""Fall of a benchmark's accuracy, surely: a note, a warning, an error."""

REFUSING = (0.05, 0.25)
"""Share of answers that refuse, beyond the reference's, surely."""


def drifted(case: Case) -> Finding:
    """The policy went so far that its answers broke: KL a token, and what shows of it."""
    name, kl = "drifted", case.kl_per_token()
    if kl is None:
        return skipped(name, f"KL was not measured; `preftune eval {case.place}` measures it on the policy's own answers")
    whole, signs = case.kl(), damage(case)
    numbers = {"kl_per_token": kl.value, "kl_per_token_interval": [kl.low, kl.high], "signs": signs}
    numbers |= {"kl_per_response": whole.value} if whole else {}
    said = f"KL from the reference is {kl.value:.3f} nats a token [{kl.low:.3f}, {kl.high:.3f}]"
    said += f", {whole.value:.2f} a response" if whole else ""
    if kl.low < FAR or (kl.low < LOST and not signs):
        if not signs or kl.high < FAR / 5:
            return Finding(name, "ok", said, numbers=numbers)
        return Finding(name, "note", f"{said}; {'; '.join(signs)}", "read samples: preftune report shows them", numbers)
    severity: Severity = "error" if kl.low >= LOST and (signs or case.evaluation is None) else "warning"
    return Finding(
        name,
        severity,
        f"the policy drifted too far: {said}{'; ' if signs else ''}{'; '.join(signs)}",
        f"lower optim.lr (now {case.config.optim.lr or 0:g}), larger loss.beta, fewer epochs or eval.patience=2; answers that "
        "it samples itself, judged anew, instead of more passes over old ones",
        numbers,
    )


def damage(case: Case) -> list[str]:
    """What shows in the policy's answers, against the reference's, that something broke; sure changes only."""
    samples, found = (case.evaluation.samples if case.evaluation else None), []
    if samples is not None and samples.reference is not None:
        ours, theirs = samples.policy, samples.reference
        if ours.ended.high < theirs.ended.low - DAMAGE:
            found.append(
                f"{1 - ours.ended.value:.0%} of the answers do not end by themselves ({1 - theirs.ended.value:.0%} before)"
            )
        if ours.repetition.low > theirs.repetition.high + DAMAGE:
            found.append(f"{ours.repetition.value:.0%} of the 4-grams are repeated ({theirs.repetition.value:.0%} before)")
        if ours.unique < 0.5 * theirs.unique:
            found.append(f"{ours.unique:.0%} of the answers differ from each other ({theirs.unique:.0%} before)")
    for text in case.evaluation.perplexity if case.evaluation else ():
        if text.change is not None and text.change.low > FORGOTTEN[0]:
            found.append(f"perplexity of {text.name} is {text.policy:.3g} ({text.reference or 0:.3g} before)")
    wins = case.wins
    if wins is not None and wins.win_rate.low <= 50:
        found.append(f"win rate {wins.win_rate.value:.1f} % [{wins.win_rate.low:.1f}, {wins.win_rate.high:.1f}]")
    return found


def length_bias(case: Case) -> Finding:
    """Answers grew against the reference's, and are no better at equal length."""
    name = "length_bias"
    samples = case.evaluation.samples if case.evaluation else None
    if samples is None or samples.reference is None:
        return skipped(name, f"lengths of answers were not measured; `preftune eval {case.place}` does that")
    ours, theirs = samples.policy.tokens, samples.reference.tokens
    ends = max(ours.low, 0.0) / theirs.high, ours.high / max(theirs.low, 1e-9)  # of one prompt an interval has no end
    ratio = Estimate(ours.value / theirs.value, *ends, ours.n)
    matched = matched_gain(case)
    numbers = {"ratio": ratio.value, "ratio_interval": [ratio.low, ratio.high], "tokens": ours.value, "before": theirs.value}
    numbers |= {"matched": matched[0].value, "matched_interval": [matched[0].low, matched[0].high]} if matched else {}
    said = f"answers are {ours.value:.1f} tokens long, {theirs.value:.1f} before: × {ratio.value:.2f}"
    said += f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    said += f"; {matched[1]} {percent(matched[0])}" if matched else ""
    better = matched is not None and matched[0].low > 0.5
    if ratio.low < LONGER or (better and ratio.low < MUCH_LONGER):
        return Finding(name, "note" if ratio.low > 1.1 else "ok", said, numbers=numbers)
    wins = case.wins
    severity: Severity = "note" if better else "error" if wins is not None and wins.win_rate.low <= 50 else "warning"
    return Finding(
        name, severity, f"length was learnt: {said}" if not better else f"{said}: longer, and better at equal length too",
        f"see how often the longer response wins (`preftune check {data_of(case)} --only length`); a length-normalised loss "
        "(dpo_norm, simpo, loss.length_margin), balanced pairs, length-controlled win rates",
        numbers,
    )  # fmt: skip


def matched_gain(case: Case) -> tuple[Estimate, str] | None:
    """How good the policy is where length decides nothing: win rate among answers of about equal length, or of pairs."""
    wins = case.wins
    if wins is not None and wins.length_controlled is not None:
        found = wins.length_controlled
        return scaled(found, 0.01), "length-controlled win rate"
    near = [one for low, high, one in (wins.by_length if wins else ()) if low <= 1 <= high and one.n >= 5]
    if near:
        return near[0], "win rate among answers of about equal length"
    held_out = case.evaluation.held_out if case.evaluation else None
    if held_out is not None and held_out.length_matched is not None:
        return held_out.length_matched, "accuracy on pairs of about equal length"
    return None


def forgetting(case: Case) -> Finding:
    """Ability that the preferences do not speak of: perplexity of other text, benchmarks."""
    name, found = "forgetting", [*_texts(case), *_benchmarks(case)]
    if not found:
        return skipped(name, f"nothing to compare on; `preftune eval {case.place} --perplexity FILE` measures general ability")
    worst = max(found, key=lambda loss: (ORDER.index("ok") - ORDER.index(loss.severity), loss.value))
    said, numbers = "; ".join(loss.said for loss in found), {loss.name: loss.numbers for loss in found}
    if worst.severity == "ok":
        return Finding(name, "ok", said, numbers=numbers)
    return Finding(
        name, worst.severity, said if worst.severity == "note" else f"general ability was lost: {said}",
        "mix SFT in (loss: [dpo, {name: preferred_ft, weight: 0.1}], or general examples), larger loss.beta, LoRA",
        numbers,
    )  # fmt: skip


class _Loss(NamedTuple):
    """What was lost on one text or benchmark."""

    name: str
    severity: Severity
    value: float
    said: str
    numbers: dict[str, float | None]


def _texts(case: Case) -> Iterator[_Loss]:
    for text in case.evaluation.perplexity if case.evaluation else ():
        if (change := text.change) is not None:
            numbers = {"change": change.value, "low": change.low, "high": change.high, "perplexity": text.policy,
                       "before": text.reference}  # fmt: skip
            said = (
                f"perplexity of {text.name} is {text.policy:.3g}, {text.reference or 0:.3g} before: {change.value:+.3f} nats a "
                f"token [{change.low:+.3f}, {change.high:+.3f}]"
            )
            yield _Loss(text.name, _lost(change.low, FORGOTTEN), change.low, said, numbers)


def _benchmarks(case: Case) -> Iterator[_Loss]:
    """Accuracies of lm-evaluation-harness that fell, as if the two were measured on other documents."""
    for task, sides in (case.evaluation.benchmarks if case.evaluation else {}).items():
        ours, theirs = (_accuracy(sides.get(which, {})) for which in ("policy", "reference"))
        if ours is None or theirs is None:
            continue
        fall = theirs.value - ours.value
        surely = fall - math.hypot(theirs.value - theirs.low, ours.high - ours.value)  # Newcombe 1998, method 10
        said = f"accuracy on {task} is {percent(ours)}, {percent(theirs)} before, of {ours.n} documents"
        numbers: dict[str, float | None] = {"accuracy": ours.value, "before": theirs.value, "fall_low": surely}
        yield _Loss(task, _lost(surely, WORSE_AT), surely, said, numbers)


def _accuracy(metrics: Mapping[str, float]) -> Estimate | None:
    """Of one model on a task; None where the task has no accuracy, or did not count what was asked."""
    if "acc" not in metrics or not metrics.get("n"):
        return None
    return wilson(metrics["acc"] * metrics["n"], int(metrics["n"]))


def _lost(surely: float, thresholds: tuple[float, float, float]) -> Severity:
    note, warning, error = thresholds
    return "error" if surely >= error else "warning" if surely >= warning else "note" if surely >= note else "ok"


def conservative(case: Case) -> Finding:
    """Answers that refuse, or are all alike, where the reference's were not."""
    name = "conservative"
    if not case.answers:
        return skipped(name, f"no answers to read; `preftune eval {case.place}` writes them")
    shares = [_refusals(case, who) for who in ("policy", "reference")]
    ours, theirs = shares
    if ours is None:
        return skipped(name, "the answers hold no text")
    beyond = ours.surely_above - (theirs.high if theirs else 0.0)
    numbers = {"refusals": ours.value, "interval": ours.interval, "before": theirs.value if theirs else None}
    said = f"{ours} of {ours.n} answers refuse" + (f", {theirs} before" if theirs else "")
    if beyond < REFUSING[0]:
        return Finding(name, "ok", said, numbers=numbers)
    return Finding(
        name, "error" if beyond >= REFUSING[1] else "warning", f"too conservative: {said}",
        "add preferences whose chosen answer helps and whose rejected one refuses needlessly (`preftune check --only "
        "refusals`); mix SFT in, larger loss.beta, LoRA",
        numbers,
    )  # fmt: skip


def _refusals(case: Case, who: str) -> Share | None:
    texts = [(n, one["text"]) for n, row in enumerate(case.answers) for one in row.get(who) or ()]
    return share([refuses(text) for _, text in texts], [n for n, _ in texts]) if texts else None


def no_wins(case: Case) -> Finding:
    """The loss fell and answers are no better: what to look at, in the order in which it should be looked at."""
    name, wins, fall = "no_wins", case.wins, case.change("loss")
    if wins is None:
        return skipped(
            name, f"no win rate yet; `preftune eval {case.place}` with a judge (--judge-model, or --by) measures one"
        )
    if not wins.n_total:
        return skipped(name, f"{wins.judge} gave no verdict in {wins.n_unscored} comparisons: see the finding `judge`")
    rate = wins.win_rate
    said = f"win rate by {wins.judge} {rate.value:.1f} % [{rate.low:.1f}, {rate.high:.1f}] of {wins.n_total}"
    numbers = {"win_rate": rate.value, "interval": [rate.low, rate.high], "n": wins.n_total}
    if rate.low > 50:
        return Finding(name, "ok", said, numbers=numbers)
    if rate.high > 60:
        return Finding(name, "note", f"{said}: too few to tell", "judge more prompts", numbers)
    fell = fall is not None and fall[1].high < fall[0].low
    checks = [check(case) for check in CHECKS]
    found = next(
        (text for bad, text in checks if bad), "none of the four says why: read answers side by side (preftune report)"
    )
    numbers |= {"loss_fell": fell, "checks": [text for _, text in checks]}
    begun = "the loss fell" if fell else "the loss hardly fell"
    if fall is not None:
        begun += f" ({fall[0].value:.3f} to {fall[1].value:.3f})"
    severity: Severity = "error" if rate.high < 50 else "warning"
    but = "answers are worse" if severity == "error" else "answers are no better"
    return Finding(name, severity, f"{begun}, but {but}: {said}. First in the four checks: {found}", _ordered(checks), numbers)


def _ordered(checks: list[tuple[bool, str]]) -> str:
    return "check in this order: " + "; ".join(f"({n}) {text}" for n, (_, text) in enumerate(checks, 1))


def _held_out(case: Case) -> tuple[bool, str]:
    accuracy = case.accuracy()
    if accuracy is None:
        return True, "held-out accuracy: not measured (eval.fraction)"
    bad = accuracy.low <= 0.5
    return (
        bad,
        f"held-out accuracy {percent(accuracy)}: {'the preferences were not learnt' if bad else 'learnt, so look further'}",
    )


def _distance(case: Case) -> tuple[bool, str]:
    kl, token = case.kl(), case.kl_per_token()
    if kl is None or token is None:
        return False, "KL: not measured"
    said = f"KL {kl.value:.2g} nats a response, {token.value:.2g} a token"
    if kl.high < TINY or (kl.high < SMALL and token.high < FAR):
        return True, f"{said}: the policy hardly moved"
    return token.low > FAR, f"{said}: {'too far' if token.low > FAR else 'neither too little nor too far'}"


def _data_quality(case: Case) -> tuple[bool, str]:
    samples, accuracy, wins = case.evaluation.samples if case.evaluation else None, case.accuracy(), case.wins
    signs = []
    if samples is not None and samples.reference is not None and (
        samples.policy.tokens.low > LONGER * samples.reference.tokens.high
    ):  # fmt: skip
        signs.append("answers grew longer, so pairs may reward length")
    if wins is not None and wins.win_rate.high < 40 and accuracy is not None and accuracy.low > 0.5:
        signs.append("answers lose although unseen pairs are right, so chosen and rejected may be swapped in all files")
    signs.append(f"preftune check {data_of(case)} (length, surface, label_noise; --audit has a judge look)")
    return True, f"data quality: {'; '.join(signs)}"


def _evaluation(case: Case) -> tuple[bool, str]:
    wins = case.wins
    said = f"the evaluation: judge {wins.judge}, {wins.n_total} comparisons" if wins else "the evaluation"
    return True, f"{said}; does the judge want what the labels say? see the finding `judge`"


CHECKS: tuple[Callable[[Case], tuple[bool, str]], ...] = (_held_out, _distance, _data_quality, _evaluation)
"""What to look at when the loss falls and the win rate does not rise, in order: (whether it is bad, what was found)."""
