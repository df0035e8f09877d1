"""Checks that need a model: what its tokenizer and template do to the data, and how far the data are from what it would say."""

from __future__ import annotations

import numpy as np

from preftune.data.tokens import Report
from preftune.diagnose.corpus import Corpus
from preftune.diagnose.finding import N_EXAMPLES, Evidence, Finding, Severity, skipped
from preftune.diagnose.share import share

_NO_MODEL = "no model was named (--model)"


def truncation(corpus: Corpus) -> Finding:
    """Responses and prompts that do not fit, and examples that are dropped for it."""
    report = corpus.report
    if report is None:
        return skipped("truncation", _NO_MODEL)
    n, n_dropped = report.n_examples, len(report.dropped)
    said = (
        f"{report.responses_truncated} responses lose their end, {report.prompts_truncated} prompts their beginning, "
        f"{n_dropped} of {n} examples are dropped; the longest kept takes {report.longest} tokens"
    )
    cut = report.responses_truncated + n_dropped
    if not cut and not report.prompts_truncated:
        return Finding("truncation", "ok", said, numbers=_counts(report))
    severity: Severity = "note"
    if cut:  # a cut response has no end of turn: the model learns to go on for ever
        severity = (
            "error" if share([True] * min(cut, n) + [False] * (n - min(cut, n)), range(n)).surely_above > 0.2 else "warning"
        )
    return Finding(
        "truncation",
        severity,
        said,
        "raise batch.max_length (--max-length here), or leave long ones out; a response without its end teaches not to stop",
        _counts(report),
        tuple(Evidence(place, reason) for place, reason in report.dropped[:N_EXAMPLES]),
    )


def template(corpus: Corpus) -> Finding:
    """Text prompts beside a chat template, special tokens written in the text, tokens that would merge across the boundary."""
    report = corpus.report
    if report is None:
        return skipped("template", _NO_MODEL)
    n = report.n_examples
    faults = {
        "examples contain the text of a special token, which the model reads as that token": report.special_in_text,
        "examples have a text prompt, to which the chat template is not applied": report.text_prompts,
        "replies were tokenized apart from a prompt whose last token they would change": report.boundary_merges,
    }
    said = "; ".join(f"{count} {what}" for what, count in faults.items() if count) or f"nothing odd in {n} examples"
    severity: Severity = (
        "warning" if report.special_in_text or report.text_prompts else "note" if report.boundary_merges else "ok"
    )
    remedy = (
        "give prompts as messages for a chat model, and take special tokens out of the text" if severity == "warning" else ""
    )
    return Finding("template", severity, said, remedy, _counts(report))


OFF_POLICY = {"note": 0.5, "warning": 1.0, "error": 3.0}
"""Nats a token by which the data are less likely than the model's own samples; docs/check.md says how these were measured."""


def distance(corpus: Corpus) -> Finding:
    """How far the responses are from what the reference would say itself: off-policy data, or the wrong reference."""
    scored = corpus.scored
    if scored is None:
        return skipped("distance", _NO_MODEL)
    sides: dict[str, list[float]] = {"chosen": [], "rejected": [], "all": []}
    for at, values in scored.data:
        sides["all"].append(float(np.mean(values)))
        for pair in corpus.examples[at].pairs:
            sides["chosen"].append(values[pair.winner])
            sides["rejected"].append(values[pair.loser])
    means = {name: float(np.mean(values)) for name, values in sides.items() if values}
    own = [float(np.mean(values)) for values in scored.own]
    gap = float(np.mean(own)) - means["all"]
    error = 1.96 * float(np.sqrt(np.var(own) / len(own) + np.var(sides["all"]) / len(sides["all"])))
    low, high = gap - error, gap + error
    severity: Severity = next((s for s in ("error", "warning", "note") if low > OFF_POLICY[s]), "ok")
    said = ", ".join(f"{name} {value:.2f}" for name, value in means.items() if name != "all") or f"responses {means['all']:.2f}"
    return Finding(
        "distance",
        severity,
        f"log-prob per token under the model: {said}, its own samples {np.mean(own):.2f}; the data are {gap:.2f} "
        f"[{low:.2f}, {high:.2f}] nats a token less likely",
        ""
        if severity == "ok"
        else "the data are not what this model says: train on the chosen responses first (loss.name=sft), or sample and judge "
        "its own; above 3 nats look at the template, the language and whether this is the right model",
        {
            "logp_per_token": {name: round(value, 4) for name, value in means.items()},
            "own_samples": round(float(np.mean(own)), 4),
            "gap": round(gap, 4),
            "gap_interval": [round(low, 4), round(high, 4)],
            "n_sampled_prompts": len(own),
        },
    )


def _counts(report: Report) -> dict[str, int]:
    return {
        "n_examples": report.n_examples,
        "n_dropped": len(report.dropped),
        "responses_truncated": report.responses_truncated,
        "prompts_truncated": report.prompts_truncated,
        "text_prompts": report.text_prompts,
        "special_in_text": report.special_in_text,
        "boundary_merges": report.boundary_merges,
        "longest": report.longest,
    }
