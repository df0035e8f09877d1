"""lm-evaluation-harness on the models of an evaluation, where it is installed: `pip install 'preftune[eval]'`.

Its own code scores its own tasks; what comes back is put beside the rest, task by task.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, nearest
from preftune.evaluate.models import Models, Progress


def open_tasks(tasks: Sequence[str], folder: Path | None) -> Any:
    """The harness's own manager of tasks. folder: with YAML files of tasks of your own.

    Raises ConfigError where the harness is not installed, or a task does not exist.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"--lm-eval: lm-evaluation-harness is not installed ({error}); pip install 'preftune[eval]'"
        ) from None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--lm-eval-path {folder}: no such folder; expected the YAML files of your tasks in it")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(f"--lm-eval {unknown[0]}: no such task; {_near(unknown[0], manager.all_tasks)}")
    return manager


def run_harness(
    models: Models, tasks: Sequence[str], manager: Any, *, limit: int | None, on_progress: Progress
) -> dict[str, Any]:
    """Task -> {"policy": metrics, "reference": metrics}, `n` among them: documents that were asked.

    limit: most documents of a task; None: all. The harness bootstraps nothing: `n` gives an accuracy its interval.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    names = ["policy", *(["reference"] if models.against is not None else [])]
    for done, which in enumerate(names):
        on_progress("lm-evaluation-harness", done, len(names))
        wrapped = HFLM(
            pretrained=models.language_model(which),
            tokenizer=models.renderer.tokenizer,
            max_length=models.renderer.max_length,
            batch_size=8,
        )
        results = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, verbosity="ERROR"
        )
        for task in tasks:
            asked = results.get("n-samples", {}).get(task)  # a group of tasks has none
            found[task][which] = _metrics(results["results"][task]) | ({"n": asked["effective"]} if asked else {})
    on_progress("lm-evaluation-harness", len(names), len(names))
    return found


def _near(task: str, known: Sequence[str]) -> str:
    """Thousands are known: the nearest one, or where to look."""
    close = nearest(task, known)
    return close if close.startswith("did you mean") else "`lm_eval ls tasks` lists them, and --lm-eval-path adds your own"


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """Numbers by the name of the metric; "acc,none" is "acc"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
