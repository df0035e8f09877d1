"""Settings: one frozen tree, from a YAML recipe and `key=value` words, checked whole before any work starts.

    >>> config = Config.load("recipes/dpo.yaml", ["model=base", "data=pairs.jsonl", "loss.beta=0.2"])
    >>> config.loss.beta
    0.2

Later words win over the recipe, the recipe over defaults. A name that does not exist is an error that proposes the nearest
one; so is a value of the wrong type; all mistakes are reported at once, each with its place. The section `loss` has the
parameters of the chosen objective, read from its signature, and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, create_model, model_validator

from preftune.errors import ConfigError, listing, nearest
from preftune.loss_settings import entry_of, first_record, loss_section, objectives_in, of_another_objective
from preftune.registry import FORMATS, LOSSES
from preftune.rollout_settings import Critic, Reward, Rollout
from preftune.section import Section, Text, setting
from preftune.settings_text import described, is_section, problems
from preftune.yamlfile import Places, dump_yaml, load_yaml, parse_word


def _a_format(name: str) -> str:
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"data format {name!r} does not exist; {nearest(name, [*FORMATS, 'auto'])}")
    return name


_ROLLOUTS = ("Rollout", "Replies")
_USUAL_RATE = 1e-6
_RATES = {"Tokens": 2e-5, "Scores": 1e-5}  # peak learning rates that are usual for objectives of these records alone


class Optim(Section):
    """The optimizer (AdamW) and its schedule."""

    lr: Annotated[
        float | None,
        setting(
            "peak learning rate; null: 1e-6, for sft 2e-5, for reward models 1e-5, and ten times that with LoRA",
            unit="per step",
            gt=0,
        ),
    ] = None
    weight_decay: Annotated[float, setting("decoupled weight decay, on matrices only", unit="1/lr per step", ge=0)] = 0.0
    beta1: Annotated[float, setting("decay of the mean of gradients", unit="fraction", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, setting("decay of the mean of squared gradients", unit="fraction", ge=0, lt=1)] = 0.999
    eps: Annotated[float, setting("added to the denominator", gt=0)] = 1e-8
    schedule: Annotated[
        Literal["linear", "cosine", "constant"], setting("how the learning rate falls after the warm-up, to 0 at the last step")
    ] = "linear"
    warmup: Annotated[
        float,
        setting("linear rise at the start; below 1 a fraction of all steps, else a number", unit="fraction or steps", ge=0),
    ] = 0.1
    clip: Annotated[float, setting("largest norm of the gradient; 0: no clipping", unit="L2 norm", ge=0)] = 1.0


class BatchSettings(Section):
    """What one optimizer step is made of. Gradient accumulation follows from these; it is not a setting."""

    pairs_per_step: Annotated[int, setting("examples in one optimizer step, over all ranks", unit="examples", ge=1)] = 32
    tokens_per_microbatch: Annotated[
        int, setting("most tokens read in one forward pass on one device; never changes the result", unit="tokens", ge=1)
    ] = 8192
    activation_checkpointing: Annotated[
        bool,
        setting("make each layer's activations again in the backward pass instead of keeping them: less memory, same result"),
    ] = False
    max_length: Annotated[
        int | None,
        setting(
            "longest prompt + response; older prompt turns are cut first, and counted; null: the model's context, at most 1024",
            unit="tokens",
            ge=2,
        ),
    ] = None


class Lora(Section):
    """Low-rank adapters (PEFT). The reference is then the same weights with the adapter off."""

    r: Annotated[int, setting("rank of the adapters; 0: train all weights", ge=0)] = 0
    alpha: Annotated[float, setting("adapters are scaled by alpha / r", gt=0)] = 32.0
    dropout: Annotated[float, setting("dropout before the adapters", unit="fraction", ge=0, lt=1)] = 0.0
    targets: Annotated[
        Text | list[Text], setting("module names that get an adapter, or all-linear (every linear layer but the head)")
    ] = "all-linear"
    merge: Annotated[bool, setting("also write the merged model to OUT/merged")] = False


class Evaluation(Section):
    """Evaluation during training, on prompts that training never sees."""

    data: Annotated[Text | list[Text] | None, setting("held-out preferences; null: split off `data`, by prompt")] = None
    fraction: Annotated[
        float, setting("share of the prompts held out when `eval.data` is null", unit="fraction", ge=0, lt=1)
    ] = 0.05
    every: Annotated[
        int | None, setting("steps between evaluations; 0: never; null: about ten in a run", unit="steps", ge=0)
    ] = None
    patience: Annotated[
        int | None, setting("stop after this many evaluations without a better metric; null: never", unit="evaluations", ge=1)
    ] = None
    metric: Annotated[
        Text, setting("the metric that says which step is best: loss, rewards/accuracies, rewards/margins, kl")
    ] = "loss"
    keep: Annotated[
        Literal["last", "best"] | None, setting("which step OUT/model holds; null: best with patience, else last")
    ] = None

    @model_validator(mode="after")
    def _can_stop_early(self) -> Evaluation:
        if self.patience is not None and self.every == 0:
            raise ValueError("eval.patience needs evaluations to stop at, but eval.every is 0")
        return self


class Sync(Section):
    """The reference follows the policy (TR-DPO, Gorbatovski et al., 2024, arXiv 2404.09656)."""

    every: Annotated[int, setting("steps after which the reference is moved; 0: it is frozen", unit="steps", ge=0)] = 0
    mix: Annotated[
        float, setting("share of the policy in the moved reference; 1: it becomes the policy", unit="fraction", gt=0, le=1)
    ] = 1.0

    @model_validator(mode="after")
    def _moves(self) -> Sync:
        if self.mix != 1.0 and not self.every:
            raise ValueError("sync.mix is of no effect while sync.every is 0; set it to a number of steps")
        return self


class Average(Section):
    """A moving average of the policy's weights, which is then what the run evaluates and saves."""

    kind: Annotated[
        Literal["ema", "bema"] | None, setting("exponential, or bias-corrected (arXiv 2508.00180); null: the last weights")
    ] = None
    decay: Annotated[float, setting("ema: what remains of the average at each step", unit="fraction", ge=0, lt=1)] = 0.99
    power: Annotated[float, setting("bema: κ, how the weight of a new step falls, (lag + step)^-κ", ge=0, le=1)] = 0.5
    bias: Annotated[float, setting("bema: η, how the correction for lag falls, (lag + step)^-η", ge=0)] = 0.2
    lag: Annotated[float, setting("bema: ρ, added to the number of the step", unit="steps", ge=1)] = 10.0

    @model_validator(mode="after")
    def _of_its_kind(self) -> Average:
        owner = {"decay": "ema", "power": "bema", "bias": "bema", "lag": "bema"}
        changed = [name for name in owner if getattr(self, name) != Average.model_fields[name].default]
        if wrong := [name for name in changed if owner[name] != self.kind]:
            raise ValueError(f"average.{wrong[0]} is for average.kind={owner[wrong[0]]}, but the kind is {self.kind or 'null'}")
        return self


class Checkpoints(Section):
    """What is kept so that an interrupted run goes on bit for bit."""

    every: Annotated[int, setting("steps between checkpoints; 0: only when stopped and at the end", unit="steps", ge=0)] = 100
    keep: Annotated[int, setting("newest checkpoints that are kept", unit="checkpoints", ge=1)] = 2


class SampleSettings(Section):
    """Answers to a few fixed prompts before and after training (samples.jsonl)."""

    n: Annotated[int, setting("held-out prompts answered before and after; 0: none", unit="prompts", ge=0)] = 4
    max_tokens: Annotated[int, setting("longest answer", unit="tokens", ge=1)] = 128
    temperature: Annotated[float, setting("0: the likeliest token every time", ge=0)] = 0.0


class Config(Section):
    """Everything that a training run depends on."""

    model: Annotated[Text | None, setting("folder or hub id of the model to train (required)")] = None
    reference: Annotated[Text | None, setting("folder or hub id of the frozen reference; null: `model` as it starts")] = None
    data: Annotated[
        Text | list[Text] | None, setting("preference file, folder, saved dataset or hub id; or a list (required)")
    ] = None
    out: Annotated[Text | None, setting("folder of the run; null: runs/LOSS-TIME")] = None
    seed: Annotated[int, setting("seed of order, split, sampling and LoRA initialisation", ge=0, lt=2**63)] = 0
    epochs: Annotated[float, setting("passes over the data", unit="epochs", gt=0)] = 1.0
    steps: Annotated[int | None, setting("optimizer steps; null: as many as `epochs` needs", unit="steps", ge=1)] = None
    format: Annotated[
        Text, AfterValidator(_a_format), setting("data format, or auto (detected by columns and said in the log)")
    ] = "auto"
    fields: Annotated[dict[str, Text], setting("our column name: the file's column name, where they differ")] = Field(
        default_factory=dict
    )
    template: Annotated[Text | None, setting("chat template: chatml, plain, or a Jinja file; null: the tokenizer's own")] = None
    quarantine: Annotated[
        Text | None, setting("file that bad rows are moved to, with the reason; null: a bad row stops the run")
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "pure_bf16"],
        setting("auto: fp32 weights, bf16 autocast on a GPU that has it; pure_bf16: bf16 weights too (small updates are lost)"),
    ] = "auto"
    device: Annotated[Text, setting("auto, cpu, cuda, cuda:1, …")] = "auto"
    compile: Annotated[
        bool,
        setting("decoder layers through torch.compile: a minute or two at start; what later steps gain is not measured yet"),
    ] = False
    deterministic: Annotated[
        bool, setting("on a GPU: only kernels that add in a fixed order, so that a resumed run is equal bit for bit; slower")
    ] = False
    cache: Annotated[Text | None, setting("folder of reference log-probs and tokens; null: ~/.cache/preftune")] = None
    trackers: Annotated[list[Literal["tensorboard", "wandb"]], setting("also write the metrics there")] = Field(
        default_factory=list
    )
    loss: Section | tuple[Section, ...]
    optim: Optim = Optim()
    batch: BatchSettings = BatchSettings()
    lora: Lora = Lora()
    sync: Sync = Sync()
    average: Average = Average()
    eval: Evaluation = Evaluation()
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    critic: Critic = Critic()
    checkpoint: Checkpoints = Checkpoints()
    samples: SampleSettings = SampleSettings()

    @classmethod
    def load(cls, recipe: str | Path | None = None, words: Sequence[str] = ()) -> Config:
        """Settings from a recipe and `key=value` words. Raises ConfigError that lists every mistake with its place."""
        values, places = load_yaml(Path(recipe)) if recipe is not None else ({}, Places())
        nested = _nested(values)
        for word in words:
            name, value = parse_word(word)
            _set(nested, name.split("."), value)
            places[name] = "command line"
        return _checked(nested, places)

    @classmethod
    def of(cls, values: Config | Mapping[str, Any]) -> Config:
        """Settings from a mapping, nested or with dotted keys ("loss.beta"). Raises ConfigError that lists every mistake."""
        return values if isinstance(values, Config) else _checked(_nested(values), Places())

    def resolved(self) -> Config:
        """The same settings, valid from any folder: each `null` that is a rule replaced by its value, paths whole."""
        rate = self.optim.lr
        if rate is None:
            records = {first_record(LOSSES[loss.name]).__name__ for loss in self.losses}  # type: ignore[attr-defined]
            rate = (_RATES.get(records.pop(), _USUAL_RATE) if len(records) == 1 else _USUAL_RATE) * (10 if self.lora.r else 1)
        keep = self.eval.keep or ("best" if self.eval.patience else "last")
        evaluation = self.eval.model_copy(update={"keep": keep, "data": _absolute(self.eval.data)})
        places = {name: _absolute(getattr(self, name)) for name in ("model", "reference", "data", "template")}
        optim = self.optim.model_copy(update={"lr": rate})
        return self.model_copy(update={"optim": optim, "eval": evaluation, **places, **self._rollouts_resolved()})

    @property
    def needs_rollouts(self) -> bool:
        """Whether an objective learns from what the policy writes itself: on which records is known by their names."""
        return any(first_record(LOSSES[loss.name]).__name__ in _ROLLOUTS for loss in self.losses)  # type: ignore[attr-defined]

    def _rollouts_resolved(self) -> dict[str, Section]:
        if not self.needs_rollouts:
            return {}
        name = self.losses[0].name  # type: ignore[attr-defined]
        beta = self.loss_parameters.get("beta", 0.0)
        file, colon, function = (self.reward.rule or "").rpartition(":")
        rule = f"{_absolute(file)}:{function}" if colon else self.reward.rule
        found = {"model": _absolute(self.reward.model), "template": _absolute(self.reward.template), "rule": rule}
        return {
            "rollout": self.rollout.resolved(name, first_record(LOSSES[name]).__name__, beta),
            "reward": self.reward.model_copy(update=found),
            "critic": self.critic.model_copy(update={"model": _absolute(self.critic.model)}),
        }

    def given(self) -> dict[str, Any]:
        """What was given and no default, with whole paths: `Config.of` makes the same settings of it in any folder."""
        values: dict[str, Any] = self.model_dump(mode="json", exclude_unset=True)
        evaluation = values.get("eval", {})
        for section, names in ((values, ("model", "reference", "data", "template")), (evaluation, ("data",))):
            section |= {name: _absolute(section[name]) for name in names if name in section}
        for name in ("cache", "quarantine"):  # which need not exist yet
            if values.get(name) is not None:
                values[name] = str(Path(values[name]).expanduser().resolve())
        return values

    def __reduce__(self) -> tuple[Any, ...]:  # the class was made for the objective: pickle cannot find it by name
        return Config.of, (self.model_dump(),)

    @property
    def losses(self) -> tuple[Section, ...]:
        """The objectives: one, or those of a list."""
        return self.loss if isinstance(self.loss, tuple) else (self.loss,)

    @property
    def loss_name(self) -> str:
        """Names of the objectives as one word: dpo, dpo+sft, my_loss."""
        return "+".join(cast(str, loss.name).rpartition(":")[2] for loss in self.losses)  # type: ignore[attr-defined]

    @property
    def loss_parameters(self) -> dict[str, Any]:
        """Parameters of the objective; of several, those of the first that has each."""
        found: dict[str, Any] = {}
        for loss in reversed(self.losses):
            found |= {k: v for k, v in loss if k not in ("name", "weight")}
        return found

    def to_yaml(self) -> str:
        """YAML that `Config.load` reads back equal."""
        return dump_yaml(self.model_dump(mode="json"))


def _absolute(place: Any) -> Any:
    """A path that exists, whole; hub ids, names of templates and what is not there stay as they are."""
    if isinstance(place, list):
        return [_absolute(p) for p in place]
    if not isinstance(place, str) or not Path(place).expanduser().exists():
        return place
    return str(Path(place).expanduser().resolve())


@cache
def _settings(losses: tuple[str, ...], listed: bool) -> type[Config]:
    sections = tuple(loss_section(name, weighted=listed) for name in losses)
    if listed:  # YAML has lists, and a frozen setting is a tuple
        several = Annotated[tuple[sections], BeforeValidator(lambda given: tuple(given))]  # type: ignore[valid-type]
        return create_model("Config", __base__=Config, loss=(several, tuple(section() for section in sections)))
    return create_model("Config", __base__=Config, loss=(sections[0], sections[0]()))


def _nested(values: Mapping[Any, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        _set(tree, str(name).split("."), value)
    return tree


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Puts `value` at `path`. A section is merged into what is there; `loss: dpo` means `loss.name: dpo`.

    Several objectives are a list, whose entries are named by their number: `loss.1.weight`.
    """
    section = path[0] == "loss" or is_section(
        Config.model_fields[path[0]].annotation if path[0] in Config.model_fields else None
    )
    if path[0] == "loss" and isinstance(tree.get("loss"), list):
        if len(path) > 1:
            tree, path = entry_of(tree["loss"], path), path[2:]
        else:
            del tree["loss"]  # not one of several any more
    if path == ["loss"] and isinstance(value, str):
        path = ["loss", "name"]
    elif path == ["loss"] and isinstance(value, list | tuple):
        value = [dict(entry) if isinstance(entry, Mapping) else entry for entry in value]
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(path)}: {part} is {tree!r}, a value without parts")
    if len(path) == 1 and section and value is None:  # a section whose lines are all commented out
        tree.setdefault(path[0], {})
    elif len(path) == 1 and section and isinstance(value, Mapping):
        for name, inner in value.items():
            _set(tree, [path[0], str(name)], inner)
    else:
        tree[path[-1]] = value


def _checked(tree: dict[str, Any], places: Places) -> Config:
    """The settings, or one ConfigError that lists every mistake: where, which, what was expected, what was found."""
    losses, wrong = objectives_in(tree)
    listed = isinstance(tree["loss"], list)
    if wrong:  # look for further mistakes with an objective that exists
        losses, listed, tree = ("dpo",), False, {k: v for k, v in tree.items() if k != "loss"}
    model = _settings(losses, listed)
    try:
        config = model.model_validate(tree)
        if not wrong:
            return config
    except ValidationError as error:
        wrong += problems(model, error, elsewhere=lambda name: of_another_objective(name, losses, listed))
    lines = [f"{where}: {name}: {what}" if (where := places.of(name)) else f"{name}: {what}" for name, what in wrong]
    raise ConfigError(lines[0] if len(lines) == 1 else f"{len(lines)} settings are wrong:\n{listing(lines)}") from None


def describe(loss: str | None = None) -> str:
    """Settings with default, unit and one line of help, as YAML that is itself a recipe: all, or the section of one `loss`."""
    config = Config.of({"loss": {"name": loss or "dpo"}})
    if loss is not None:
        (section,) = config.losses
        return "\n".join([f"loss:  # {type(section).__doc__}", *described(type(section), section, "  ")]) + "\n"
    lines = ["# Every setting with its default, its unit in [brackets]. Give any of them as key=value on the command line."]
    return "\n".join([*lines, *described(type(config), config)]) + "\n"
