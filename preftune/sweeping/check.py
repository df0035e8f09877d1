"""What can be known to be wrong with a sweep before its first run begins: settings of every run, models, data, the metric."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preftune.config import Config
from preftune.data.read import read_examples
from preftune.errors import ConfigError, PreftuneError, listing
from preftune.losses.objective import goal_of
from preftune.model.load import resolve
from preftune.sweeping.grid import Axis, Settings, combinations
from preftune.sweeping.measure import check_metric
from preftune.sweeping.record import Plan
from preftune.sweeping.verdict import described
from preftune.training.metrics import metric_names
from preftune.training.prepare import require, require_reference_used
from preftune.training.trackers import check_trackers


def check(plan: Plan) -> list[Config]:
    """The settings of all runs (of a search: of its values and ends, one by one). Raises one error that lists what is wrong."""
    configs: list[Config] = []
    problems: list[str] = []
    seen: set[str] = set()
    settings = combinations(plan.axes) if plan.trials is None else list(_each(plan.axes))
    for one in settings:
        try:
            config = Config.of({**plan.recipe, **one})
            _check_run(config, plan, seen)
            configs.append(config)
        except PreftuneError as error:
            problems.append(f"{described(one)}: {error}" if one else str(error))
    if problems:
        raise ConfigError(
            problems[0]
            if len(problems) == 1
            else f"{len(problems)} of {len(settings)} runs have wrong settings:\n{listing(problems)}"
        )
    return configs


def _each(axes: dict[str, Axis]) -> Iterator[Settings]:
    """Each value of each axis once, beside the first values of the others."""
    values = {name: tuple(axis) for name, axis in axes.items()}  # of a range: both ends
    first = {name: v[0] for name, v in values.items()}
    yield first
    for name, others in values.items():
        yield from ({**first, name: value} for value in others[1:])


def _check_run(config: Config, plan: Plan, seen: set[str]) -> None:
    require(config)
    goal = goal_of(config)
    require_reference_used(config, goal)
    check_trackers(config.trackers)
    check_metric(plan.metric, metric_names(goal))
    if config.eval.data is None and not (config.eval.fraction and config.eval.every != 0):
        raise ConfigError(
            "runs are evaluated on held-out examples, and there are none: give eval.data, or eval.fraction above 0"
        )
    if plan.metric.startswith("wins.") and not plan.evaluation.get("by"):
        raise ConfigError(f"metric: {plan.metric} needs a judge: name one with --by")
    for model in filter(None, (config.model, config.reference)):
        if model not in seen:
            resolve(model)
            seen.add(model)
    for data in filter(None, (config.data, config.eval.data)):
        _check_data(config, data, seen)


def _check_data(config: Config, data: Any, seen: set[str]) -> None:
    """Reads what no run before it has read, so that a bad row stops the sweep and not each of its runs."""
    key = json.dumps([data, config.format, config.fields, config.quarantine])
    if key not in seen:
        read_examples(
            data, format=config.format, fields=config.fields, quarantine=Path(config.quarantine) if config.quarantine else None
        )
        seen.add(key)
