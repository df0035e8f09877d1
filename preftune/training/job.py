"""The main job: from a model folder and a preference file to an aligned model, its metrics and its samples.

    for event in run_job(Config.load("recipes/dpo.yaml", ["model=base", "data=pairs.jsonl"])):
        print(event)

Everything that happens is yielded as it happens; the run folder is written along the way, and `Finished` comes last.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import preftune
from preftune.config import Config
from preftune.data.template import Renderer
from preftune.data.types import Example, Prompt
from preftune.errors import ConfigError, PreftuneError
from preftune.files import json_line, write_atomic
from preftune.generate import Sampling, sample
from preftune.model.device import pick_device
from preftune.model.export import save_model
from preftune.model.load import open_renderer, quiet_transformers
from preftune.run import Run
from preftune.training import checkpoint
from preftune.training.dist import Ranks, join
from preftune.training.loop import Evaluated, Saved, Step, Work, training
from preftune.training.prepare import (
    Data,
    Progress,
    Reference,
    Said,
    check_resumable,
    check_same_data,
    load_policy,
    read_data,
    require,
    score_reference,
)
from preftune.training.step import objective


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
    ranks = join(device)
    run = _folder(config, resume, ranks)
    quiet_transformers()
    created = not run.path.exists()
    try:
        yield from _job(config, run, ranks, device, resume)
    except PreftuneError:
        if created and ranks.main and not run.config_file.exists():
            shutil.rmtree(run.path, ignore_errors=True)  # nothing half-written
        raise


def _folder(config: Config, resume: bool, ranks: Ranks) -> Run:
    if config.out is None:
        if resume or ranks.world > 1:
            raise ConfigError("out: name the folder of the run, as out=runs/NAME")
        return Run(Path("runs") / f"{config.loss_name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return Run(config.out)


def _job(config: Config, run: Run, ranks: Ranks, device: torch.device, resume: bool) -> Iterator[JobEvent]:
    going_on = resume and run.config_file.exists()
    if going_on:
        check_resumable(run, config)
    elif ranks.main:
        Run.create(run.path)  # fails here, before any work, where it cannot be written
    goal = objective(config.loss_name, config.loss_parameters)
    assert config.model is not None
    renderer = open_renderer(config.model, template=config.template, max_length=config.batch.max_length, usual=1024)
    data = read_data(config, renderer, goal)
    yield from data.notes
    trees = [*data.train.trees, *(data.held_out.trees if data.held_out else [])]
    policy, precision = load_policy(config, renderer, trees, device)
    yield Said("model", _describe(policy, precision))
    yield Said("path", policy.path.why)
    if ranks.main and not going_on:
        _write_start(run, config, data, ranks, device)
    reference = None
    if goal.needs_reference:
        for event in score_reference(config, policy, precision, trees, ranks):
            if isinstance(event, Reference):
                reference = event
            else:
                yield event
    resume_from = None
    if going_on:
        resume_from, problems = checkpoint.newest(run.checkpoints)
        yield from (Said("warning", p) for p in problems)
        check_same_data(run, resume_from.state.get("data") if resume_from else None, data)
        yield Said("resume", f"going on after step {resume_from.step}" if resume_from else "no checkpoint yet: starting anew")
    work = Work(
        config=config,
        run=run,
        policy=policy,
        objective=goal,
        train=data.train,
        held_out=data.held_out,
        reference=reference.store if reference else None,
        starts_as_reference=reference is not None and reference.is_start,
        ranks=ranks,
        resume_from=resume_from,
        state={"data": data.digest()},
    )
    first = resume_from.step if resume_from else 0
    yield Started(run, first, work.plan.n_steps)
    if resume_from and resume_from.state["finished"] and run.model.exists():
        yield Said("resume", "this run is finished already: nothing to do")
        yield Finished(run)
        return
    if ranks.main:
        run.rewind_metrics(first)
        if not resume_from:
            yield from _samples(run, config, policy, renderer, data.samples, "before")
    if not (resume_from and resume_from.state["finished"]):
        yield from _logged(run, ranks, training(work))
    else:
        checkpoint.load_weights(resume_from.folder / "weights.safetensors", policy)
    yield from _finish(work, renderer, data)


def _logged(run: Run, ranks: Ranks, events: Iterator[Any]) -> Iterator[Any]:
    for event in events:
        if ranks.main and isinstance(event, Step):
            run.log_metrics({"step": event.index, "split": "train", **event.metrics})
        if ranks.main and isinstance(event, Evaluated):
            run.log_metrics({"step": event.step, "split": "eval", **event.metrics})
        yield event


def _finish(work: Work, renderer: Renderer, data: Data) -> Iterator[JobEvent]:
    run, config = work.run, work.config
    if not work.ranks.main:
        work.ranks.barrier()
        yield Finished(run)
        return
    best = run.best / "weights.safetensors"
    if config.eval.keep == "best" and best.exists():
        checkpoint.load_weights(best, work.policy)
        yield Said("model", f"model/ holds the weights that were best by {config.eval.metric} on held-out examples")
    template = renderer.chat_template if config.template is not None else None
    save_model(work.policy.model, renderer.tokenizer, run.model, chat_template=template)
    if config.lora.merge:
        save_model(work.policy.model, renderer.tokenizer, run.merged, chat_template=template, merge=True)
    yield from _samples(run, config, work.policy, renderer, data.samples, "after")
    work.ranks.barrier()
    yield Finished(run)


def _samples(run: Run, config: Config, policy: Any, renderer: Any, examples: list[Example], when: str) -> Iterator[JobEvent]:
    """Answers the fixed prompts and writes them to samples.jsonl in the place of former ones of the same time."""
    if not examples:
        return
    prompts = [renderer.prompt_ids(e.prompt)[-renderer.max_length :] for e in examples]
    settings = Sampling(temperature=config.samples.temperature, max_tokens=config.samples.max_tokens, seed=config.seed)
    try:
        replies = sample(policy.model, prompts, settings, stop_ids=renderer.stop_ids, pad_id=renderer.end_of_turn)
    except PreftuneError as error:  # a prompt that leaves no room to answer must not cost a run
        yield Said("warning", f"no samples {when} training: {error}")
        return
    rows = [
        {"when": when, "id": e.id, "prompt": shown(e.prompt), "response": renderer.decode(r[0].ids), "ended": r[0].ended}
        for e, r in zip(examples, replies, strict=True)
    ]
    kept = [row for row in run.samples() if row["when"] != when]
    write_atomic(run.samples_file, "".join(json_line(row) for row in kept + rows))


def shown(prompt: Prompt) -> str | list[dict[str, str]]:
    """A prompt as JSON: text, or messages as objects."""
    return prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]


def _write_start(run: Run, config: Config, data: Data, ranks: Ranks, device: torch.device) -> None:
    run.write_json(run.data_file, data.counts)
    run.write_json(run.env_file, environment(ranks, device))
    for note in data.notes:
        run.log_event(note.kind, note.message)
    write_atomic(run.config_file, config.to_yaml())  # last: from here on the folder is a run


def environment(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """What the run ran on."""
    import transformers

    return {
        "preftune": preftune.__version__,
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


def _describe(policy: Any, precision: Any) -> str:
    total = sum(p.numel() for p in policy.parameters())
    learns = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    part = "all of them learn" if learns == total else f"{learns:,} ({learns / total:.2%}) learn"
    return f"{total:,} weights, {part}; {precision} on {next(policy.parameters()).device}"
