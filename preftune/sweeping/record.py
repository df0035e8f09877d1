"""A sweep's folder: what is to be run, and what came of it. Other programs read sweep.json; nothing here needs torch.

sweep.yaml    the recipe, what varies, the metric, how runs are evaluated     sweep.json   a row a run, and the best
runs/NAME/    ordinary run folders                                            sweep.html   the same as a page
logs/         what the processes of runs printed                              optuna.db    of a search: its trials
best-of.json  best of n of the reference, where it was asked for
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from preftune.errors import StorageError
from preftune.evaluate.best_of import BestOf
from preftune.evaluate.estimate import Estimate
from preftune.files import storage, write_atomic
from preftune.run import Run
from preftune.sweeping.grid import Axis, Range, Settings
from preftune.sweeping.measure import ACCURACY, KL, TOKENS, WIN_RATE, estimate_of, figure
from preftune.yamlfile import dump_yaml, load_yaml

Status = Literal["waiting", "running", "stopped", "done", "failed"]
COLUMNS = {KL: "KL, nats a reply", WIN_RATE: "win rate, %", TOKENS: "tokens a reply", ACCURACY: "held-out accuracy"}
"""What every sweep's table shows, where it was measured, and how its columns are headed."""


class Folder:
    """Where everything of a sweep is."""

    def __init__(self, path: str | Path) -> None:
        """`path` need not exist yet."""
        self.path = Path(path)
        self.plan_file = self.path / "sweep.yaml"
        self.table_file = self.path / "sweep.json"
        self.page_file = self.path / "sweep.html"
        self.best_of_file = self.path / "best-of.json"
        self.search_file = self.path / "optuna.db"
        self.logs = self.path / "logs"
        self.lock_file = self.path / ".lock"

    def run(self, name: str) -> Run:
        """The folder of one run."""
        return Run(self.path / "runs" / name)


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do: all that decides its result."""

    recipe: dict[str, Any]  # settings of all runs, as `Config.of` takes them
    axes: dict[str, Axis]
    metric: str
    direction: int  # 1: more of the metric is better, -1: less
    trials: int | None  # of a search; None: the whole grid
    seed: int  # of the search
    evaluation: dict[str, Any]  # keyword arguments of the evaluation of each run

    def to_yaml(self) -> str:
        """YAML that `read` reads back equal."""
        axes = {name: axis._asdict() if isinstance(axis, Range) else list(axis) for name, axis in self.axes.items()}
        return dump_yaml({**vars(self), "axes": axes})

    @classmethod
    def read(cls, folder: Folder) -> Plan:
        """The plan of a sweep that was begun. Raises StorageError where there is none."""
        if not folder.plan_file.exists():
            raise StorageError(
                f"{folder.path}: not a sweep (no {folder.plan_file.name} in it); expected the --out of an earlier one"
            )
        values, _ = load_yaml(folder.plan_file)
        try:
            axes = {n: Range(**a) if isinstance(a, dict) else tuple(a) for n, a in values.pop("axes").items()}
            return cls(axes=axes, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{folder.plan_file}: not the plan of a sweep ({error}); it is written by preftune alone"
            ) from None


@dataclass
class Row:
    """One run of a sweep and what was measured of it."""

    name: str
    settings: Settings
    status: Status = "waiting"
    reason: str = ""  # why it failed
    seconds: float | None = None  # that it took, training and evaluation, interruptions not counted
    figures: dict[str, Estimate] = field(default_factory=dict)

    def measure(self, run: Run, metric: str) -> None:
        """Reads the figures of a run that is done."""
        evaluation = run.read_json(run.evaluation_file)
        rows = run.metrics(split="eval")
        found = {name: figure(name, evaluation, rows[-1] if rows else {}) for name in dict.fromkeys([metric, *COLUMNS])}
        self.figures = {name: e for name, e in found.items() if e is not None}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an estimate is an object with `value`, `low`, `high`, `n`; null where there is no interval."""
        return {**vars(self), "figures": {name: plain_estimate(e) for name, e in self.figures.items()}}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Row:
        """The row from its JSON."""
        return cls(**{**values, "figures": {name: estimate_of(e) for name, e in values["figures"].items()}})


def plain_estimate(e: Estimate) -> dict[str, Any]:
    """For JSON: null for what is not finite."""
    return {part: v if math.isfinite(v) else None for part, v in e._asdict().items()}


def best_of_json(found: Sequence[BestOf]) -> str:
    """The content of best-of.json."""
    rows = [{n: plain_estimate(v) if isinstance(v, Estimate) else v for n, v in one._asdict().items()} for one in found]
    return json.dumps(rows, indent=1, allow_nan=False) + "\n"


def read_best_of(folder: Folder) -> list[BestOf]:
    """The baseline, where it was measured. Raises StorageError."""
    if not folder.best_of_file.exists():
        return []
    try:
        rows = json.loads(folder.best_of_file.read_text(encoding="utf-8"))
        return [
            BestOf(
                n=row["n"],
                score=estimate_of(row["score"]),
                win_rate=estimate_of(row["win_rate"]),
                kl_at_most=row["kl_at_most"],
                kl=estimate_of(row["kl"]),
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{folder.best_of_file}: not what was measured of best of n ({error}); delete it") from None


def read_rows(folder: Folder) -> list[Row]:
    """The rows that an earlier call left; [] where there are none. Raises StorageError."""
    if not folder.table_file.exists():
        return []
    with storage(folder.table_file, "read this file"):
        text = folder.table_file.read_text(encoding="utf-8")
    try:
        return [Row.of(values) for values in json.loads(text)["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{folder.table_file}: not the table of a sweep ({error}); it is written by preftune alone"
        ) from None


def write_table(folder: Folder, content: Mapping[str, Any]) -> None:
    """Writes sweep.json, atomically."""
    write_atomic(folder.table_file, json.dumps(cast(Any, content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
