"""A run is one folder, and this class alone knows what its files are called.

    config.yaml      the settings, resolved          metrics.jsonl   one object a line: step, split, metrics by name
    env.json         machine, versions, git state    samples.jsonl   answers to fixed prompts, before and after
    data.json        rows used, dropped, quarantined judgments.jsonl verdicts that were collected for this run
    checkpoints/     to go on from                   model/          the result, an ordinary Hugging Face folder
    events.jsonl     what the run said of itself     report.html     all of it on one page
    evaluation.json  what an evaluation measured     answers.jsonl   the answers that it measured, token by token
    diagnosis.json   findings about the run          merged/         the result of LoRA as a model of its own
    check.json       what `check --json` said, if somebody keeps it here, for the report
    evaluation-parts.json   parts of an evaluation, each kept as it was finished
    rollouts.safetensors   replies that the policy wrote in its last iteration, and learns from

JSON and YAML files are replaced whole; JSONL files only grow, a line at a time.

    >>> run = Run("runs/first")
    >>> [m["loss"] for m in run.metrics(split="train")][:1]
    [0.6931472]
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from preftune.config import Config
from preftune.data.judgments import append_judgments, read_judgments
from preftune.data.types import Judgment
from preftune.errors import StorageError
from preftune.files import append_lines, json_line, make_folder, read_jsonl, storage, write_atomic


class Run:
    """The folder of one run. Reading never needs torch; nothing here is created until something is written."""

    def __init__(self, path: str | Path) -> None:
        """`path` need not exist yet."""
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.env_file = self.path / "env.json"
        self.data_file = self.path / "data.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.events_file = self.path / "events.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.judgments_file = self.path / "judgments.jsonl"
        self.evaluation_file = self.path / "evaluation.json"
        self.evaluation_parts_file = self.path / "evaluation-parts.json"
        self.answers_file = self.path / "answers.jsonl"
        self.diagnosis_file = self.path / "diagnosis.json"
        self.check_file = self.path / "check.json"
        self.rollouts_file = self.path / "rollouts.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.model = self.path / "model"
        self.merged = self.path / "merged"
        self.report_file = self.path / "report.html"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | Path) -> Run:
        """An empty run folder that can be written to. Raises StorageError where one is already in use."""
        run = cls(path)
        if run.config_file.exists():
            raise StorageError(f"{run.path}: holds a run already. Go on with it (--resume), or choose another folder with out=")
        make_folder(run.path)
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """A run folder that exists. Raises StorageError where it is none."""
        run = cls(path)
        if not run.path.exists():
            raise StorageError(f"{run.path}: no such folder, so not a run folder; expected the out= of an earlier run")
        if not run.config_file.exists():
            near = [run.path.parent, *sorted(file.parent for file in run.path.glob("*/config.yaml"))]
            runs = [str(folder) for folder in near if (folder / "config.yaml").exists()]
            expected = f"did you mean {' or '.join(runs)}?" if runs else "expected the out= of an earlier run"
            raise StorageError(f"{run.path}: not a run folder (no config.yaml in it); {expected}")
        return run

    @classmethod
    def all_in(cls, path: str | Path) -> list[Run]:
        """The run in this folder, or those of the sweep that it holds, by name, or the evaluation of a model without a run.

        Raises StorageError where it is none of these.
        """
        within = [] if (Path(path) / "config.yaml").exists() else sorted(Path(path).glob("runs/*/config.yaml"))
        alone = cls(path) if cls(path).evaluation_file.exists() else None
        return [cls(file.parent) for file in within] or [alone or cls.open(path)]

    def config(self) -> Config:
        """The resolved settings of the run."""
        return Config.load(self.config_file)

    def write_json(self, file: Path, content: Any) -> None:
        """One of the run's JSON files, atomically."""
        write_atomic(file, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, file: Path) -> Any:
        """Content of one of the run's JSON files; None where it was not written. Raises StorageError."""
        with storage(file, "read this file"):
            text = file.read_bytes() if file.exists() else b"null"
        try:
            return json.loads(text)
        except ValueError as error:
            mend = f"was it damaged? Delete it, and {self._maker(file)}"
            raise StorageError(f"{file}: not valid JSON ({error}); this file is written by preftune alone: {mend}") from None

    def _maker(self, file: Path) -> str:
        """How one of the run's JSON files comes to be there again."""
        verbs = {self.evaluation_file: "eval", self.evaluation_parts_file: "eval", self.diagnosis_file: "diagnose"}
        return f"`preftune {verbs[file]} {self.path}` writes it anew" if file in verbs else "go on without it"

    def metrics(self, *, split: str | None = None) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl in their order; only those of `split` ("train" or "eval") if given."""
        return [row for row in read_jsonl(self.metrics_file) if split is None or row["split"] == split]

    def log_metrics(self, row: dict[str, Any]) -> None:
        """Adds one row: `step`, `split`, and the metrics by name."""
        append_lines(self.metrics_file, [row])

    def rewind_metrics(self, step: int) -> None:
        """Forgets rows at `step` and later, which a resumed run will write again, and a torn last line."""
        kept = [row for row in self.metrics() if row["step"] < step]
        write_atomic(self.metrics_file, "".join(json_line(row) for row in kept))

    def log_event(self, kind: str, message: str) -> None:
        """Adds one line to what the run said of itself: the format found, the path chosen, what was truncated."""
        append_lines(self.events_file, [{"kind": kind, "message": message}])

    def events(self) -> list[dict[str, Any]]:
        """What the run said of itself, in order."""
        return read_jsonl(self.events_file)

    def judgments(self) -> list[Judgment]:
        """Verdicts that were collected for this run, in order; [] where there are none."""
        return read_judgments(self.judgments_file) if self.judgments_file.exists() else []

    def log_judgments(self, judgments: Iterable[Judgment]) -> None:
        """Adds verdicts to judgments.jsonl."""
        append_judgments(self.judgments_file, judgments)

    def samples(self) -> list[dict[str, Any]]:
        """Rows of samples.jsonl: `when` (before or after), `prompt`, `response`."""
        return read_jsonl(self.samples_file)

    def answers(self) -> list[dict[str, Any]]:
        """Rows of answers.jsonl: `prompt`, and the answers of `policy` and `reference` that an evaluation measured."""
        return read_jsonl(self.answers_file)

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        """Writes answers to samples.jsonl in the place of former ones of the same `when`: a resumed run answers again."""
        again = {row["when"] for row in rows}
        kept = [row for row in self.samples() if row["when"] not in again]
        write_atomic(self.samples_file, "".join(json_line(row) for row in kept + rows))
