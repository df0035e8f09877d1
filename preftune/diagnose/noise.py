"""Checks of the labels: what a model of words cannot reconcile, how sure annotators were, margins against them."""

from __future__ import annotations

import numpy as np

from preftune.diagnose import features
from preftune.diagnose.corpus import Corpus
from preftune.diagnose.finding import N_EXAMPLES, Finding, skipped
from preftune.diagnose.learn import cross_validated, rows_of
from preftune.diagnose.share import graded, share
from preftune.diagnose.shortcuts import differences

MIN_PAIRS = 200
SUREST = 0.1
"""The share of the preferences of which the model of words is surest: where it errs there, the label is suspect."""


def label_noise(corpus: Corpus) -> Finding:
    """Labels against a model of the words in the responses, judged on prompts that it has not seen.

    Where words decide, the model's surest tenth is nearly always right on clean labels, and a flipped label stands against it.
    The share of the surest tenth that is labelled the other way is therefore an upper bound of the share of wrong labels there;
    it says nothing of data whose words do not decide, and the check then gives no number.
    """
    pairs = corpus.contrast
    n = len(pairs.units)
    if n < MIN_PAIRS:
        return skipped("label_noise", f"{n} preferences: too few for a model of words ({MIN_PAIRS} are needed)")
    outcome = cross_validated(rows_of(differences(corpus, features.bag_of_words)), pairs.groups)
    right = share(outcome.correct, pairs.groups)
    numbers = {"n": n, "word_model_accuracy": round(right.value, 4), "word_model_interval": right.interval}
    said = f"a model of words predicts {right} of {n} preferences that it has not seen"
    if right.surely_above < 0.55:
        return Finding("label_noise", "ok", f"{said}: too few for an estimate of wrong labels", numbers=numbers)
    surest = np.argsort(-np.abs(outcome.score), kind="stable")[: max(int(SUREST * n), 20)]
    against = share(outcome.correct[surest] == 0, [pairs.groups[i] for i in surest])
    severity = graded(against, note=0.05, warning=0.1, error=0.3)
    worst = [i for i in np.argsort(outcome.score, kind="stable")[:N_EXAMPLES] if outcome.score[i] < 0]
    return Finding(
        "label_noise",
        severity,
        f"{said}; of the tenth of which it is surest, {against} are labelled the other way: at most that share is wrong there",
        ""
        if severity == "ok"
        else "have the examples and their like judged again; with noisy labels train with loss.label_smoothing",
        numbers | {"surest_against_label": round(against.value, 4), "surest_interval": against.interval},
        tuple(corpus.evidence(int(pairs.units[i])) for i in worst) if severity != "ok" else (),
    )


def unsure_labels(corpus: Corpus) -> Finding:
    """Preferences whose annotators were hardly sure."""
    stated = [unit for unit in corpus.units if unit.winner >= 0]
    least = sorted((unit.confidence, i) for i, unit in enumerate(corpus.units) if unit.winner >= 0)[:N_EXAMPLES]
    if not stated or all(unit.confidence == 1 for unit in stated):
        return skipped("unsure_labels", "the data state no confidence")
    unsure = share([unit.confidence < 0.6 for unit in stated], [corpus.keys[unit.example] for unit in stated])
    wrong = float(np.mean([1 - unit.confidence for unit in stated]))
    severity = graded(unsure, note=0.1, warning=0.3, error=0.6)
    return Finding(
        "unsure_labels",
        severity,
        f"in {unsure} of {len(stated)} preferences the winner has less than six tenths of the votes; "
        f"by the confidences themselves {wrong:.0%} of the labels are wrong",
        ""
        if severity == "ok"
        else "take the sure ones (preftune pairs --min-agreement 0.7), or a loss that uses the confidence",
        {
            "n": len(stated),
            "unsure": round(unsure.value, 4),
            "unsure_interval": unsure.interval,
            "expected_wrong": round(wrong, 4),
        },
        tuple(corpus.evidence(i) for _, i in least) if severity != "ok" else (),
    )


def margins(corpus: Corpus) -> Finding:
    """Scores or margins in the file that say that the rejected response is better."""
    stated = [i for i, unit in enumerate(corpus.units) if unit.winner >= 0 and unit.margin != 0]
    if not stated:
        return skipped("margins", "the data state no scores or margins")
    against = [i for i in stated if corpus.units[i].margin < 0]
    said = f"in {len(against)} of {len(stated)} preferences with a margin the rejected response has the higher score"
    if not against:
        return Finding("margins", "ok", said, numbers={"n": len(stated), "n_against": 0})
    found = share([corpus.units[i].margin < 0 for i in stated], [corpus.keys[corpus.units[i].example] for i in stated])
    return Finding(
        "margins",
        graded(found, note=-1.0, warning=-1.0, error=0.05),
        said,
        "chosen and rejected, or the two scores, may be swapped: look at the rows, leave out what stays unclear (--fix does)",
        {"n": len(stated), "n_against": len(against), "share": round(found.value, 4)},
        tuple(corpus.evidence(i) for i in against[:N_EXAMPLES]),
        tuple(against) if found.value < 0.5 else (),
    )  # fmt: skip
