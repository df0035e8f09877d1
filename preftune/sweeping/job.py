"""`preftune.sweep`: one recipe with many settings, each run trained and evaluated alike, and all on one table.

>>> found = preftune.sweep("recipes/dpo.yaml", {"loss.beta": [0.01, 0.1, 0.5], "model": ["base"], "data": ["pairs.jsonl"]})
>>> found.verdict.sentence
'Best by held_out.accuracy (higher is better): loss.beta=0.1, 0.782 ± 0.031. …'

Runs are ordinary run folders. The reference is scored by the first that needs it and read by all others, also by those that are
at work at the same time.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from preftune.config import Config
from preftune.errors import ConfigError, Interrupted
from preftune.evaluate.best_of import BestOf
from preftune.files import Lock, make_folder, write_atomic
from preftune.losses.objective import goal_of
from preftune.sweeping.check import check
from preftune.sweeping.evaluation import How, how_of
from preftune.sweeping.grid import Settings, checked_axes, run_name
from preftune.sweeping.measure import ACCURACY, KL, WIN_RATE, check_metric, direction_of, is_comparable
from preftune.sweeping.page import write_page
from preftune.sweeping.pool import Pool, seats_for
from preftune.sweeping.record import Folder, Plan, Row, best_of_json, read_best_of, read_rows, write_table
from preftune.sweeping.search import Grid, OptunaSearch, Search
from preftune.sweeping.show import Board
from preftune.sweeping.verdict import Candidate, Verdict, candidates, frontier, gain_of, varied, verdict
from preftune.sweeping.worker import Baseline, Ended, Job, News
from preftune.training.interrupt import term_interrupts
from preftune.training.metrics import BETTER, metric_names


class Sweep(NamedTuple):
    """What came of a sweep."""

    path: Path
    plan: Plan
    rows: list[Row]  # a run each
    verdict: Verdict
    gain: str  # what the frontier sets against KL
    frontier: list[Candidate]  # settings that no others beat in both, by their KL
    best_of: list[BestOf]  # of the reference, where it was asked for
    notes: list[str]  # what one should know when reading the figures

    def as_dict(self) -> dict[str, Any]:
        """The content of sweep.json."""
        return {
            "metric": self.plan.metric,
            "direction": "higher" if self.plan.direction > 0 else "lower",
            "varied": list(self.plan.axes),
            "runs": [row.as_dict() for row in self.rows],
            **self.verdict.as_dict(),
            "gain": self.gain,
            "frontier": [{"settings": c.settings, "runs": c.runs} for c in self.frontier],
            "best_of": json.loads(best_of_json(self.best_of)),
            "notes": self.notes,
        }


def sweep(
    recipe: str | Path | Config | Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    metric: str | None = None,
    direction: Literal["higher", "lower"] | None = None,
    optuna: int | None = None,
    seed: int = 0,
    evaluation: Mapping[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Sweep:
    """Trains and evaluates a run for every combination of the grid, or for as many as a search is to try.

    Args:
        recipe: settings of all runs: a YAML file, a Config, or a mapping as `preftune.train` takes it.
        grid: setting -> its values (a list), or for a search also `preftune.sweeping.grid.Range(low, high)`.
        out: folder of the sweep; None: runs/sweep-TIME.
        jobs: runs at once; None: one a GPU, on a CPU one.
        metric: what is best: a path into the evaluation (`held_out.accuracy`, `wins.0.win_rate`, `samples.kl_per_response`, …)
            or a metric of training on held-out examples. None: the win rate where a judge is named, else the held-out accuracy.
        direction: whether more or less of the metric is better; None: as is known of it.
        optuna: runs of a search by Optuna within the grid's values and ranges; None: the whole grid.
        seed: of that search.
        evaluation: how each run is evaluated, by the fields of `sweeping.evaluation.How`: {"by": "rule", "judge": "my.py:f"}.
        resume: go on with the sweep in `out`: runs that are done stay, one that was stopped goes on bit for bit, those that
            failed are tried again. Recipe, grid and the rest may be left out then, and must be the same where they are given.
        quiet: no progress line.

    Raises:
        PreftuneError: what is wrong with the settings of any run, all of it, before the first begins.
        Interrupted: SIGTERM or Ctrl-C; runs under way are saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a sweep starts its runs itself, and is not started by torchrun: leave that out")
    folder = Folder(out if out is not None else Path("runs") / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    given = None
    if recipe is not None or grid is not None:
        given = _plan(recipe, grid or {}, metric, direction, optuna, seed, dict(evaluation or {}))
    elif metric or direction or optuna or seed or evaluation:
        raise ConfigError("what a sweep measures belongs to its recipe: give that too, or go on (--resume) without any of it")
    plan = _settled(folder, given, resume)
    configs = check(plan)
    seats = seats_for(jobs, configs[0].device)
    make_folder(folder.path)
    with Board(quiet=quiet) as board, term_interrupts(), Lock(folder.lock_file) as lock:
        if not lock.take():
            board.say(f"{folder.path}: another sweep is at work in this folder: waiting for it to end")
            lock.take(wait=True)
            plan = _settled(folder, given, resume)
        work = _Work(folder, plan, board, n_seats=len(seats))
        try:
            with Pool(seats, logs=folder.logs, lock=lock) as pool:
                for name, said in pool.run(work.next_job):
                    work.hear(name, said)
        except KeyboardInterrupt:
            work.stop()
            done = sum(row.status == "done" for row in work.rows)
            again = f"preftune sweep --resume --out {shlex.quote(str(folder.path))}"
            raise Interrupted(f"stopped after {done} of {work.n_runs} runs; all is kept. Go on with: {again}") from None
    found = work.result()
    write_page(found)
    return found


def read_sweep(path: str | Path) -> Sweep:
    """What came of a sweep so far, from its folder. Raises StorageError where it is none."""
    folder = Folder(path)
    return _result(folder, Plan.read(folder), read_rows(folder))


def _plan(
    recipe: Any,
    grid: Mapping[str, Any],
    metric: str | None,
    direction: str | None,
    optuna: int | None,
    seed: int,
    how: Settings,
) -> Plan:
    config = Config.load(recipe) if isinstance(recipe, str | Path) else Config.of(recipe or {})
    if config.out is not None:
        raise ConfigError(f"out: {config.out}: a sweep names the folders of its runs; give the folder of all with --out")
    if optuna is not None and optuna < 1:
        raise ConfigError(f"--optuna {optuna}: expected 1 run or more")
    axes = checked_axes(grid)
    if "out" in axes:
        raise ConfigError("out: a sweep names the folders of its runs; give the folder of all with --out")
    measured = how_of(how)
    name = metric or (WIN_RATE if measured.by else ACCURACY)
    check_metric(name, [*BETTER, *metric_names(goal_of(config))])
    return Plan(config.given(), axes, name, direction_of(name, direction), optuna, seed, _plain(measured))


def _plain(how: How) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(how).items()}


def _settled(folder: Folder, given: Plan | None, resume: bool) -> Plan:
    """The plan to carry out. Raises StorageError and ConfigError where the folder and what is given do not fit."""
    if not resume or not folder.plan_file.exists():
        if given is None:
            return Plan.read(folder) if resume else _nothing_given()
        if folder.plan_file.exists():
            raise ConfigError(f"{folder.path}: holds a sweep already. Go on with it (--resume), or choose another --out")
        return given
    plan = Plan.read(folder)
    if given is not None:
        other = [name for name, value in vars(given).items() if value != getattr(plan, name)]
        if other:
            lines = "\n".join(f"  {name}: {getattr(plan, name)!r} there, {getattr(given, name)!r} now" for name in other)
            raise ConfigError(
                f"{folder.path}: this sweep was begun with other settings:\n{lines}\n"
                f"preftune sweep --resume --out {folder.path} goes on with its own; another --out begins anew"
            )
    return plan


def _nothing_given() -> Plan:
    raise ConfigError("give a recipe and what varies, as: preftune sweep recipes/dpo.yaml loss.beta=0.01,0.1,0.5")


class _Work:
    """The rows of a sweep that is under way."""

    def __init__(self, folder: Folder, plan: Plan, board: Board, *, n_seats: int) -> None:
        self.folder, self.plan, self.board = folder, plan, board
        self.search: Search
        if plan.trials is None:
            self.search = Grid(plan.axes)
            names = [Row(run_name(s), s) for s in self.search.settings]
            self.n_runs = len(names)
        else:
            self.search = OptunaSearch(
                plan.axes, folder.search_file, trials=plan.trials, seed=plan.seed, direction=plan.direction
            )
            names, self.n_runs = [], plan.trials
        known = {row.name: row for row in read_rows(folder)}
        self.rows = [known.pop(row.name, row) for row in names] + list(known.values())
        for row in self.rows:
            row.status = "stopped" if row.status == "running" else row.status  # the sweep was killed
        write_atomic(folder.plan_file, plan.to_yaml())
        self._since: dict[str, float] = {}
        self.baseline: Row | None = None
        board.begin(self.n_runs, sum(row.status == "done" for row in self.rows), n_seats)
        self._write()

    def next_job(self) -> Job | Baseline | None:
        """The next run that is not done yet; the baseline when all have begun."""
        while (settings := self.search.ask()) is not None:
            row = self._row(settings)
            if row.status == "done":
                self._tell(row)
            elif row.status == "running":  # a search that draws the same once more
                self.search.tell(settings, None)
            else:
                row.status, row.reason = "running", ""
                self._since[row.name] = time.monotonic()
                self.board.start(row)
                self._write()
                config = {**self.plan.recipe, **settings, "out": str(self.folder.run(row.name).path.resolve())}
                return Job(row.name, config, self.plan.evaluation)
        return self._next_baseline()

    def _next_baseline(self) -> Baseline | None:
        """Best of n, once one run is done, whose prompts it is measured on."""
        done = [row for row in self.rows if row.status == "done"]
        if not done or not self.plan.evaluation.get("best_of") or self.baseline or self.folder.best_of_file.exists():
            return None
        self.baseline = Row("best of n of the reference", {}, "running")
        self.board.start(self.baseline)
        run = self.folder.run(done[0].name)
        return Baseline(self.baseline.name, str(run.path), self.plan.evaluation, str(self.folder.best_of_file))

    def hear(self, name: str, said: News | Ended) -> None:
        """Takes in what a worker said of a run."""
        baseline = [self.baseline] if self.baseline else []
        row = next(row for row in [*baseline, *self.rows] if row.name == name)
        if isinstance(said, News):
            self.board.news(row, said)
            return
        if row is self.baseline:
            row.status, row.reason = said.status, said.reason
            self.board.end(row, self.plan.metric)
            self._write()
            return
        row.seconds = (row.seconds or 0.0) + time.monotonic() - self._since.pop(name)
        row.status, row.reason = said.status, said.reason
        if row.status == "done":
            row.measure(self.folder.run(name), self.plan.metric)
        if row.status != "stopped":
            self._tell(row)
        self.board.end(row, self.plan.metric)
        self._write()

    def stop(self) -> None:
        """Notes which runs were under way."""
        for row in self.rows:
            if row.status == "running":
                row.status = "stopped"
                row.seconds = (row.seconds or 0.0) + time.monotonic() - self._since[row.name]
        self._write()

    def result(self) -> Sweep:
        """What came of it."""
        found = _result(self.folder, self.plan, self.rows)
        if self.baseline is not None and self.baseline.status == "failed":
            found.notes.append(f"Best of n was not measured: {self.baseline.reason}.")
        return found

    def _row(self, settings: Settings) -> Row:
        name = run_name(settings)
        for row in self.rows:
            if row.name == name:
                return row
        self.rows.append(Row(name, settings))
        return self.rows[-1]

    def _tell(self, row: Row) -> None:
        found = row.figures.get(self.plan.metric) if row.status == "done" else None
        self.search.tell(row.settings, None if found is None or math.isnan(found.value) else found.value)

    def _write(self) -> None:
        write_table(self.folder, self.result().as_dict())


def _result(folder: Folder, plan: Plan, rows: list[Row]) -> Sweep:
    found, gain, baseline = candidates(rows), gain_of(rows, plan.metric), read_best_of(folder)
    best = frontier(found, gain, direction_of(gain, None) if gain != plan.metric else plan.direction)
    return Sweep(
        folder.path,
        plan,
        rows,
        verdict(rows, plan.metric, plan.direction),
        gain,
        best,
        baseline,
        _notes(plan, rows, baseline),
    )


def _notes(plan: Plan, rows: Sequence[Row], best_of: Sequence[BestOf]) -> list[str]:
    notes = []
    if not is_comparable(plan.metric, varied(plan.axes)):
        notes.append(
            f"{plan.metric} is in the units of each run's own loss, which differ here: it does not say which run is better. "
            f"{ACCURACY}, or a win rate (--by), is the same for all."
        )
    if "seed" in plan.axes and not plan.recipe.get("eval", {}).get("data"):
        notes.append("Seeds hold out other examples each: give eval.data for the same ones in all runs.")
    if failed := [row.name for row in rows if row.status == "failed"]:
        notes.append(f"{len(failed)} of {len(rows)} runs failed and are not compared: {', '.join(failed)}.")
    lacking = [row.name for row in rows if row.status == "done" and plan.metric not in row.figures]
    if lacking:
        notes.append(f"{plan.metric} was not measured of {', '.join(lacking)}.")
    n_prompts = max((row.figures[KL].n for row in rows if KL in row.figures), default=0)
    notes += [
        f"Best of {one.n} rests on {one.score.n} of {n_prompts} prompts: of the others too few answers could be scored."
        for one in best_of
        if one.score.n < n_prompts
    ]
    return notes
