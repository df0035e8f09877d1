"""Whole run folders, made up: every file that the report reads, with a text of the caller's choice wherever a text can be."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from preftune.evaluate.estimate import Estimate
from preftune.evaluate.record import Answers, Bin, Evaluation, Figure, Histogram, Perplexity, Preferences, Samples, Wins
from preftune.run import Run

OPENINGS = ("the bell of the tower", "a lamp on the pier", "the small green boat", "your kettle", "the ferry at noon")
BEFORE = ("is not here and we cannot say where it went", "was lost and that is all there is to say about it")
AFTER = ("will be with you on Monday, and we are sorry for the wait", "was found this morning; thank you for telling us")


def estimate(value: float, half: float = 0.02, n: int = 512) -> Estimate:
    return Estimate(value, value - half, value + half, n)


def made_up(path: Path, words: str = "plain words", *, n_steps: int = 300, n_prompts: int = 12, beta: float = 0.1) -> Run:
    """A run folder with everything in it. A smaller `beta` went further and won a little more."""
    run = Run(path)
    run.path.mkdir(parents=True)
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in metrics(n_steps, words, beta)))
    run.config_file.write_text(
        f"model: base\ndata: pairs.jsonl\nout: {run.path}\nseed: 0\nloss:\n  name: dpo\n  beta: {beta}\n# {words}\n"
    )
    environment = {"preftune": "0.6.0", "torch": "2.13.0", "machine": {"name": words, "cores": 2}, words: None}
    run.write_json(run.env_file, environment)
    counts = {"rows_read": 4702, "used": 4700, "dropped": 2, "files": ["pairs.jsonl", words], "rows": {words: words}}
    run.write_json(run.data_file, counts | {"dropped_rows": [["pairs.jsonl:7", words], ["pairs.jsonl:9", "no response"]]})
    run.log_event(words, words)
    asked = [{"role": "user", "content": f"where is my kettle? {words}"}]
    run.log_samples([{"when": when, "prompt": asked, "response": f"{when}: {words}"} for when in ("before", "after")])
    run.write_json(run.evaluation_file, evaluation(words, beta).as_dict())
    run.answers_file.write_text("".join(json.dumps(row) + "\n" for row in answers(n_prompts, words)))
    run.write_json(run.diagnosis_file, {"at": "2026-01-01T00:00:00Z", "findings": findings(words)})
    run.write_json(run.check_file, {"findings": findings(words)[:1]})
    run.model.mkdir()
    (run.model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return run


def metrics(n_steps: int, words: str, beta: float) -> list[dict[str, Any]]:
    draw = random.Random(f"{beta}")
    rows = []
    for step in range(n_steps):
        done = 1 - math.exp(-3 * step / n_steps)
        margin = 1.1 * done + draw.gauss(0, 0.25)
        row: dict[str, Any] = {
            "step": step, "split": "train", words: 1.0,
            "loss": math.log1p(math.exp(-margin)) + abs(draw.gauss(0, 0.02)) + (2.5 if step == n_steps // 3 else 0.0),
            "kl": 0.5 * done / beta + abs(draw.gauss(0, 0.2)),
            "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.25 * done + draw.gauss(0, 0.08))),
            "rewards/margins": margin, "rewards/chosen": 0.3 * done + draw.gauss(0, 0.1), "rewards/rejected": -0.8 * done,
            "logps/chosen": -41 - 2 * done + draw.gauss(0, 1), "logps/rejected": -44 - 9 * done + draw.gauss(0, 1),
            "log_ratios/chosen": -2 * done, "log_ratios/rejected": -9 * done + draw.gauss(0, 1),
            "lengths/chosen": 31 + draw.gauss(0, 1), "lengths/rejected": 29 + draw.gauss(0, 1),
            "grad_norm": 1.5 + abs(draw.gauss(0, 0.3)), "learning_rate": 1e-3 * (1 - step / n_steps),
            "tokens_per_second": 5000 + draw.gauss(0, 300), "seconds": 0.2, "tokens": 1000,
        }  # fmt: skip
        rows.append(row)
        if step % max(1, n_steps // 10) == 0:
            rows.append(row | {"split": "eval", "loss": 0.693 - 0.14 * done, "rewards/accuracies": 0.5 + 0.21 * done})
    return rows


def evaluation(words: str, beta: float) -> Evaluation:
    won, kl = 100 * (0.62 + 0.12 / (1 + 4 * beta)), 0.62 / beta
    own = Answers(estimate(33.0), estimate(120.0), estimate(0.97), estimate(0.03), 0.31, 0.7, 0.94)
    other = own.__class__(estimate(31.0), estimate(110.0), estimate(0.99), estimate(0.02), 0.34, 0.74, 0.97)
    bins = tuple(Bin(k / 20, (k + 1) / 20, k / 20 + 0.02, estimate(0.06 + 0.044 * k, 0.05, 60)) for k in range(10, 19))
    bell = tuple(round(60 * math.exp(-((k - 9) ** 2) / 18)) for k in range(16))
    held_out = Preferences(
        n_pairs=512, n_ties=0, accuracy=estimate(0.713, 0.04), length_only=estimate(0.55, 0.04),
        length_matched=estimate(0.69, 0.06), loss=0.586, margin=estimate(0.33), chosen_reward=estimate(0.1),
        rejected_reward=estimate(-0.23), chosen_log_ratio=estimate(1.0), rejected_log_ratio=estimate(-2.3),
        chosen_log_ratio_per_token=estimate(0.03), rejected_log_ratio_per_token=estimate(-0.07), calibration=bins,
        calibration_error=0.041, margins=Histogram(tuple(-1 + k / 8 for k in range(17)), bell),
        by={"category": {f"refunds {words}": estimate(0.74, 0.05, 200), "delivery": estimate(0.66, 0.06, 180)}},
    )  # fmt: skip
    by_length = tuple((2 ** ((k - 4) / 2), 2 ** ((k - 3) / 2), estimate(0.64 + 0.02 * k, 0.06, 50)) for k in range(8))
    wins = Wins(
        judge=f"rule:{words}", against="sft", n_total=512, n_wins=380, n_wins_base=120, n_draws=12, n_unscored=0,
        win_rate=estimate(won, 3.1), standard_error=1.6, length_controlled=estimate(won - 2, 3.3), tokens=33.0,
        tokens_base=31.0, order_consistency=estimate(0.93), by_length=by_length,
    )  # fmt: skip
    return Evaluation(
        policy="dpo", against="sft", beta=beta, objective="dpo", at="2026-01-01T00:00:00Z",
        verdict=f"Alignment worked: answers beat those of sft in {won:.1f} % of comparisons. {words}", worked=True,
        held_out=held_out, train=held_out, samples=Samples(256, 4, 72, 1, estimate(kl, 0.4), estimate(kl / 33, 0.01),
        estimate(0.6), own, other), wins=(wins,), perplexity=(Perplexity(words, 9000, 8.4, 7.9, estimate(0.06)),),
        figures=(Figure(f"true reward {words}", estimate(2.22), estimate(-0.77)),), notes=(f"note: {words}",),
    )  # fmt: skip


def answers(n: int, words: str) -> list[dict[str, Any]]:
    draw = random.Random(7)
    rows = []
    for k in range(n):
        opening = OPENINGS[k % len(OPENINGS)]
        text = f"{opening} {AFTER[k % 2]} {words}"
        pieces = [piece if at == 0 else f" {piece}" for at, piece in enumerate(text.split(" "))]
        moved = [draw.gauss(0.4, 1.2) for _ in pieces]
        mine = {"text": text, "pieces": pieces, "log_ratios": moved, "n_tokens": len(pieces), "ended": k % 3 > 0}
        other = {"text": f"{opening} {BEFORE[k % 2]} {words}", "n_tokens": 14, "ended": True}
        prompt = [{"role": "user", "content": f"question {k}: where is {opening}? {words}"}]
        rows.append({"id": f"q{k}", "prompt": prompt, "policy": [mine], "reference": [other], "preference": 0.8})
    return rows


def findings(words: str) -> list[dict[str, Any]]:
    return [
        {
            "name": "drifted_too_far", "severity": "warning", "said": f"KL is 6.1 nats a response. {words}",
            "remedy": f"a larger loss.beta {words}", "numbers": {"kl": 6.1},
            "examples": [{"place": f"answers.jsonl:3 {words}", "text": words}],
        },
        {"name": f"no_effect {words}", "severity": "ok", "said": f"margins moved {words}", "remedy": "", "examples": []},
    ]  # fmt: skip
