"""The main job: from a model folder and a preference file to an aligned model, its metrics and its samples.

    for event in run_job(Config.load("recipes/dpo.yaml", ["model=base", "data=pairs.jsonl"])):
        print(event)

Everything that happens is yielded as it happens; the run folder is written along the way, and `Finished` comes last.
"""

from __future__ import annotations

import gc
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import preftune
from preftune.config import Config
from preftune.data.template import Renderer
from preftune.data.write import plain
from preftune.engine.policy import Policy
from preftune.engine.reward import RewardModel
from preftune.errors import ConfigError, Interrupted, PreftuneError, StorageError, TrainingError
from preftune.files import storage, write_atomic
from preftune.generate import Sampling, sample
from preftune.losses.objective import goal_of
from preftune.model.compile import eager
from preftune.model.device import Precision, pick_device, use_deterministic
from preftune.model.export import save_model
from preftune.model.load import open_renderer, quiet_transformers
from preftune.run import Run
from preftune.training import checkpoint
from preftune.training.dist import Ranks, join
from preftune.training.interrupt import term_interrupts
from preftune.training.loop import Evaluated, Saved, Step, Work, restore_shadows, training
from preftune.training.prepare import (
    Data,
    Progress,
    Reference,
    Said,
    cache_of,
    check_resumable,
    check_same_data,
    check_same_models,
    is_live,
    load_policy,
    name_of,
    read_data,
    require,
    require_reference_used,
    score_reference,
)
from preftune.training.prompts import AskedData, read_asked
from preftune.training.rlhf import open_rollouts, require_rollouts
from preftune.training.shadow import Averaged, Shadow
from preftune.training.step import Goal


class Started(NamedTuple):
    """The run folder exists; training is about to begin at `step` of `n_steps`."""

    run: Run
    step: int
    n_steps: int


class Finished(NamedTuple):
    """The result is in `run.model`."""

    run: Run


JobEvent = Said | Progress | Started | Step | Evaluated | Saved | Finished


def run_job(config: Config, *, resume: bool = False) -> Iterator[JobEvent]:
    """Runs the job that `config` describes, or goes on with it. Raises PreftuneError; see DESIGN of the run folder in `Run`."""
    require(config)
    config = config.resolved()
    device = pick_device(config.device)
    use_deterministic(config.deterministic)
    ranks = join(device)
    run = _folder(config, resume, ranks)
    quiet_transformers()
    with storage(run.path, "look into this folder"):
        missing = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
        there = [] if missing else [file.name for file in run.path.iterdir()]
        going_on = resume and run.config_file.exists()
        taken = run.config_file.exists()
    gc.disable()  # a start makes millions of objects that live as long as the run: walking them took a quarter of its time
    held = gc.get_freeze_count()
    try:
        if resume and not going_on:
            yield Said("resume", f"{run.path} holds no run yet: this one starts anew")
        with term_interrupts():
            for event in _job(config, run, ranks, device, going_on):
                if isinstance(event, Started):
                    gc.freeze()  # what was made so far is not walked in training either
                    gc.enable()
                if ranks.main:
                    _log(run, event)
                yield event
    except BaseException as error:
        if ranks.main and not taken and not run.metrics(split="train"):
            _remove(run, there, missing)  # nothing was trained: nothing half-written stays
        elif ranks.main and isinstance(error, TrainingError):
            run.log_event("failed", str(error))  # for whoever reads the folder later
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(_how_to_go_on(run)) from None
        raise
    finally:
        gc.enable()
        if not held:  # else the caller has frozen objects of its own
            gc.unfreeze()


def _remove(run: Run, there: list[str], folders: list[Path]) -> None:
    """Removes what a run wrote into its folder, and the folders that it made."""
    for file in run.path.iterdir() if run.path.is_dir() else ():
        if file.name not in there:
            shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # not empty: somebody else uses it
            folder.rmdir()


def _how_to_go_on(run: Run) -> str:
    if run.config_file.exists():
        return f"interrupted; what was finished is kept. Go on with: preftune train --resume out={shlex.quote(str(run.path))}"
    return (
        "interrupted before the first step. Reference log-probs that were scored are kept: the same command goes on from them"
    )


def _log(run: Run, event: JobEvent) -> None:
    match event:
        case Said():
            if {"kind": event.kind, "message": event.message} not in run.events():  # a resumed run says much again
                run.log_event(event.kind, event.message)
        case Step():
            run.log_metrics({"step": event.index, "split": "train", **event.metrics})
        case Evaluated():
            run.log_metrics({"step": event.step, "split": "eval", **event.metrics})
        case Started():
            run.write_json(run.data_file, (run.read_json(run.data_file) or {}) | {"steps": event.n_steps})
        case _:
            pass


def _folder(config: Config, resume: bool, ranks: Ranks) -> Run:
    if config.out is None:
        if resume or ranks.world > 1:
            raise ConfigError("out: name the folder of the run, as out=runs/NAME")
        return Run(Path("runs") / f"{config.loss_name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return Run(config.out)


def _job(config: Config, run: Run, ranks: Ranks, device: torch.device, going_on: bool) -> Iterator[JobEvent]:
    if going_on:
        check_resumable(run, config)
        if _is_finished(run, config):
            yield Said("resume", "this run is finished already: nothing to do")
            yield Finished(run)
            return
    elif ranks.main:
        Run.create(run.path)  # fails here, before any work, where it cannot be written
    goal = goal_of(config)
    require_reference_used(config, goal)
    require_rollouts(config, goal, ranks)
    assert config.model is not None
    renderer = open_renderer(config.model, template=config.template, max_length=config.batch.max_length, usual=1024)
    data = (read_asked if config.needs_rollouts else read_data)(config, renderer, goal)
    if going_on:
        check_same_data(run, data)
    yield from data.notes
    trees = data.trees
    policy, precision = load_policy(config, renderer, trees, device, goal)
    yield Said("model", _describe(policy, precision))
    yield Said("path", policy.path.why)
    if ranks.main and not going_on:
        _write_start(run, config, data, policy, ranks, device)
    reference, start = None, name_of(config.model, precision, ranks, cache_of(config))
    if any(o.needs_reference for o in goal) and _is_stored(config):
        for event in score_reference(config, policy, precision, trees, ranks, renderer.tokenizer, start=start):
            if isinstance(event, Reference):
                reference = event
            else:
                yield event
    yield from _held_beside(config, goal)
    work = Work(
        config=config,
        run=run,
        policy=policy,
        goal=goal,
        train=data.train,
        held_out=data.held_out,
        reference=reference.store if reference else None,
        starts_as_reference=reference.is_start if reference else bool(config.sync.every) and not config.needs_rollouts,
        live=Shadow(policy) if is_live(config, goal) else None,
        average=Averaged(policy, config.average) if config.average.kind else None,
        ranks=ranks,
        state={"model": start, "reference": reference.store.folder.name if reference else None},
    )
    yield from _rolling_out(work, data, renderer, precision)
    if going_on:
        yield from _go_on(work)
    yield from _trained(work, renderer, data)
    yield from _finish(work, renderer, data)


def _is_stored(config: Config) -> bool:
    """Whether log-probs of the reference are kept for all runs: of one that moves, or of new replies, they are of no use."""
    return not config.sync.every and not config.needs_rollouts


def _rolling_out(work: Work, data: Data, renderer: Renderer, precision: Precision) -> Iterator[JobEvent]:
    """Opens what a run on the policy's own replies has besides; for any other, nothing."""
    if not isinstance(data, AskedData):
        return
    for event in open_rollouts(work.config, work.run, work.policy, work.live, work.goal, data, renderer, precision):
        if isinstance(event, Said):
            yield event
        else:
            work.rollouts = event


def _held_beside(config: Config, goal: Goal) -> Iterator[Said]:
    """Says that the reference is held beside the policy, where it is, and why."""
    if config.sync.every:
        share = f"{config.sync.mix:g} of the way"
        yield Said("reference", f"held beside the policy: every {config.sync.every} steps it moves towards it, {share}")
    elif config.needs_rollouts:
        yield Said("reference", "the policy as it starts, held beside it")
    elif is_live(config, goal):
        yield Said("reference", f"held beside the policy: {config.loss_name} asks for its whole distributions")


def _is_finished(run: Run, config: Config) -> bool:
    """Whether all that a run leaves is there: model/ is what it writes last."""
    return run.model.is_dir() and (run.merged.is_dir() or not config.lora.merge)


def _go_on(work: Work) -> Iterator[JobEvent]:
    """Puts the newest whole checkpoint into `work`, if there is one."""
    found, problems = checkpoint.newest(work.run.checkpoints)
    yield from (Said("warning", p) for p in problems)
    if found is None:
        yield Said("resume", "no checkpoint yet: starting anew")
        return
    check_same_models(work.run, found.state, work.state)
    work.resume_from = found
    yield Said("resume", f"going on after step {found.step}")


def _trained(work: Work, renderer: Renderer, data: Data) -> Iterator[JobEvent]:
    """The loop, from the start or a checkpoint; a run that was stopped after its last step only gets its weights back."""
    run, found = work.run, work.resume_from
    yield Started(run, found.step if found else 0, work.n_steps)
    if found and found.state["finished"]:
        checkpoint.load_weights(found.folder / "weights.safetensors", work.policy)
        restore_shadows(work, found)
        return
    if work.ranks.main:
        run.rewind_metrics(found.step if found else 0)
        if not found:
            yield from _samples(run, work.config, work.policy, renderer, data.samples, "before")
    yield from training(work)


def _finish(work: Work, renderer: Renderer, data: Data) -> Iterator[JobEvent]:
    """The result on disk: samples, the merged model where it is asked for, and model/ last."""
    run, config = work.run, work.config
    if work.ranks.main:
        if config.eval.keep == "best":
            yield _take_best(work)
        elif work.average is not None:
            work.average.result(work.policy).put_into(work.policy)
            yield Said("model", f"model/ holds the moving average of the weights ({config.average.kind})")
        yield from _samples(run, config, work.policy, renderer, data.samples, "after")
        template = renderer.chat_template if config.template is not None else None
        if config.lora.merge:
            save_model(work.policy.model, renderer.tokenizer, run.merged, chat_template=template, merge=True)
        save_model(work.policy.model, renderer.tokenizer, run.model, chat_template=template)
    work.ranks.barrier()
    yield Finished(run)


def _take_best(work: Work) -> Said:
    """Puts the best weights into the policy. Raises StorageError where they are gone: the last are not what was asked for."""
    kept = work.run.best / "weights.safetensors"
    last, _ = checkpoint.newest(work.run.checkpoints)
    if not kept.exists() or last is None:
        raise StorageError(f"{kept}: the best weights are gone, so model/ cannot hold them; start anew with out=")
    checkpoint.load_weights(kept, work.policy)
    step, metric = last.state["stopping"]["best_step"], work.config.eval.metric
    return Said("model", f"model/ holds the weights after {step} steps, the best by {metric} on held-out examples")


def _samples(run: Run, config: Config, policy: Any, renderer: Any, asked: list[Any], when: str) -> Iterator[JobEvent]:
    """Answers the fixed prompts and writes them to samples.jsonl in the place of former ones of the same time."""
    if not asked or isinstance(policy, RewardModel):  # which writes no answers
        return
    examples, prompts = [e for e, _ in asked], [ids for _, ids in asked]
    settings = Sampling(temperature=config.samples.temperature, max_tokens=config.samples.max_tokens, seed=config.seed)
    try:
        with eager(policy.model):
            replies = sample(policy.model, prompts, settings, stop_ids=renderer.stop_ids, pad_id=renderer.end_of_turn)
    except PreftuneError as error:  # a prompt that leaves no room to answer must not cost a run
        yield Said("warning", f"no samples {when} training: {error}")
        return
    rows = [
        {"when": when, "id": e.id, "prompt": plain(e.prompt), "response": renderer.decode(r[0].ids), "ended": r[0].ended}
        for e, r in zip(examples, replies, strict=True)
    ]
    run.log_samples(rows)


def _write_start(run: Run, config: Config, data: Data, policy: Policy, ranks: Ranks, device: torch.device) -> None:
    run.write_json(run.data_file, data.counts)
    total, learns = _n_weights(policy)
    run.write_json(run.env_file, environment(ranks, device) | {"weights": total, "weights_trained": learns})
    write_atomic(run.config_file, config.to_yaml())  # last: from here on the folder is a run


def environment(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """What the run ran on."""
    import transformers

    return {
        "preftune": preftune.__version__,
        "git": _git(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.world,
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git() -> str | None:
    """The commit that preftune runs from, and whether it was changed since; None where it is installed as a package."""
    here = Path(preftune.__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _n_weights(policy: Policy) -> tuple[int, int]:
    """All weights, and those that learn."""
    sizes = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)


def _describe(policy: Policy, precision: Any) -> str:
    total, learns = _n_weights(policy)
    part = "all of them learn" if learns == total else f"{learns:,} ({learns / total:.2%}) learn"
    return f"{total:,} weights, {part}; {precision} on {next(policy.parameters()).device}"
