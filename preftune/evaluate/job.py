"""The whole of an evaluation: held-out pairs, own answers, perplexity, judges, benchmarks; each part kept as it is finished.

    found = evaluate(Models.open("runs/dpo"), Settings())
    print(found.verdict)

Under torchrun each rank scores and answers its share, and all of them know the same in the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from preftune.config import Config
from preftune.data.read import read_examples
from preftune.data.template import build_trees
from preftune.data.tokens import Report
from preftune.data.types import Example, Tree
from preftune.engine.reference import keys_of
from preftune.errors import ConfigError, DataError
from preftune.evaluate.harness import open_tasks, run_harness
from preftune.evaluate.models import Models, Progress
from preftune.evaluate.own_answers import Judge, answer, compare
from preftune.evaluate.parts import Parts
from preftune.evaluate.perplexity import perplexity, read_documents, spans
from preftune.evaluate.preference import has_rewards, preferences, score_pairs
from preftune.evaluate.record import Evaluation, Perplexity, Preferences, Wins
from preftune.evaluate.verdict import verdict
from preftune.files import make_folder
from preftune.generate import Sampling
from preftune.losses.objective import Objective, objective
from preftune.model.identity import file_digest
from preftune.run import Run
from preftune.training.material import material
from preftune.training.plan import epoch_order
from preftune.training.prepare import Split, read_split
from preftune.training.prompts import split_asked


@dataclass(frozen=True)
class Settings:
    """What is measured.

    data:         held-out pairs; None: those that the run held out.
    out:          folder of the record; None: the run's own.
    prompts:      most prompts that are answered; 0: none.
    per_prompt:   answers to each.
    max_tokens:   longest answer.
    texts:        files whose perplexity is measured.
    window, stride: of the perplexity, in tokens; None: 1024 or the model's context, and half of that.
    answers:      answers to compare with, instead of the reference's own.
    tasks, tasks_folder, task_limit: of lm-evaluation-harness.
    """

    data: str | None = None
    format: str = "auto"
    fields: tuple[tuple[str, str], ...] = ()
    out: Path | None = None
    prompts: int = 128
    per_prompt: int = 2
    max_tokens: int = 256
    seed: int = 0
    texts: tuple[Path, ...] = ()
    window: int | None = None
    stride: int | None = None
    answers: str | None = None
    tasks: tuple[str, ...] = ()
    tasks_folder: Path | None = None
    task_limit: int | None = None


@dataclass(frozen=True)
class Sides:
    """Examples that a policy never saw, and those that it was trained on (None where they are not known), with warnings."""

    held_out: Sequence[Example]
    train: Sequence[Example] | None
    notes: tuple[str, ...]


def evaluate(
    models: Models, settings: Settings, *, judge: Judge | None = None, on_progress: Progress = lambda name, done, total: None
) -> Evaluation:
    """Measures, writes evaluation.json and answers.jsonl, and returns the record.

    Raises ConfigError, DataError, ModelError for what cannot be measured. What an interruption stops is finished by the same
    call, which measures nothing twice.
    """
    tasks = _check(models, settings, judge)
    folder = _folder(models, settings)
    parts, sides = Parts(folder, models.ranks), read_sides(models, settings)
    parts.notes += sides.notes
    held_out = _preferences(models, sides.held_out, "held-out", parts, on_progress)
    train = None
    if held_out is not None and held_out.n_pairs and sides.train:
        train = _preferences(models, _as_many(sides.train, len(sides.held_out), settings.seed), "training", parts, on_progress)
    answered = None
    if not models.scores_only and settings.prompts:
        sampling = Sampling(n=settings.per_prompt, max_tokens=settings.max_tokens, seed=settings.seed)
        answered = answer(models, sides.held_out, sampling, settings.prompts, parts, folder, on_progress)
    wins: tuple[Wins, ...] = ()
    if judge is not None and answered is not None:
        wins = compare(models, answered, judge, folder, settings.answers, parts.notes, seed=settings.seed)
    perplexities = _perplexities(models, settings, parts, on_progress)
    benchmarks = _benchmarks(models, settings, tasks, parts, on_progress)
    found = Evaluation(
        policy=models.name,
        against=models.against,
        beta=None if models.scores_only else models.beta,
        objective="+".join(o.name for o in models.goal) or (models.config.loss_name if models.config else None),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict="",
        worked=None,
        held_out=held_out,
        train=train,
        samples=None if answered is None else answered.samples,
        wins=wins,
        perplexity=perplexities,
        benchmarks=benchmarks,
        notes=tuple(dict.fromkeys(parts.notes)),
    )
    said = verdict(found)
    found = replace(found, verdict=said.sentence, worked=said.worked)
    if models.ranks.main:
        folder.write_json(folder.evaluation_file, found.as_dict())
    models.ranks.barrier()
    return found


def _check(models: Models, settings: Settings, judge: Judge | None) -> Any:
    """Raises ConfigError or DataError before any work for what could not be done later. The tasks of `--lm-eval`, opened."""
    if judge is not None and (models.scores_only or not settings.prompts):
        raise ConfigError("a judge compares answers, and none are written (a reward model, or --n-prompts 0)")
    if judge is not None and settings.answers is None and models.against is None:
        raise ConfigError("--answers or --against: a judge compares with other answers; name a file of them, or a model")
    if settings.texts and models.scores_only:
        raise ConfigError(f"--perplexity: {models.name} is a reward model, which predicts no text")
    if settings.texts:
        spans(models, settings.window, settings.stride)
    for file in settings.texts:
        read_documents(file)
    if settings.tasks and (models.scores_only or models.ranks.world > 1):
        raise ConfigError("--lm-eval: is for a language model, in one process")
    return open_tasks(settings.tasks, settings.tasks_folder) if settings.tasks else None


def _folder(models: Models, settings: Settings) -> Run:
    """Where the record goes. Raises ConfigError where nobody said."""
    if settings.out is None and models.config is None:
        raise ConfigError(f"--out: {models.name} is no run; name the folder that the evaluation is written to")
    folder = Run(settings.out if settings.out is not None else Path(models.name).expanduser())
    if models.ranks.main:
        make_folder(folder.path)
    return folder


def read_sides(models: Models, settings: Settings) -> Sides:
    """The pairs that are scored. Raises ConfigError where there are none."""
    config = models.config
    if settings.data is not None:
        found = read_examples(settings.data, format=settings.format, fields=dict(settings.fields))
        train, notes = None, []
        for line in found.notes:
            models.note(line)
        if config is not None:
            try:
                train = _split(config).train
            except DataError as error:
                notes.append(f"the data that it was trained on cannot be read any more, so there is no gap to show: {error}")
        return Sides(found.examples, train, tuple(notes))
    if config is None:
        raise ConfigError(f"--data: {models.name} is no run, which would have held out some; name a file with preferences")
    split = _split(config)
    if not split.held_out:
        raise ConfigError(
            f"--data: {models.name} held out nothing (eval.fraction=0 or eval.every=0); name a file with preferences"
        )
    return Sides(split.held_out, split.train, tuple(said.message for said in split.notes if said.kind == "warning"))


def _split(config: Config) -> Split:
    """What the run learnt from and what it held out, as it read them: prompts alone where the replies are its own."""
    return split_asked(config) if config.needs_rollouts else read_split(config)


def _as_many(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """So many of the trained examples, drawn once."""
    return [examples[i] for i in sorted(epoch_order(len(examples), seed, 0)[:n].tolist())]


def _preferences(
    models: Models, examples: Sequence[Example], name: str, parts: Parts, on_progress: Progress
) -> Preferences | None:
    """One side, by the run's own rewards or by implicit ones; None where there is nothing to say of it."""
    if not any(example.responses for example in examples):
        return None
    models.renderer.report = Report()
    trees = build_trees(examples, models.renderer)
    parts.notes += [f"{name} examples: {line}" for line in models.renderer.report.lines()[1:]]  # the first only counts them
    own = has_rewards(models.goal)
    goal = models.goal if own else () if models.against is None else (objective("dpo", {"beta": models.beta}),)
    kinds = {
        "category": {e.id: e.category for e in examples},
        "source": {e.id: e.origin or Path(e.source.rpartition(":")[0]).name for e in examples},
    }

    def make(notes: list[str]) -> Preferences | None:
        if not goal:
            notes.append("no accuracy: the objective compares no responses, and without --against there is no implicit reward")
        found = _scored(models, trees, goal, kinds, name, notes, on_progress) if goal else None
        if own or not models.goal:
            return found if own or found is None else replace(found, loss=None)
        again = _scored(models, trees, models.goal, {}, name, notes, on_progress)
        return found if again is None else replace(found or again, loss=again.loss)

    digest = hashlib.blake2b(b"".join(keys_of(trees)), digest_size=16).hexdigest()
    pairs = [[t.id, [list(p) for p in t.pairs], list(t.labels)] for t in trees]
    key = [models.identity(), digest, pairs, kinds, _described(goal), _described(models.goal)]
    return parts.part(name, key, Preferences | None, make)


def _described(goal: Sequence[Objective]) -> list[Any]:
    return [[o.name, o.weight, {k: repr(v) for k, v in o.parameters.items()}, [m.function.__name__ for m in o.modifiers],
             [{k: repr(v) for k, v in m.parameters.items()} for m in o.modifiers]] for o in goal]  # fmt: skip


def _scored(
    models: Models,
    trees: Sequence[Tree],
    goal: Sequence[Objective],
    kinds: Mapping[str, Mapping[str, str]],
    name: str,
    notes: list[str],
    on_progress: Progress,
) -> Preferences | None:
    """What the objectives say of the trees; None, and a note, where they can use none of them."""
    try:
        data = material(trees, goal)
    except DataError as reason:
        notes.append(f"{name} examples: {reason}")
        return None
    if data.dropped:
        reasons = "; ".join(sorted({reason for _, reason in data.dropped}))
        notes.append(f"{len(data.dropped)} of {len(trees)} {name} examples are left out: {reasons}")
    store = None
    if models.against is not None:
        store = models.reference_logps([*data.trees, *(data.mismatched or ())], on_progress)
    scored = score_pairs(
        models.policy(data.trees),
        data,
        goal,
        store,
        reference=lambda: models.reference(data.trees),
        ranks=models.ranks,
        budget=models.budget,
        on_progress=lambda done, total: on_progress(f"{name} pairs", done, total),
    )
    found = preferences(scored.pairs, data.trees, kinds, loss=scored.loss)
    n = len(scored.pairs.tree)
    if has_rewards(goal) and found.n_pairs < n:
        notes.append(f"{n - found.n_pairs} of {n} {name} pairs are left out: a response of theirs has no finite reward")
    return found


def _perplexities(models: Models, settings: Settings, parts: Parts, on_progress: Progress) -> tuple[Perplexity, ...]:
    found = []
    window, stride = spans(models, settings.window, settings.stride)
    for file in settings.texts:
        texts = read_documents(file)

        def make(notes: list[str], file: Path = file, texts: list[str] = texts) -> Perplexity:
            return perplexity(models, file.name, texts, window=window, stride=stride, on_progress=on_progress)

        key = [models.identity(), texts, window, stride]
        found.append(parts.part(f"perplexity of {file}", key, Perplexity, make))
    return tuple(found)


def _benchmarks(models: Models, settings: Settings, tasks: Any, parts: Parts, on_progress: Progress) -> dict[str, Any]:
    if tasks is None:
        return {}

    def make(notes: list[str]) -> dict[str, Any]:
        return run_harness(models, settings.tasks, tasks, limit=settings.task_limit, on_progress=on_progress)

    own = sorted(settings.tasks_folder.rglob("*")) if settings.tasks_folder is not None else []
    files = [[str(p), file_digest(p).hex()] for p in own if p.is_file()]
    key = [models.identity(), list(settings.tasks), settings.task_limit, files]
    found: dict[str, Any] = parts.part("benchmarks", key, dict[str, Any], make)
    return found
