"""Findings about where a run came from, and how it ended: its reference, how likely the data were to it, what was cut."""

from __future__ import annotations

from preftune.diagnose.case import SIDES, Case
from preftune.diagnose.finding import Finding, Severity, skipped

SAME = (1e-3, 0.5)
"""KL of a response at step 0 that rounding can make: in float32, and where products are in bf16."""

OFF_POLICY = (1.0, 3.0)
"""Nats a token by which the data's responses are less likely to the reference than what it says itself."""

CUT = (0.05, 0.25)
"""Share of responses that lost their end."""


def reference_mismatch(case: Case) -> Finding:
    """Before the first update the policy should be its reference, so that every margin is 0."""
    name = "reference_mismatch"
    first = next((row for row in (*case.held_out[:1], *case.train[:1]) if row["step"] == 0 and row.get("kl") is not None), None)
    if first is None:
        return skipped(name, "the objective has no reference, or the run has no first step")
    exact = case.config.precision == "fp32" or "CPU" in str(case.about.get("device", "")) and case.config.precision == "auto"
    tokens = max([first.get(f"lengths/{side}", 1.0) for side in SIDES])
    margin = first.get("rewards/margins", 0.0)
    numbers = {
        "kl_at_start": first["kl"],
        "margin_at_start": margin,
        "kl_per_token": first["kl"] / tokens,
    }
    said = f"at step 0 KL from the reference is {first['kl']:.3g} nats a response, the mean margin {margin:+.3g}"
    if first["kl"] <= SAME[not exact]:
        return Finding(name, "ok", said, numbers=numbers)
    given = case.config.reference
    severity: Severity = "error" if first["kl"] / tokens > 0.1 else "warning"
    return Finding(
        name,
        severity,
        f"the policy is not its reference at the start: {said}",
        f"model={case.config.model} and reference={given} are different models: train the model that the reference is (usually "
        "the SFT model), and leave reference= out" if given else
        "reference log-probs of another model or template: delete the cache folder (cache=); see `preftune check --model`",
        numbers,
    )  # fmt: skip


def off_policy(case: Case) -> Finding:
    """Responses that the reference would hardly say: DPO then moves mass between things that nobody samples."""
    name = "off_policy"
    own = case.evaluation.samples.reference if case.evaluation and case.evaluation.samples else None
    first = next((row for row in case.held_out[:1] if row["step"] == 0 and "logps/chosen" in row), None)
    if own is None or own.logp_per_token is None or first is None:
        return skipped(
            name,
            f"needs held-out log-probs of step 0 and the reference's answers; `preftune eval {case.place}` draws them",
        )
    sides: dict[str, float] = {side: first[f"logps/{side}"] / max(first[f"lengths/{side}"], 1.0) for side in SIDES}
    gap = own.logp_per_token.low - max(sides.values())
    own_logp = own.logp_per_token.value
    numbers = {"own": own_logp, **sides, "gap": own_logp - max(sides.values())}
    said = (
        f"to the reference the data's responses have {sides['chosen']:.2f} (chosen) and {sides['rejected']:.2f} (rejected) "
        f"nats a token, its own answers {own_logp:.2f}"
    )
    if gap < OFF_POLICY[0]:
        return Finding(name, "ok", said, numbers=numbers)
    return Finding(
        name, "error" if gap >= OFF_POLICY[1] else "warning", f"responses are far off-policy: {said}",
        "run SFT on the chosen responses first, or sample answers from the reference and have those judged "
        "(preftune sample, judge, pairs)",
        numbers,
    )  # fmt: skip


def truncated(case: Case) -> Finding:
    """Responses that lost their end: the policy learns not to stop."""
    n_cut, n = case.data.get("responses_truncated"), case.data.get("responses")
    if n_cut is None or not n:
        return skipped("truncated", "the run did not count its responses")
    share, longest = n_cut / n, case.config.batch.max_length
    numbers = {
        "n_truncated": n_cut,
        "n": n,
        "share": round(share, 4),
        "prompts_truncated": case.data.get("prompts_truncated", 0),
    }
    said = f"{n_cut} of {n} responses ({share:.1%}) lost their end"
    if share < CUT[0]:
        return Finding("truncated", "ok", said, numbers=numbers)
    return Finding(
        "truncated", "error" if share >= CUT[1] else "warning", f"{said}: the policy does not learn to stop there",
        f"raise batch.max_length (now {longest or 'the default'}), or leave long examples out", numbers,
    )  # fmt: skip


def stopped(case: Case) -> Finding:
    """Whether the run came to its end, and why not."""
    failed = next((event["message"] for event in reversed(case.events) if event.get("kind") == "failed"), "")
    numbers = {"steps": case.n_done, "planned": case.n_planned, "finished": case.finished}
    said = f"{case.n_done} of {case.n_planned} steps are done"
    if failed and not case.finished:
        nan = any(word in failed for word in ("nan", "inf", "not finite"))
        return Finding(
            "stopped", "error", f"training gave up after {case.n_done} steps: {failed}",
            "a tenth of optim.lr, optim.warmup=0.1, optim.clip=1, precision=fp32; look at the rows that it names" if nan
            else "do as it says, and start anew",
            numbers | {"not_finite": nan},
        )  # fmt: skip
    if not case.finished and case.n_done < case.n_planned:
        return Finding(
            "stopped", "note", f"{said}: it goes on, or was interrupted", f"preftune train --resume out={case.place}", numbers
        )
    return Finding("stopped", "ok", said, numbers=numbers)
