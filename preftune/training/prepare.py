"""From settings to all that the loop needs: data read and split, tokenized, model loaded, reference scored.

Whatever can be wrong with the settings, the data or the model is found here, before the first step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from preftune.config import Config, Lora
from preftune.data.read import Dataset, read_examples
from preftune.data.split import leaked_prompts, split_by_prompt
from preftune.data.store import Store
from preftune.data.template import Renderer, build_trees
from preftune.data.tokens import Kept, tokenization_identity
from preftune.data.types import Example, Tree
from preftune.engine.policy import Policy
from preftune.engine.reference import WAITING, Share, keys_of
from preftune.engine.reward import RewardModel
from preftune.errors import ConfigError, DataError, ModelError, nearest
from preftune.files import default_cache
from preftune.losses.records import Scores, SequentialKL
from preftune.model.checkpointing import checkpoint_layers
from preftune.model.compile import use_compiled_layers
from preftune.model.device import Precision, precision_of
from preftune.model.identity import identity
from preftune.model.load import check_vocabulary, is_reward_model, load_model, resolve
from preftune.model.lora import add_lora, cast_frozen
from preftune.model.reward import load_reward_model, set_padding, with_scalar_head
from preftune.run import Run
from preftune.training.dist import Ranks
from preftune.training.material import Material, material
from preftune.training.metrics import BETTER, metric_names
from preftune.training.step import Goal


class Said(NamedTuple):
    """One thing that a user should know: which format, which path, what was dropped."""

    kind: str
    message: str


class Progress(NamedTuple):
    """How far a long stage is."""

    stage: str
    done: int
    total: int


@dataclass
class Data:
    """Tokenized data of a run, with every row accounted for."""

    train: Material
    held_out: Material | None
    samples: list[tuple[Example, NDArray[np.int32]]]  # fixed prompts to answer before and after, and their ids within the limit
    notes: list[Said] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def trees(self) -> list[Tree]:
        """All that a model reads: of training and of the held-out examples, with responses to other prompts where asked for."""
        parts = [self.train, *([self.held_out] if self.held_out else [])]
        return [tree for part in parts for tree in (*part.trees, *(part.mismatched or ()))]

    def digest(self) -> str:
        """Names the exact tokens of all examples and their order: a resumed run must find the same."""
        trees = [*self.train.trees, *(self.held_out.trees if self.held_out else [])]
        prompts = [t.prompt.tobytes() for t in trees if not t.branches]  # a key is of a prompt with a response
        return hashlib.blake2b(b"".join([*keys_of(trees), *prompts]), digest_size=16).hexdigest()


def require(config: Config) -> None:
    """Raises ConfigError where a setting that has no default is missing, or where two contradict each other."""
    needed = {
        "model": (config.model, "give the folder or hub id of the model to train, as model=PATH"),
        "data": (config.data, "give the file with the preferences, as data=FILE"),
    }
    if absent := [f"{name}: {what}" for name, (value, what) in needed.items() if value is None]:
        raise ConfigError("\n".join(absent))
    if not config.lora.r:
        unused = [f"lora.{name}" for name, value in config.lora if value != getattr(Lora(), name)]
        if unused:
            raise ConfigError(f"{', '.join(unused)}: of no effect without adapters; set lora.r to their rank")
    for name in ("model", "reference"):
        folder = getattr(config, name)
        if folder is not None and config.out is not None and _same_folder(folder, config.out):
            raise ConfigError(f"out: {config.out} is the {name} itself, which a run would write over; name another folder")


def require_reference_used(config: Config, goal: Goal) -> None:
    """Raises ConfigError where a setting speaks of a reference that the objectives have not, or cannot have."""
    given = "reference" if config.reference is not None else "sync.every" if config.sync.every else ""
    if given and not any(o.needs_reference for o in goal):
        raise ConfigError(f"{given}: the objective {config.loss_name} has no reference; leave it out")
    if config.reference is not None and is_live(config, goal):
        more = "scores replies that are new" if config.needs_rollouts else "needs more of it than log-probs"
        why = "sync.every moves it" if config.sync.every else f"{config.loss_name} {more}"
        raise ConfigError(f"reference: it has to be the model as it starts, since {why}; leave it out")


def is_live(config: Config, goal: Goal) -> bool:
    """Whether the reference is held beside the policy: it moves, or more is asked of it than the log-probs of the data."""
    return bool(config.sync.every) or any(SequentialKL in o.units | o.given or o.needs_rollouts for o in goal)


def _same_folder(a: str, b: str) -> bool:
    return Path(a).expanduser().resolve() == Path(b).expanduser().resolve()


class Split(NamedTuple):
    """The examples of a run on their two sides."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    sources: dict[str, Dataset]  # by the setting that names them
    notes: list[Said]


def read_split(config: Config) -> Split:
    """Rows read and split by prompt. Raises DataError."""
    assert config.data is not None
    quarantine = Path(config.quarantine) if config.quarantine else None
    source = read_examples(config.data, format=config.format, fields=config.fields, quarantine=quarantine)
    notes = [Said("data", note) for note in source.notes]
    held_out: Sequence[Example] = []
    train: Sequence[Example] = source.examples
    sources = {"data": source}
    if config.eval.data is not None:
        aside = quarantine.with_name(f"eval-{quarantine.name}") if quarantine else None
        other = read_examples(config.eval.data, format=config.format, fields=config.fields, quarantine=aside)
        held_out, sources["eval.data"] = other.examples, other
        notes += [Said("data", note) for note in other.notes]
        if leaked := leaked_prompts(train, held_out):
            notes.append(Said("warning", f"{len(leaked)} of {len(held_out)} evaluation prompts stand in the training data too"))
    elif config.eval.fraction and config.eval.every != 0:
        train, held_out = split_by_prompt(source.examples, config.eval.fraction, config.seed)
        if not held_out:
            notes.append(Said("data", "all examples share one prompt: none is held out for evaluation"))
    return Split(train, held_out, sources, notes)


def read_data(config: Config, renderer: Renderer, goal: Goal) -> Data:
    """Rows to Trees: read, split by prompt, tokenized, and reduced to what the objective uses. Raises DataError."""
    train, held_out, datasets, notes = read_split(config)
    kept = _kept_tokens(config, renderer)
    train_material = material(build_trees(train, renderer, kept=kept), goal)
    held_out_material = _held_out(config, held_out, renderer, kept, goal)
    notes += [Said("warning", kept.problem)] if kept.problem else []
    if any(not isinstance(e.prompt, str) for e in [*train, *held_out]):
        notes += [Said("tokens", line) for line in renderer.describe()]
    notes += [Said("tokens", line) for line in renderer.report.lines()]
    notes += [Said("data", line) for line in train_material.notes]
    unused = [*train_material.dropped, *(held_out_material.dropped if held_out_material else [])]
    if unused:
        reasons = sorted({reason for _, reason in unused})
        notes.append(Said("warning", f"{len(unused)} examples are not used by {config.loss_name}: {'; '.join(reasons)}"))
    prompts = {t.id: t.prompt for t in (held_out_material or train_material).trees}
    samples = [(e, prompts[e.id]) for e in held_out or train if e.id in prompts][: config.samples.n]
    data = Data(train_material, held_out_material, samples, notes)
    check_evaluation(config, goal, data)
    data.counts = _counts(datasets, data, renderer, unused) | {"digest": data.digest()}
    return data


def _kept_tokens(config: Config, renderer: Renderer) -> Kept:
    """Tokens of former runs with this tokenizer, template and limit."""
    assert config.model is not None
    settings = (renderer.chat_template, renderer.max_length, renderer.end_of_turn, renderer.end_of_text)
    return Kept(cache_of(config), tokenization_identity(resolve(config.model), *settings))


def _held_out(config: Config, held_out: Sequence[Example], renderer: Renderer, kept: Kept, goal: Goal) -> Material | None:
    """The held-out examples, None where there are none. Raises DataError that names the setting where they are of no use."""
    if not held_out:
        return None
    try:
        return material(build_trees(held_out, renderer, kept=kept), goal)
    except DataError as error:
        if config.eval.data is not None:
            raise DataError(f"eval.data: {error}") from None
        raise DataError(
            f"eval.fraction: {config.eval.fraction:g} of the prompts, {len(held_out)} examples, are held out, and they are of "
            f"no use: {error}. Hold out more, take another seed, or set eval.fraction=0 for no evaluation"
        ) from None


def check_evaluation(config: Config, goal: Goal, data: Data) -> None:
    """Raises ConfigError for a metric that the objective does not have, or for a choice that nothing could be measured for."""
    known = metric_names(goal)
    if config.eval.metric not in known:
        raise ConfigError(
            f"eval.metric: {config.eval.metric!r} is not measured by {config.loss_name}; {nearest(config.eval.metric, known)}"
        )
    if config.eval.metric not in BETTER:
        raise ConfigError(
            f"eval.metric: {config.eval.metric} names no best step: neither more nor less of it is better; "
            f"choose one of {', '.join(name for name in BETTER if name in known)}"
        )
    for name, asked in (("patience", config.eval.patience is not None), ("keep=best", config.eval.keep == "best")):
        if asked and (data.held_out is None or config.eval.every == 0):
            raise ConfigError(
                f"eval.{name}: needs an evaluation on held-out examples, and there is none; "
                "give eval.data, or eval.fraction and eval.every above 0"
            )


def _counts(datasets: dict[str, Dataset], data: Data, renderer: Renderer, unused: list[tuple[str, str]]) -> dict[str, Any]:
    n_used: int = len(data.train.trees) + (len(data.held_out.trees) if data.held_out else 0)
    n_dropped = sum(d.n_dropped for d in datasets.values()) + len(renderer.report.dropped) + len(unused)
    n_read, n_quarantined = (sum(getattr(d, name) for d in datasets.values()) for name in ("n_read", "n_quarantined"))
    assert n_used + n_dropped + n_quarantined == n_read, "every row is accounted for"
    return {
        "rows_read": n_read,
        "used": n_used,
        "dropped": n_dropped,
        "quarantined": n_quarantined,
        "train_examples": len(data.train.trees),
        "eval_examples": n_used - len(data.train.trees),
        "train_units": data.train.n_units.sum(0).tolist(),
        "eval_units": data.held_out.n_units.sum(0).tolist() if data.held_out else [],
        "train_tokens": sum(t.n_tokens for t in data.train.trees),
        "longest_example_tokens": max(t.n_tokens for t in data.train.trees),
        "responses": sum(len(t.branches) for part in (data.train, data.held_out) if part for t in part.trees),
        "prompts_truncated": renderer.report.prompts_truncated,
        "responses_truncated": renderer.report.responses_truncated,
        "formats": {name: d.formats for name, d in datasets.items()},
        "dropped_rows": [list(d) for d in (*renderer.report.dropped, *unused)],
    }


def load_policy(
    config: Config, renderer: Renderer, trees: Sequence[Tree], device: torch.device, goal: Goal
) -> tuple[Policy, Precision]:
    """The model on its device, with adapters if asked for, scored by the path that was measured exact on `trees`.

    For objectives on scores it is a reward model: the folder's own, or the language model there with a new head.
    """
    assert config.model is not None
    precision = precision_of(config.precision, device)
    kind = RewardModel if learns_scores(goal) else Policy
    folder = resolve(config.model)
    if kind is Policy:
        model = load_model(folder, dtype=precision.weights)
    else:
        model = _reward_model(folder, precision.weights, config.seed)
        set_padding(model, renderer.tokenizer, never=renderer.end_of_turn)
    model = model.to(device)
    check_vocabulary(model, renderer.tokenizer, config.model)
    policy = kind.choose(model, trees, autocast=precision.autocast)
    if config.lora.r:
        base = str(folder.resolve()) if Path(config.model).expanduser().exists() else config.model
        model = add_lora(model, config.lora, base=base, seed=config.seed).to(device)
        if precision.autocast is not None:
            cast_frozen(model, precision.autocast, exactly=config.lora.merge)
        policy = kind(model, policy.path, autocast=precision.autocast)
    if config.batch.activation_checkpointing:
        checkpoint_layers(model)
    if config.compile:
        use_compiled_layers(model, True)
    return policy, precision


def _reward_model(folder: Path, dtype: torch.dtype, seed: int) -> Any:
    if is_reward_model(folder):
        return load_reward_model(folder, dtype=dtype)
    return with_scalar_head(load_model(folder, dtype=dtype), seed=seed)


def learns_scores(goal: Goal) -> bool:
    """Whether what is trained is a reward model. Raises ConfigError where other objectives stand beside it."""
    scoring = [Scores in o.units for o in goal]
    if any(scoring) and not all(scoring):
        names = ", ".join(o.name for o in goal)
        raise ConfigError(f"loss: {names}: a reward model has scores and no log-probs; train it by itself")
    return any(scoring)


def cache_of(config: Config) -> Path:
    """The folder of what is computed once for all runs: reference log-probs, tokens, digests of weights."""
    return Path(config.cache).expanduser() if config.cache else default_cache()


def name_of(model: str, precision: Precision, ranks: Ranks, cache: Path) -> str:
    """The identity of a frozen model. Rank 0 alone reads the weights for it."""
    return ranks.first(lambda: identity(resolve(model), str(precision), cache=cache))


@dataclass
class Reference:
    """The frozen reference of a run: where its log-probs are, and whether the policy starts as it."""

    store: Store
    is_start: bool


def score_reference(
    config: Config, policy: Policy, precision: Precision, trees: Sequence[Tree], ranks: Ranks, tokenizer: Any, *, start: str
) -> Iterator[Said | Progress | Reference]:
    """Scores what the store lacks, with progress; yields the Reference last. Another `reference` is loaded, used and let go.

    start: identity of the model that the policy starts from.
    """
    cache = cache_of(config)
    frozen = start if config.reference is None else name_of(config.reference, precision, ranks, cache)
    with Share(cache, frozen, trees, rank=ranks.rank, world=ranks.world) as share:
        yield from (Said("warning", note) for note in share.notes)
        if share.todo and not share.take():
            yield Said("reference", WAITING)
            share.take(wait=True)
        todo = share.todo
        if frozen == start or todo:  # another model is not even loaded where all of its log-probs are there
            model = policy if frozen == start else _other(config, policy, precision, trees, tokenizer)
            with policy.adapter_off() if config.lora.r else nullcontext():
                for done in share.fill(model, budget=config.batch.tokens_per_microbatch):
                    yield Progress("reference", done, len(todo))
    ranks.barrier()
    store = share.store if ranks.world == 1 else share.reopened()
    n = sum(len(t.branches) for t in trees)
    yield Said("reference", f"{n} reference responses, {'read from' if not todo else 'scored into'} {store.folder}")
    yield Reference(store, frozen == start)


def _other(config: Config, policy: Policy, precision: Precision, trees: Sequence[Tree], tokenizer: Any) -> Policy:
    """The model that `reference` names, on the policy's device."""
    assert config.reference is not None
    other = load_model(resolve(config.reference), dtype=precision.weights)
    check_vocabulary(other, tokenizer, f"reference={config.reference}")
    return Policy.choose(other.to(next(policy.parameters()).device), trees, autocast=precision.autocast)


def check_resumable(run: Run, config: Config) -> None:
    """Raises ConfigError listing every setting that differs from the run's own and would change its result."""
    before, now = _flat(run.config().model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    free = ("out", "cache", "trackers", "device", "checkpoint.", "samples.", "lora.merge", "batch.tokens_per_microbatch",
            "batch.activation_checkpointing")  # fmt: skip
    changed = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k) and not k.startswith(free)]
    if changed:
        lines = "\n".join(f"  {k}: {before.get(k)!r} in the run, {now.get(k)!r} now" for k in changed)
        raise ConfigError(
            f"{run.path}: cannot go on with other settings:\n{lines}\nUse the run's own, or another folder with out="
        )


def check_same_data(run: Run, data: Data) -> None:
    """Raises DataError when the examples are not those that the run began with."""
    if (run.read_json(run.data_file) or {}).get("digest") != data.counts["digest"]:
        raise DataError(f"{run.path}: the data are not those that this run began with; put them back, or start anew with out=")


def check_same_models(run: Run, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ModelError when the model or the reference is not the one that the checkpoint was made with."""
    for name in ("model", "reference"):
        if before.get(name) != now[name]:
            raise ModelError(
                f"{run.path}: the {name} is not the one that this run began with: its weights, its configuration or the "
                "precision are others; put it back, or start anew with out="
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
