"""`preftune.train`: the main job with its progress line, its trackers and its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from preftune.config import Config
from preftune.diagnose.symptoms import Watch, diagnose
from preftune.errors import PreftuneError
from preftune.report.page import write_report
from preftune.run import Run
from preftune.show import Show
from preftune.training.dist import leave
from preftune.training.job import Finished, JobEvent, Started, run_job
from preftune.training.loop import Evaluated, Step
from preftune.training.prepare import Said
from preftune.training.trackers import Tracker, check_trackers, open_trackers


def train(
    config: Config | Mapping[str, Any],
    *,
    resume: bool = False,
    quiet: bool = False,
    on_event: Callable[[JobEvent], None] | None = None,
) -> Run:
    """Trains as `config` says and returns the run: its metrics, samples, model and report.

    Args:
        config: a Config, or a mapping whose keys may be dotted: {"model": "base", "data": "pairs.jsonl", "loss.beta": 0.1}.
        resume: go on with the run in `out`, bit for bit, if there is one; start it if there is none.
        quiet: no progress line, one log line a stage and an evaluation instead.
        on_event: called with everything that happens, as it happens (see preftune.training.job.JobEvent).

    Raises:
        PreftuneError: whatever is wrong with the settings, the data, the model or the disk, before any work where it can be.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    config = Config.of(config)
    check_trackers(config.trackers)
    trackers: list[Tracker] = []
    run: Run | None = None
    watch: Watch | None = None
    with Show(quiet=quiet) as show:
        try:
            for event in run_job(config, resume=resume):
                match event:
                    case Started():
                        trackers = open_trackers(config.trackers, event.run, step=event.step) if show.main else []
                        watch = Watch(event.run, step=event.step) if show.main else None
                    case Step():
                        _track(trackers, event.index, "train", event.metrics)
                    case Evaluated():
                        _track(trackers, event.step, "eval", event.metrics)
                    case Finished():
                        run = event.run
                    case _:
                        pass
                for one in [event, *_noticed(watch, event)]:
                    show(one)
                    if on_event:
                        on_event(one)
        finally:
            leave()
    if run is None:
        raise PreftuneError("the job ended without a result")
    if show.main:
        diagnose(run)
        write_report([run])
    return run


def _noticed(watch: Watch | None, event: JobEvent) -> list[Said]:
    """What an evaluation makes certain of the run, each finding once; the run remembers it."""
    match event:
        case Step() if watch:
            watch.step({"step": event.index, **event.metrics})
        case Evaluated() if watch:
            found = watch.evaluated({"step": event.step, **event.metrics})
            said = [Said("diagnosis", f"{one.name}: {one.said}{'. ' if one.remedy else ''}{one.remedy}") for one in found]
            for one in said:
                watch.run.log_event(one.kind, one.message)
            return said
        case _:
            pass
    return []


def _track(trackers: list[Tracker], step: int, split: str, metrics: dict[str, float]) -> None:
    for tracker in trackers:
        tracker(step, split, metrics)
