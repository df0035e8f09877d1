"""The main job through its front doors: what a run folder holds, and that it is true."""

from __future__ import annotations

import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import World, cli, read_jsonl, real_pages, same_weights, save_model, weights, write_jsonl

import preftune
from preftune.config import Config
from preftune.errors import ConfigError, ModelError, PreftuneError, StorageError
from preftune.run import Run
from preftune.training.job import Finished, Started, run_job
from preftune.training.loop import Evaluated, Saved, Step
from preftune.training.prepare import Said


def train(world: World, out: Path, **more: Any) -> Run:
    """A short run from Python, quiet."""
    return preftune.train(world.settings(out, **more), quiet=True)


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run by the command line, looked at by many tests."""
    out = tmp_path_factory.mktemp("runs") / "dpo"
    with real_pages():
        left = cli("train", *world.words(out, eval__every=2, checkpoint__every=2))
    assert left.code == 0, left.err
    assert left.out == f"{out}\n"
    return Run.open(out)


def test_the_run_folder_has_all_that_it_should(run: Run) -> None:
    expected = {
        "checkpoints",
        "config.yaml",
        "data.json",
        "diagnosis.json",
        "env.json",
        "events.jsonl",
        "metrics.jsonl",
        "model",
    }
    assert {p.name for p in run.path.iterdir()} == {*expected, "report.html", "samples.jsonl"}
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000004", "step-000005"]  # checkpoint.keep
    env = json.loads(run.env_file.read_text())
    assert env["preftune"] == preftune.__version__ and env["torch"] == torch.__version__ and env["ranks"] == 1


def test_the_report_is_the_real_one(run: Run) -> None:
    assert "<html" in run.report_file.read_text()[:200]


def test_garbage_is_not_looked_for_at_a_start_and_nothing_stays_frozen(world: World, tmp_path: Path) -> None:
    gc.unfreeze()  # what other tests set aside
    events = run_job(Config.of(world.settings(tmp_path, steps=1, eval__every=0, samples__n=0)))
    for event in events:
        if isinstance(event, Started):
            break
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 100_000
    assert isinstance([*events][-1], Finished) and gc.get_freeze_count() == 0


def test_its_settings_reload_equal_and_resolved(run: Run, world: World) -> None:
    config = Config.load(run.config_file)
    asked = Config.of(world.settings(run.path, eval__every=2, checkpoint__every=2))
    assert config == asked.resolved() == run.config()
    assert config.eval.keep == "last" and config.optim.lr == 1e-3


def test_step_0_is_measured_before_any_update(run: Run) -> None:
    rows = run.metrics()
    assert [(r["step"], r["split"]) for r in rows[:2]] == [(0, "eval"), (0, "train")]
    for row in rows[:2]:
        assert abs(row["loss"] - math.log(2)) < 1e-5
        assert abs(row["rewards/margins"]) < 1e-5 and abs(row["kl"]) < 1e-8
        assert row["rewards/accuracies"] == 0.5
    assert rows[1]["weights_moved"] == 0


def test_metrics_have_a_row_a_step_and_an_evaluation_as_asked(run: Run) -> None:
    assert [r["step"] for r in run.metrics(split="train")] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in run.metrics(split="eval")] == [0, 2, 4, 5]
    names = {"loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins",
             "rewards/accuracies", "logps/chosen", "logps/rejected", "kl", "lengths/chosen", "lengths/rejected",
             "log_ratios/chosen", "log_ratios/rejected", "tokens", "seconds", "tokens_per_second", "weights_moved",
             "weights_change", "epoch", "step", "split"}  # fmt: skip
    last = run.metrics(split="train")[-1]
    assert set(last) == names
    assert last["weights_moved"] > 0.5 and last["loss"] < 0.6
    assert set(run.metrics(split="eval")[0]) == names - {
        "grad_norm", "learning_rate", "tokens", "seconds", "tokens_per_second", "weights_moved", "weights_change", "epoch"
    }  # fmt: skip


def test_what_the_run_said_of_itself_is_kept(run: Run) -> None:
    kinds = [e["kind"] for e in run.events()]
    assert {"data", "tokens", "model", "path", "reference"} <= set(kinds)
    assert len(run.events()) == len({json.dumps(e) for e in run.events()})


def test_samples_before_and_after_answer_the_same_held_out_prompts(run: Run) -> None:
    before, after = ([s for s in run.samples() if s["when"] == when] for when in ("before", "after"))
    assert len(before) == len(after) == 2
    assert [s["prompt"] for s in before] == [s["prompt"] for s in after]
    assert [s["response"] for s in before] != [s["response"] for s in after]


def test_the_result_is_a_plain_model_folder_and_what_the_metrics_say(run: Run, world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(run.model))
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(str(run.model)).chat_template
    held_out = _held_out_rows(world, run, tmp_path)
    rows = list(preftune.score(run.path, held_out))
    assert len(rows) == 2 * len(read_jsonl(held_out))
    margins = [rows[i]["reward"] - rows[i + 1]["reward"] for i in range(0, len(rows), 2)]
    last = run.metrics(split="eval")[-1]
    assert abs(sum(margins) / len(margins) - last["rewards/margins"]) < 1e-5
    assert abs(sum(math.log1p(math.exp(-m)) for m in margins) / len(margins) - last["loss"]) < 1e-5
    assert sum(m > 0 for m in margins) / len(margins) == last["rewards/accuracies"]


def _held_out_rows(world: World, run: Run, folder: Path) -> Path:
    from preftune.data.read import read_examples
    from preftune.data.split import split_by_prompt

    config = run.config()
    examples = read_examples(str(world.file("pairs"))).examples
    prompts = {e.prompt for e in split_by_prompt(examples, config.eval.fraction, config.seed)[1]}
    return write_jsonl(folder / "held-out.jsonl", [r for r in read_jsonl(world.file("pairs")) if r["prompt"] in prompts])


def test_every_row_is_accounted_for(world: World, tmp_path: Path) -> None:
    rows: list[Any] = read_jsonl(world.file("pairs"))[:20]
    long = " ".join(["kettle"] * 150)
    rows += [
        {"prompt": "Empty?", "chosen": "", "rejected": "Not at all."},  # bad
        {"prompt": 7, "chosen": "Hello.", "rejected": "Not at all."},  # bad
        {"prompt": f"{long} long prompt?", "chosen": "Hello.", "rejected": "Not at all."},  # its prompt is cut
        {"prompt": "Long response?", "chosen": long, "rejected": "Not at all."},  # its response is cut
        {"prompt": "Same once cut?", "chosen": f"{long} a", "rejected": f"{long} b"},  # dropped
    ]
    data, aside = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "bad.jsonl"
    out = tmp_path / "run"
    left = cli("train", *world.words(out, data=data, quarantine=aside, batch__max_length=100, steps=1))
    assert left.code == 0, left.err
    counts = json.loads((out / "data.json").read_text())
    assert counts["rows_read"] == 25 and counts["quarantined"] == 2 and counts["dropped"] == 1 and counts["used"] == 22
    assert counts["train_examples"] + counts["eval_examples"] == counts["used"]
    assert (counts["prompts_truncated"], counts["responses_truncated"]) == (1, 1)
    assert counts["longest_example_tokens"] <= 100 + max(len(r["rejected"]) for r in rows)
    assert "same once they are cut" in counts["dropped_rows"][0][1]
    assert [r["source"].rsplit(":", 1)[1] for r in read_jsonl(aside)] == ["21", "22"]
    for said in ("22 of 23 examples tokenized", "1 prompts lost", "1 responses lost", "2 of 25 rows cannot be used"):
        assert said in left.err


def test_ties_are_dropped_and_counted(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": p["prompt"], "responses": [p["chosen"], p["rejected"]], "scores": [i % 3, 0]}
            for i, p in enumerate(read_jsonl(world.file("pairs"))[:21])]  # fmt: skip
    run = train(world, tmp_path / "run", data=str(write_jsonl(tmp_path / "scores.jsonl", rows)), steps=1)
    counts = json.loads(run.data_file.read_text())
    assert (counts["rows_read"], counts["used"], counts["dropped"], counts["quarantined"]) == (21, 14, 7, 0)
    assert any("7 examples are not used by dpo" in e["message"] for e in run.events())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT by itself
def test_lora_starts_as_the_reference_and_saves_an_adapter(world: World, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    from preftune.model.load import load

    run = train(world, tmp_path / "run", lora__r=4, lora__dropout=0.1, lora__merge=True, optim__lr=1e-2)
    first, last = run.metrics(split="eval")[0], run.metrics(split="eval")[-1]
    assert abs(first["loss"] - math.log(2)) < 1e-5 and first["kl"] == 0 and last["kl"] > 0.01
    assert json.loads((run.model / "adapter_config.json").read_text())["r"] == 4
    assert not (run.model / "model.safetensors").exists()
    adapter = AutoPeftModelForCausalLM.from_pretrained(str(run.model)).merge_and_unload().state_dict()
    loaded = load(run.path).model.state_dict()
    merged = weights(run.merged)
    for name, value in merged.items():
        assert torch.allclose(adapter[name], value, atol=1e-6) and torch.allclose(loaded[name], value, atol=1e-6)
    rows = list(preftune.score(run.path, world.file("held_out")))
    same = list(preftune.score(run.merged, world.file("held_out"), reference=world.base))
    assert all(abs(a["reward"] - b["reward"]) < 1e-4 for a, b in zip(rows, same, strict=True))
    assert max(abs(r["reward"]) for r in rows) > 0.01


def test_an_adapter_finds_its_base_from_another_folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.model.load import load

    monkeypatch.chdir(world.base.parent)
    run = train(world, tmp_path / "run", model="base", lora__r=2, steps=1)
    monkeypatch.chdir(tmp_path)
    assert load(run.path).model.num_parameters() > 0


def test_another_reference(world: World, tmp_path: Path) -> None:
    run = train(world, tmp_path / "run", reference=str(world.other), steps=2)
    first = run.metrics(split="eval")[0]
    assert abs(first["rewards/margins"]) > 1e-3 and first["kl"] > 1
    theirs = list(preftune.score(run.path, world.file("held_out")))
    plain = list(preftune.score(world.other, world.file("held_out")))
    assert all(abs(a["ref_logp_sum"] - b["logp_sum"]) < 1e-4 for a, b in zip(theirs, plain, strict=True))


def test_a_reference_with_a_smaller_vocabulary_is_refused(world: World, tmp_path: Path) -> None:
    small = save_model(tmp_path / "small", vocabulary=300)
    with pytest.raises(ModelError, match=r"reference=.*small: the tokenizer knows 420 ids but the model embeds 300"):
        train(world, tmp_path / "run", reference=str(small))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", ["demonstrations", "completions", "pairs"])
def test_sft_then_dpo_on_its_result(world: World, tmp_path: Path, data: str) -> None:
    words = world.settings(tmp_path / "sft", data=str(world.file(data))) | {"loss.name": "sft"}
    sft = preftune.train(words, quiet=True)
    losses = [row["loss"] for row in sft.metrics(split="eval")]
    assert losses[-1] < losses[0] - 0.05
    assert set(sft.metrics(split="eval")[0]) == {"step", "split", "loss"}
    if data == "demonstrations":
        assert not (set(world.settings(tmp_path)) - set(words))
        dpo = train(world, tmp_path / "dpo", model=str(sft.path), data=str(world.file("chat")))
        assert abs(dpo.metrics()[0]["loss"] - math.log(2)) < 1e-5
        assert dpo.metrics(split="eval")[-1]["loss"] < 0.69


def test_held_out_data_of_ones_own(world: World, tmp_path: Path) -> None:
    run = train(world, tmp_path / "run", eval__data=str(world.file("held_out")), steps=2)
    counts = json.loads(run.data_file.read_text())
    assert (counts["train_examples"], counts["eval_examples"], counts["rows_read"]) == (48, 10, 58)
    assert set(counts["formats"]) == {"data", "eval.data"}
    said: list[Any] = []
    leaking = world.settings(tmp_path / "leak", eval__data=str(world.file("pairs")), steps=1)
    preftune.train(leaking, quiet=True, on_event=said.append)
    assert any(isinstance(e, Said) and "48 of 48 evaluation prompts stand in the training data" in e.message for e in said)


@pytest.mark.parametrize(("more", "n_steps"), [({"epochs": 0.5}, 3), ({"epochs": 2.0}, 12), ({"steps": 7}, 7)])
def test_epochs_and_steps(world: World, tmp_path: Path, more: dict[str, Any], n_steps: int) -> None:
    run = train(world, tmp_path / "run", **({"steps": None} | more), eval__fraction=0.0, samples__n=0)
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(n_steps))
    assert rows[-1]["epoch"] == pytest.approx(n_steps / 6)
    assert rows[-1]["learning_rate"] > 0
    assert run.samples() == []


def test_precision(world: World, tmp_path: Path) -> None:
    """An update of 1e-7 is below the resolution of bf16 weights: they stay, but for those that are nearly 0."""
    for name, lr, moves in (("bf16", 1e-3, True), ("pure_bf16", 1e-7, False), ("fp32", 1e-7, True)):
        run = train(world, tmp_path / name, precision=name, optim__lr=lr, steps=3)
        last = run.metrics(split="train")[-1]
        assert last["weights_moved"] > 0.5 if moves else last["weights_moved"] < 0.002, name
        assert abs(run.metrics()[0]["loss"] - math.log(2)) < 1e-5
        stored = next(iter(weights(run.model).values())).dtype
        assert stored == (torch.bfloat16 if name == "pure_bf16" else torch.float32)


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_the_template_of_the_run_goes_with_the_model(world: World, tmp_path: Path, template: str) -> None:
    from preftune.model.load import open_renderer

    run = train(world, tmp_path / "run", data=str(world.file("chat")), template=template, steps=2)
    theirs, ours = open_renderer(run.path), open_renderer(world.base, template=template)
    assert theirs.chat_template == ours.chat_template
    assert theirs.stop_ids == ours.stop_ids
    rows = list(preftune.score(run.path, world.file("chat")))
    same = list(preftune.score(run.model, world.file("chat"), template=template))
    assert [r["logp_sum"] for r in rows] == [r["logp_sum"] for r in same]


def test_a_second_run_scores_no_reference(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in passes through the reference: one over two examples checks what is stored, and tokens are not made again."""
    from preftune.data.template import Renderer
    from preftune.engine import reference, score
    from preftune.training import prepare

    n: dict[str, int] = {}

    def count(owner: Any, name: str, what: str, of: Callable[..., int]) -> None:
        wrapped = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            n[what] = n.get(what, 0) + of(*arguments)
            return wrapped(*arguments)

        monkeypatch.setattr(owner, name, counted)

    count(score, "score", "scored", lambda policy, trees: len(trees))
    count(reference, "score", "checked", lambda policy, trees: len(trees))
    count(Renderer, "tokenized", "tokenized", lambda renderer, examples: len(examples))
    count(prepare, "_other", "loaded", lambda *arguments: 1)

    def run(name: str, **more: Any) -> dict[str, int]:
        n.clear()
        train(world, tmp_path / name, cache=str(tmp_path / "cache"), steps=1, **more)
        return dict(n)

    assert run("first") == {"scored": 48, "tokenized": 48}
    for at, more in enumerate(
        ({"loss__beta": 0.5}, {"seed": 3}, {"loss__label_smoothing": 0.1}, {"lora__r": 2}, {"lora__r": 4}, {"optim__lr": 1e-4})
    ):
        assert run(f"again-{at}", **more) == {"checked": 2}, more
    assert run("longer", data=str(world.file("chat"))) == {"scored": 48, "tokenized": 48}
    assert run("other", model=str(world.other)) == {"scored": 48}, "its tokenizer is the same"
    assert run("another reference", reference=str(world.other)) == {}, "not even loaded"


def test_from_python_with_every_event(world: World, tmp_path: Path) -> None:
    events: list[Any] = []
    run = preftune.train(world.settings(tmp_path / "run", eval__every=5), quiet=True, on_event=events.append)
    assert [e.index for e in events if isinstance(e, Step)] == [0, 1, 2, 3, 4]
    assert [e.step for e in events if isinstance(e, Evaluated)] == [0, 5]
    assert [e.step for e in events if isinstance(e, Saved)] == [5]
    assert [type(e).__name__ for e in (events[-1], events[0])] == ["Finished", "Said"]
    assert events[-1].run.path == run.path == tmp_path / "run"


def test_the_same_seed_gives_the_same_weights_and_another_does_not(world: World, tmp_path: Path) -> None:
    runs = [
        train(world, tmp_path / str(i), seed=seed, lora__r=2, lora__dropout=0.2, steps=2) for i, seed in enumerate((0, 0, 1))
    ]
    assert same_weights(runs[0].model, runs[1].model)
    assert not same_weights(runs[0].model, runs[2].model)


def _flipped(world: World, folder: Path) -> str:
    """Held-out pairs that say the opposite of the training data: they only get worse."""
    rows = [{"prompt": f"new {r['prompt']}", "chosen": r["rejected"], "rejected": r["chosen"]}
            for r in read_jsonl(world.file("pairs"))[:8]]  # fmt: skip
    return str(write_jsonl(folder / "flipped.jsonl", rows))


@pytest.mark.parametrize("metric", ["loss", "rewards/accuracies", "kl"])
def test_early_stopping_keeps_the_best(world: World, tmp_path: Path, metric: str) -> None:
    more = {"eval__data": _flipped(world, tmp_path), "eval__patience": 2, "eval__every": 1, "eval__metric": metric}
    run = train(world, tmp_path / "run", steps=20, **more)
    assert [row["step"] for row in run.metrics(split="eval")] == [0, 1, 2]  # best at 0, then two without a gain
    assert [row["step"] for row in run.metrics(split="train")] == [0, 1]
    assert run.config().eval.keep == "best"
    assert same_weights(run.model, world.base)
    assert any(f"the weights after 0 steps, the best by {metric}" in e["message"] for e in run.events())


def test_keep_best_puts_the_best_weights_into_the_model(world: World, tmp_path: Path) -> None:
    """Some held-out pairs say the opposite of the others: large margins cost more than they gain, so the loss turns."""
    rows = read_jsonl(world.file("held_out"))
    rows[:2] = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:2]]
    held_out = write_jsonl(tmp_path / "mixed.jsonl", rows)
    more = {"eval__every": 1, "optim__lr": 0.003, "eval__data": str(held_out), "steps": 8}
    kept = [train(world, tmp_path / keep, eval__keep=keep, **more) for keep in ("best", "last")]
    evals = kept[0].metrics(split="eval")
    best = min(evals, key=lambda row: row["loss"])
    assert 0 < best["step"] < 8, "the best is neither the start nor the end, or this test shows nothing"
    assert not same_weights(kept[0].model, kept[1].model)
    assert any(f"the weights after {best['step']} steps" in e["message"] for e in kept[0].events())
    rows = list(preftune.score(kept[0].path, held_out))
    margins = [rows[i]["reward"] - rows[i + 1]["reward"] for i in range(0, len(rows), 2)]
    assert sum(margins) / len(margins) == pytest.approx(best["rewards/margins"], abs=1e-4)
    shutil.rmtree(kept[0].model)  # as if it had been stopped before the end,
    shutil.rmtree(kept[0].best)  # and somebody cleared up
    with pytest.raises(StorageError, match="the best weights are gone"):
        preftune.train(world.settings(kept[0].path, eval__keep="best", **more), quiet=True, resume=True)
    assert not kept[0].model.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"eval__metric": "rewards/accuracy"}, r"eval\.metric: .* not measured by dpo; did you mean rewards/accuracies\?"),
        ({"eval__metric": "lengths/chosen"}, r"eval\.metric: .* neither more nor less of it is better"),
        ({"eval__patience": 2, "eval__fraction": 0.0}, r"eval\.patience: needs an evaluation"),
        ({"eval__keep": "best", "eval__every": 0}, r"eval\.keep=best: needs an evaluation"),
        ({"lora__merge": True}, r"lora\.merge: of no effect without adapters"),
        ({"lora__alpha": 8.0, "lora__dropout": 0.1}, r"lora\.alpha, lora\.dropout: of no effect"),
        ({"loss.name": "sft", "reference": "other"}, r"reference: the objective sft has no reference"),
        ({"lora__r": 2, "lora__targets": "q_prj"}, r"lora\.targets: 'q_prj' is no linear layer .* did you mean q_proj\?"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_any_work(
    world: World, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train(world, tmp_path / "deep" / "run", **more)
    assert not (tmp_path / "deep").exists()


def test_a_folder_in_use_is_refused_and_left_alone(run: Run, world: World) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    with pytest.raises(PreftuneError, match="holds a run already"):
        train(world, run.path)
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*")} == before


def test_a_folder_that_was_there_keeps_what_is_not_ours(world: World, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"eval\.metric"):
        train(world, tmp_path / "run", eval__metric="none")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
    train(world, tmp_path / "run", steps=1)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("merge", [False, True])
def test_lora_over_a_base_in_half_precision_changes_no_bit(
    world: World, tmp_path: Path, merge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast its matrices would be rounded before each product anyway; what is merged is not rounded."""
    from safetensors.torch import load_file

    from preftune.training import prepare

    settings = {"lora__r": 4, "precision": "bf16", "lora__merge": merge, "steps": 3}
    cast = train(world, tmp_path / "cast", **settings)
    monkeypatch.setattr(prepare, "cast_frozen", lambda model, dtype, exactly: None)
    usual = train(world, tmp_path / "usual", **settings)
    seconds = {"seconds", "tokens_per_second"}
    for a, b in zip(cast.metrics(split="train"), usual.metrics(split="train"), strict=True):
        assert {k: v for k, v in a.items() if k not in seconds} == {k: v for k, v in b.items() if k not in seconds}
    for folder in ("model", "merged") if merge else ("model",):
        mine, theirs = (load_file(next(getattr(run, folder).glob("*.safetensors"))) for run in (cast, usual))
        assert mine.keys() == theirs.keys()
        assert all(a.dtype == theirs[n].dtype and torch.equal(a, theirs[n]) for n, a in mine.items())
    assert len(cast.samples()) == len(usual.samples()) > 0


def test_a_fixed_order_of_sums_is_what_a_cpu_has_anyway(world: World, tmp_path: Path) -> None:
    try:
        fixed = train(world, tmp_path / "fixed", deterministic=True, steps=2)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        usual = train(world, tmp_path / "usual", steps=2)
    assert not torch.are_deterministic_algorithms_enabled(), "each run has its own setting"
    assert same_weights(fixed.model, usual.model)
