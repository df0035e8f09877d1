"""Findings about a run: each at both sides of where it begins, on folders that say just that."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worlds import World, cli

import preftune
from preftune.config import Config
from preftune.data.types import Judgment
from preftune.diagnose.case import Case
from preftune.diagnose.finding import Finding
from preftune.diagnose.symptoms import Watch, diagnose
from preftune.errors import ConfigError, TrainingError
from preftune.evaluate.estimate import Estimate, mean, wilson
from preftune.evaluate.record import Answers, Evaluation, Perplexity, Preferences, Samples, Wins
from preftune.registry import SYMPTOMS
from preftune.run import Run

LOUD = ("warning", "error")


def about(value: float, half: float = 0.0, n: int = 100) -> Estimate:
    return Estimate(value, value - half, value + half, n)


def answers(tokens: float = 30.0, **more: Any) -> Answers:
    usual: dict[str, Any] = {
        "characters": about(4 * tokens), "ended": about(1.0), "repetition": about(0.01), "distinct_1": 0.5,
        "distinct_2": 0.8, "unique": 1.0, "logp_per_token": about(-1.0),
    }  # fmt: skip
    return Answers(tokens=about(tokens, 1.0), **usual | more)


def evaluation(
    *, kl: float = 5.0, win: tuple[float, float, float] | None = (70.0, 62.0, 78.0), tokens: float = 31.0, change: float = 0.0,
    wins: dict[str, Any] | None = None, policy: dict[str, Any] | None = None, **more: Any,
) -> Evaluation:  # fmt: skip
    judged: tuple[Wins, ...] = ()
    if win is not None:
        usual: dict[str, Any] = {
            "judge": "gpt", "against": "sft", "n_total": 150, "n_wins": 90, "n_wins_base": 50, "n_draws": 10, "n_unscored": 0,
            "standard_error": None, "length_controlled": None, "tokens": None, "tokens_base": None,
        }  # fmt: skip
        judged = (Wins(win_rate=Estimate(*win, 150), **usual | (wins or {})),)
    samples = Samples(
        150, 1, 64, 0, about(kl, 0.1 * kl), about(kl / 30, 0.01 * kl / 30), None, answers(tokens, **policy or {}), answers()
    )
    text = Perplexity("a text", 1000, math.exp(2 + change), math.exp(2), about(change, 0.01))
    usual_parts: dict[str, Any] = {"samples": samples, "wins": judged, "perplexity": (text,)}
    return Evaluation("run", "sft", 0.1, "dpo", "now", "", None, **usual_parts | more)


def steps(n: int = 40, *, accuracy: float = 0.72, **more: Any) -> list[dict[str, Any]]:
    """Rows of a training that goes well: two epochs."""
    return [
        {
            "step": i, "split": "train", "loss": 0.693 - 0.004 * i + 0.005 * (-1) ** i, "grad_norm": 1.0 + 0.1 * (i % 3),
            "learning_rate": 1e-3 * (1 - i / n), "weights_moved": min(1.0, 0.1 * i), "weights_change": 0.03 * i / n,
            "epoch": 2 * (i + 1) / n, "kl": 3.0 * i / n, "rewards/accuracies": 0.5 if i == 0 else accuracy,
            "rewards/margins": 0.01 * i, "logps/chosen": -12.0, "logps/rejected": -13.0, "lengths/chosen": 30.0,
            "lengths/rejected": 30.0, "log_ratios/chosen": -2.0 * i / n, "log_ratios/rejected": -4.0 * i / n,
        } | {name: value(i) if callable(value) else value for name, value in more.items()}
        for i in range(n)
    ]  # fmt: skip


def held_out(*values: float, accuracy: float = 0.68, **more: Any) -> list[dict[str, Any]]:
    """An evaluation for each loss, ten steps apart; the first is that of the reference."""
    last = steps(2, accuracy=accuracy)[1]
    return [
        last
        | {"step": 10 * k, "split": "eval", "loss": loss, "kl": 0.0 if k == 0 else 3.0, "rewards/margins": 0.1 * k}
        | {f"log_ratios/{side}": nats * k / max(1, len(values) - 1) for side, nats in (("chosen", -2.0), ("rejected", -4.0))}
        | {name: value(k) if callable(value) else value for name, value in more.items()}
        for k, loss in enumerate(values)
    ]


def sound(settings: dict[str, Any] | None = None, **more: Any) -> Case:
    """A run in which nothing is wrong, but for `more`."""
    usual: dict[str, Any] = {
        "loss": {"name": "dpo", "beta": 0.1},
        "optim.lr": 1e-3,
        "batch.pairs_per_step": 8,
        "epochs": 2.0,
        "data": "pairs.jsonl",
    }
    config = Config.of(usual | (settings or {})).resolved()
    counts = {"train_examples": 160, "eval_examples": 60, "train_units": [480], "eval_units": [180], "responses": 660,
              "responses_truncated": 0, "steps": 40}  # fmt: skip
    parts: dict[str, Any] = {
        "data": counts, "about": {"device": "x86_64 CPU", "weights": 1000, "weights_trained": 1000}, "train": steps(),
        "held_out": held_out(0.693, 0.66, 0.64, 0.63, 0.625), "evaluation": evaluation(),
    }  # fmt: skip
    return Case("runs/it", config, **parts | more)


def look(name: str, case: Case) -> Finding:
    return SYMPTOMS[name](case)


def test_a_sound_run_raises_no_alarm() -> None:
    for case in (sound(), sound(evaluation=None), sound({"lora.r": 8})):
        found = {name: look(name, case) for name in SYMPTOMS}
        assert not {name: one.said for name, one in found.items() if one.severity in LOUD}
        assert all(found[name].name == name for name in SYMPTOMS)
        json.dumps([one.as_dict() for one in found.values()], allow_nan=False)


def test_what_is_missing_is_said_with_the_command_that_gives_it() -> None:
    empty = sound(train=(), held_out=(), evaluation=None, data={}, finished=False)
    for name in SYMPTOMS:
        assert look(name, empty).severity not in LOUD, name
    for name in ("no_wins", "length_bias", "forgetting", "conservative", "judge", "off_policy"):
        one = look(name, sound(evaluation=None))
        assert one.severity == "skipped" and "preftune eval runs/it" in one.said, name


STILL: dict[str, Any] = {"weights_change": 1e-4, "kl": 1e-3, "log_ratios/chosen": 0.01, "log_ratios/rejected": -0.01}


def still(settings: dict[str, Any], *, win: Any = (50.5, 43.0, 58.0), kl: float = 0.001, **rows: Any) -> Case:
    n = rows.pop("n", 40)
    return sound(settings, train=steps(n, **STILL | rows), evaluation=evaluation(kl=kl, win=win))


@pytest.mark.parametrize(
    ("cause", "case"),
    [
        ("learning_rate", still({"optim.lr": 1e-6})),
        ("frozen", still({"lora.r": 8}, grad_norm=0.0)),
        ("bf16", still({"precision": "pure_bf16"}, weights_moved=0.02)),
        ("warm_up", still({"optim.warmup": 1000.0}, learning_rate=lambda i: 1e-6 * (i + 1))),
        ("steps", still({}, n=3, epoch=0.1)),
        ("lora", still({"lora.r": 8, "lora.alpha": 0.01}, weights_change=0.1)),
        ("beta", still({"loss": {"name": "dpo", "beta": 50.0}}, **{"rewards/margins": lambda i: 0.1 * i})),
        ("labels", still({}, accuracy=0.5, weights_change=0.05)),
    ],
)
def test_no_effect_says_why_by_the_run_s_own_numbers(cause: str, case: Case) -> None:
    if cause == "labels":
        case = replace(case, held_out=held_out(0.693, 0.69, accuracy=0.5))
    one = look("no_effect", case)
    assert (one.severity, one.numbers["cause"]) == ("error", cause), one.said
    assert one.remedy and "no effect" in one.said


def test_no_effect_begins_where_no_judge_could_see_a_tenth_or_a_judge_saw_nothing() -> None:
    """Pinsker: two distributions 2·0.1² nats apart differ by 0.1 in any probability at most."""
    half, won = (50.0, 42.0, 58.0), (58.0, 51.0, 65.0)
    cases = {(0.017, None): "error", (0.019, None): "ok", (0.5, half): "warning", (1.0, half): "ok", (0.001, won): "ok"}
    for (kl, win), severity in cases.items():
        assert look("no_effect", sound(evaluation=evaluation(kl=kl, win=win))).severity == severity, (kl, win)
    wide = (50.0, 20.0, 80.0)
    assert look("no_effect", sound(evaluation=evaluation(kl=0.5, win=wide))).severity == "ok", "too few verdicts say nothing"


def test_a_run_on_its_own_replies_is_not_asked_what_it_learnt_of_pairs() -> None:
    asked = sound({"loss": {"name": "ppo"}, "reward.rule": "my.py:score"})
    assert look("preferences", asked).severity == "skipped"
    assert look("preferences", sound()).severity == "ok"


def test_whether_anything_happened_is_not_asked_before_half_way() -> None:
    early = replace(still({}, n=10), finished=False, evaluation=None, held_out=held_out(0.693))
    assert early.n_planned == 40 and look("no_effect", early).severity == "skipped"
    assert look("no_effect", replace(early, train=steps(20, **STILL))).severity == "error"


def test_updates_that_bf16_loses_are_found_also_where_some_weights_move() -> None:
    for precision, moved, severity in (("pure_bf16", 0.02, "error"), ("pure_bf16", 0.4, "warning"), ("pure_bf16", 0.6, "ok"),
                                       ("fp32", 0.02, "ok")):  # fmt: skip
        one = look("lost_updates", sound({"precision": precision}, train=steps(weights_moved=moved)))
        assert one.severity == severity, (precision, moved)


def test_drift_is_per_token_and_needs_another_sign_until_it_is_extreme() -> None:
    broken = {"ended": about(0.4)}
    cases = [(12.0, {}, "ok"), (8.0, broken, "note"), (12.0, broken, "warning"), (40.0, {}, "warning"), (40.0, broken, "error")]
    for kl, policy, severity in cases:
        assert look("drifted", sound(evaluation=evaluation(kl=kl, policy=policy))).severity == severity, (kl, policy)
    lost = look("drifted", sound(evaluation=evaluation(kl=20.0, win=(40.0, 32.0, 48.0))))
    assert lost.severity == "warning" and "win rate" in lost.said
    far = sound(evaluation=None, held_out=held_out(0.693, 0.6, kl=lambda k: 45.0 * k))
    assert look("drifted", far).severity == "error", "a run's own metrics suffice"


def test_guessing_is_told_from_too_few_pairs() -> None:
    guess: dict[str, Any] = {"train": steps(accuracy=0.5), "held_out": held_out(0.693, 0.69, accuracy=0.5)}
    for win, severity in ((None, "error"), ((50.0, 42.0, 58.0), "error"), ((60.0, 52.0, 68.0), "note")):
        one = look("preferences", sound(evaluation=evaluation(win=win), **guess))
        assert one.severity == severity and one.numbers.get("cause") == ("noise" if severity == "error" else None), win
    few = {"train_examples": 16, "eval_examples": 4, "train_units": [16], "eval_units": [4]}
    assert look("preferences", sound({"batch.pairs_per_step": 1}, data=few, **guess)).severity == "note"
    learnt = {"train": steps(accuracy=0.6), "held_out": held_out(0.693, 0.69, accuracy=0.6)}
    assert look("preferences", sound(**learnt)).severity == "ok"


def test_swapped_columns_are_the_opposite_on_held_out_pairs() -> None:
    lost = evaluation(win=(30.0, 22.0, 38.0))
    for accuracy, found, severity in ((0.3, None, "error"), (0.44, None, "ok"), (0.44, lost, "error"), (0.48, lost, "ok")):
        one = look("preferences", sound(held_out=held_out(0.693, 0.8, accuracy=accuracy), evaluation=found))
        assert one.severity == severity and (severity == "ok" or one.numbers["cause"] == "swapped"), (accuracy, one.said)
    both = look("no_wins", sound(evaluation=lost))
    assert "swapped in all files" in both.remedy, "where held-out pairs are swapped too, only the win rate shows it"


def test_memorised_pairs_show_in_the_gap_and_the_best_step_is_named() -> None:
    def case(trained: float, unseen: float, *losses: float) -> Case:
        return sound(train=steps(accuracy=trained), held_out=held_out(*losses, accuracy=unseen), evaluation=None)

    one = look("overfitting", case(0.98, 0.6, 0.693, 0.65, 0.7, 0.9))
    assert (one.severity, one.numbers["best_step"]) == ("error", 10) and "steps=10" in one.remedy
    never = look("overfitting", case(0.98, 0.6, 0.693, 0.75, 0.8))
    assert never.severity == "error" and "no step was better than none" in never.remedy
    assert look("overfitting", case(0.98, 0.6, 0.693, 0.65, 0.64, 0.63)).severity == "warning"
    assert look("overfitting", case(0.75, 0.68, 0.693, 0.65, 0.64, 0.63)).severity == "ok"
    one_epoch = replace(case(0.98, 0.6, 0.693, 0.65), train=steps(accuracy=0.98, epoch=lambda i: i / 40))
    assert look("overfitting", one_epoch).severity == "skipped", "in the first epoch nothing was learnt from yet"


def test_an_evaluation_of_both_sides_is_believed_before_the_metrics() -> None:
    side = Preferences(
        200, 0, wilson(190.0, 200), wilson(100.0, 200), None, 0.5, about(1.0), about(1.0), about(0.0), None, None, None, None
    )
    both = evaluation(held_out=replace(side, accuracy=wilson(120.0, 200)), train=side)
    assert look("overfitting", sound(evaluation=both)).severity == "warning"


def test_pairs_that_are_told_apart_at_once_are_trivial() -> None:
    assert look("trivial_pairs", sound(train=steps(accuracy=1.0))).severity == "warning"
    assert look("trivial_pairs", sound(train=steps(accuracy=0.94))).severity == "ok"
    leaked = sound(events=[{"kind": "warning", "message": "3 of 9 evaluation prompts stand in the training data too"}])
    assert look("trivial_pairs", leaked).severity == "note"


@pytest.mark.parametrize(
    ("nats", "severity"), [(-1.0, "ok"), (-3.0, "note"), (-20.0, "warning"), (-40.0, "error"), (3.0, "ok")]
)
def test_displacement_counts_nats_a_token_of_the_chosen(nats: float, severity: str) -> None:
    rows = held_out(0.693, 0.65, **{"log_ratios/chosen": lambda k: nats * k, "log_ratios/rejected": lambda k: (nats - 3) * k})
    one = look("displacement", sound(held_out=rows))
    assert one.severity == severity and one.numbers["chosen_per_token"] == pytest.approx(nats / 30)


def test_without_a_reference_log_ratios_are_those_to_the_start() -> None:
    rows = [
        {k: v for k, v in row.items() if not k.startswith("log_ratios") and k != "kl"} | {"logps/chosen": -12.0 - 20 * (at > 0)}
        for at, row in enumerate(held_out(0.693, 0.65))
    ]
    case = sound({"loss": {"name": "orpo"}}, held_out=rows, evaluation=None)
    assert look("displacement", case).numbers["chosen"] == -20.0
    assert look("no_effect", case).severity == "ok" and look("drifted", case).severity == "skipped"


def test_length_is_a_bias_only_where_equal_lengths_gain_nothing() -> None:
    equal = ((0.9, 1.1, about(0.5, 0.1)),)
    better = ((0.9, 1.1, about(0.7, 0.1)),)
    cases = [(31.0, equal, "ok"), (45.0, equal, "warning"), (41.0, better, "ok"), (60.0, better, "note")]
    for tokens, near, severity in cases:
        found = look("length_bias", sound(evaluation=evaluation(tokens=tokens, wins={"by_length": near})))
        assert (found.severity if found.severity != "note" or tokens > 50 else "ok") == severity, (tokens, found.said)
    lost = evaluation(tokens=45.0, win=(48.0, 40.0, 56.0), wins={"by_length": equal})
    assert look("length_bias", sound(evaluation=lost)).severity == "error"
    controlled = evaluation(tokens=45.0, wins={"length_controlled": about(49.0, 5.0)})
    assert "length-controlled" in look("length_bias", sound(evaluation=controlled)).said


@pytest.mark.parametrize(("change", "severity"), [(0.05, "ok"), (0.12, "note"), (0.4, "warning"), (0.8, "error"), (-0.5, "ok")])
def test_forgetting_is_a_loss_of_other_text(change: float, severity: str) -> None:
    assert look("forgetting", sound(evaluation=evaluation(change=change))).severity == severity


@pytest.mark.parametrize(("accuracy", "severity"), [(0.58, "ok"), (0.5, "warning"), (0.3, "error")])
def test_forgetting_is_a_fall_on_benchmarks_beyond_their_errors(accuracy: float, severity: str) -> None:
    sides = {"policy": {"acc": accuracy, "n": 1000}, "reference": {"acc": 0.6, "n": 1000}}
    one = look("forgetting", sound(evaluation=evaluation(benchmarks={"my_task": sides})))
    assert one.severity == severity and "my_task" in one.said


def test_refusals_beyond_the_reference_s_are_too_conservative() -> None:
    def rows(n_refuse: int) -> list[dict[str, Any]]:
        return [
            {"policy": [{"text": "I'm sorry, but I can't help with that." if i < n_refuse else "Sure: it is blue."}],
             "reference": [{"text": "It is blue."}]}
            for i in range(100)
        ]  # fmt: skip

    for n, severity in ((2, "ok"), (30, "warning"), (80, "error")):
        assert look("conservative", sound(answers=rows(n))).severity == severity, n


def test_no_wins_gives_four_checks_in_their_order() -> None:
    worse = look("no_wins", sound(evaluation=evaluation(win=(40.0, 33.0, 47.0))))
    assert worse.severity == "error" and "the loss fell" in worse.said
    at = [worse.remedy.index(word) for word in ("held-out accuracy", "KL", "data quality", "the evaluation")]
    assert at == sorted(at)
    assert look("no_wins", sound(evaluation=evaluation(win=(50.0, 43.0, 57.0)))).severity == "warning"
    assert look("no_wins", sound(evaluation=evaluation(win=(55.0, 40.0, 70.0)))).severity == "note", "too few to tell"
    assert look("no_wins", sound(evaluation=evaluation(win=(69.0, 50.0, 88.0)))).severity == "note", "too few to tell"
    assert look("no_wins", sound()).severity == "ok"
    hardly = look("no_wins", sound(evaluation=evaluation(kl=0.001, win=(50.0, 43.0, 57.0))))
    assert "hardly moved" in hardly.said, "the first check that fails is named"


def test_the_policy_is_its_reference_at_the_start() -> None:
    apart = held_out(0.9, 0.8, kl=lambda k: 0.5)
    one = look("reference_mismatch", sound({"reference": "other", "model": "mine"}, held_out=apart))
    assert one.severity == "warning" and "mine" in one.remedy and "other" in one.remedy
    assert look("reference_mismatch", sound(held_out=held_out(0.9, 0.8, kl=50.0))).severity == "error"
    gpu = sound(about={"device": "NVIDIA H200"}, held_out=held_out(0.69, 0.6, kl=0.2))
    assert look("reference_mismatch", gpu).severity == "ok", "products in bf16 round that much"
    assert look("reference_mismatch", sound()).severity == "ok"


@pytest.mark.parametrize(("own", "severity"), [(-0.3, "ok"), (0.7, "warning"), (3.0, "error")])
def test_off_policy_is_a_distance_in_nats_a_token(own: float, severity: str) -> None:
    found = evaluation()
    assert found.samples is not None and found.samples.reference is not None
    reference = replace(found.samples.reference, logp_per_token=about(own))  # the data's have -12 / 30 = -0.4
    case = sound(evaluation=replace(found, samples=replace(found.samples, reference=reference)))
    assert look("off_policy", case).severity == severity


@pytest.mark.parametrize(("n", "severity"), [(20, "ok"), (60, "warning"), (300, "error")])
def test_truncated_responses_are_counted(n: int, severity: str) -> None:
    counts = dict(sound().data) | {"responses_truncated": n}
    assert look("truncated", sound(data=counts)).severity == severity


@pytest.mark.parametrize(
    ("wins", "severity", "said"),
    [
        ({"order_consistency": about(0.9, 0.05)}, "ok", ""),
        ({"order_consistency": about(0.68, 0.05)}, "warning", "both orders"),
        ({"order_consistency": about(0.5, 0.05)}, "error", "both orders"),
        ({"first_wins": about(0.75, 0.05)}, "warning", "shown first"),
        ({"n_unscored": 5}, "ok", ""),
        ({"n_unscored": 25}, "warning", "no verdict"),
        ({"n_unscored": 100}, "error", "no verdict"),
        ({"n_draws": 110}, "warning", "ties"),
    ],
)
def test_a_judge_is_held_to_consistency_and_to_giving_verdicts(wins: dict[str, Any], severity: str, said: str) -> None:
    one = look("judge", sound(evaluation=evaluation(wins=wins)))
    assert one.severity == severity and said in one.said


def test_judgments_of_the_run_serve_where_nothing_was_evaluated() -> None:
    mute = [Judgment(str(i), 0, 1, "unscored" if i < 20 else "i", "model:x", (0, 1)) for i in range(60)]
    one = look("judge", sound(evaluation=None, judgments=mute))
    assert one.severity == "warning" and "model:x" in one.said


def test_spikes_stand_out_of_what_was_before_them() -> None:
    quiet = sound()
    assert look("spikes", quiet).severity == "ok"
    jump = {"loss": lambda i: 3.0 if i in (20, 30) else 0.69 - 0.003 * i, "grad_norm": lambda i: 90.0 if i in (20, 30) else 1.0}
    one = look("spikes", sound(train=steps(**jump)))
    assert one.severity == "warning" and one.numbers["both"] == [20, 30]
    assert look("spikes", sound(train=steps(10))).severity == "skipped"


def test_a_loss_above_its_start_is_found_whether_it_comes_back_or_not() -> None:
    for last, severity in ((40, "error"), (20, "warning")):
        rows = steps(loss=lambda i, last=last: 1.2 if 10 <= i < last else 0.69)
        one = look("spikes", sound(train=rows))
        assert one.severity == severity and "0.69" in one.said, one.said
    mild = sound(train=steps(loss=lambda i: 0.9 if i else 0.69))
    assert look("spikes", mild).severity == "ok"
    hard = sound(train=steps(loss=lambda i: 1.0 + i % 2, kl=lambda i: 5.0))
    assert look("spikes", hard).numbers["above_start"] == [], "batches that differ by themselves are no rise"


def test_a_run_that_gave_up_says_why(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="is nan|is inf"):
        preftune.train(world.settings(out, optim__lr=1e30, optim__warmup=0.0, steps=8, eval__every=0), quiet=True)
    found = {one.name: one for one in diagnose(Run.open(out)).findings}
    assert found["stopped"].severity == "error" and found["stopped"].numbers["not_finite"]
    assert "precision=fp32" in found["stopped"].remedy


def test_at_the_command_line_and_while_a_run_goes_on(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = world.words(out, steps=24, eval__every=4, optim__lr=1e-9, batch__pairs_per_step=2)
    trained = cli("train", "-q", *words)
    assert trained.code == 0
    assert trained.err.count("diagnosis no_effect") == 1, "said once, when half of the steps showed it"
    run = Run.open(out)
    assert sum(event["kind"] == "diagnosis" for event in run.events()) == 1
    kept = run.read_json(run.diagnosis_file)
    assert {one["name"] for one in kept["findings"]} == set(SYMPTOMS) and kept["at"].endswith("Z")
    shown = cli("diagnose", out)
    assert shown.code == 0 and "no_effect" in shown.out and "optim.lr" in shown.out and "lost_updates" not in shown.out
    assert "lost_updates" in cli("diagnose", out, "--all").out
    left = cli("diagnose", out, "--json", "--strict")
    assert left.code == 1 and json.loads(left.out)["findings"][0]["name"] == "no_effect"
    only = cli("diagnose", out, "--json", "--only", "spikes")
    assert [one["name"] for one in json.loads(only.out)["findings"]] == ["spikes"]
    assert cli("diagnose", tmp_path).code == 2 and cli("diagnose", out, "--only", "spike").code == 2
    with pytest.raises(ConfigError, match="did you mean spikes"):
        diagnose(run, only=["spike"])


def test_a_resumed_run_is_not_told_twice(world: World, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.write_json(run.data_file, dict(sound().data))
    (run.path / "config.yaml").write_text(sound().config.to_yaml())
    bad = steps(20, accuracy=1.0, epoch=lambda i: i / 20)

    def told(watch: Watch) -> list[str]:
        for row in bad[10:]:
            watch.step(row)
        return [one.name for one in watch.evaluated(held_out(0.5)[0] | {"step": 20, "kl": 3.0})]

    for row in bad:
        run.log_metrics(row)
    assert told(Watch(run, step=10)) == ["trivial_pairs"]
    run.log_event("diagnosis", "trivial_pairs: accuracy …")
    assert told(Watch(run, step=10)) == []


def test_a_benchmark_that_fell_by_chance_is_no_loss() -> None:
    """Of 20 documents one more wrong says nothing, nor does a task that did not count what was asked."""
    few = {"policy": {"acc": 0.95, "n": 20}, "reference": {"acc": 1.0, "n": 20}}
    uncounted = {"policy": {"acc": 0.1}, "reference": {"acc": 0.9}}
    one = look("forgetting", sound(evaluation=evaluation(benchmarks={"few": few, "uncounted": uncounted}, perplexity=())))
    assert one.severity == "ok" and set(one.numbers) == {"few"}


def test_of_one_prompt_nothing_is_certain() -> None:
    """Its intervals are infinite, which a file says as null: no alarm may come of that."""
    one = mean([[40.0]])
    samples = Samples(1, 1, 64, 0, one.not_negative(), one.not_negative(), None, answers(tokens=40.0), answers())
    samples = replace(samples, policy=replace(samples.policy, tokens=one), reference=replace(answers(), tokens=mean([[9.0]])))
    read = Evaluation.of(evaluation(win=None, samples=samples).as_dict())
    for name in ("drifted", "length_bias", "off_policy"):
        found = look(name, sound(evaluation=read))
        assert found.severity in ("ok", "skipped"), name
        json.dumps(found.as_dict(), allow_nan=False)


def test_a_judge_without_a_verdict_says_nothing_of_wins() -> None:
    none = evaluation(
        win=(math.nan, math.nan, math.nan), wins={"n_total": 0, "n_draws": 0, "n_wins": 0, "n_wins_base": 0, "n_unscored": 150}
    )
    assert look("no_wins", sound(evaluation=none)).severity == "skipped"
    assert look("judge", sound(evaluation=none)).severity == "error"
