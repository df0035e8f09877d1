"""Settings: one frozen tree, from a YAML recipe and `key=value` words, checked whole before any work starts.

    >>> config = Config.load("recipes/dpo.yaml", ["model=base", "data=pairs.jsonl", "loss.beta=0.2"])
    >>> config.loss.beta
    0.2

Later words win over the recipe, the recipe over defaults. A name that does not exist is an error that proposes the nearest
one; so is a value of the wrong type; all mistakes are reported at once, each with its place. The section `loss` has the
parameters of the chosen objective, read from its signature, and no others.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, create_model, model_validator
from pydantic_core import PydanticUndefined

from preftune.errors import ConfigError, listing, nearest
from preftune.registry import FORMATS, LOSSES
from preftune.yamlfile import Places, dump_yaml, load_yaml, parse_scalar


def setting(help: str, *, unit: str = "", **bounds: Any) -> Any:
    """What one setting means: a line of help, its unit, and its bounds (`gt`, `ge`, `lt`, `le`).

    Used inside `Annotated[...]`, both here and for the keyword-only parameters of an objective.
    """
    return Field(description=help, json_schema_extra={"unit": unit} if unit else None, **bounds)


Text = Annotated[str, Field(coerce_numbers_to_str=True)]


class Section(BaseModel):
    """A part of the settings: frozen, strict about types, closed to unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Optim(Section):
    """The optimizer (AdamW) and its schedule."""

    lr: Annotated[
        float | None,
        setting("peak learning rate; null: 1e-6, for sft 2e-5, and ten times that with LoRA", unit="per step", gt=0),
    ] = None
    weight_decay: Annotated[float, setting("decoupled weight decay, on matrices only", unit="1/lr per step", ge=0)] = 0.0
    beta1: Annotated[float, setting("decay of the mean of gradients", unit="fraction", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, setting("decay of the mean of squared gradients", unit="fraction", ge=0, lt=1)] = 0.999
    eps: Annotated[float, setting("added to the denominator", gt=0)] = 1e-8
    schedule: Annotated[
        Literal["linear", "cosine", "constant"], setting("how the learning rate falls after the warm-up, to 0 at the last step")
    ] = "linear"
    warmup: Annotated[
        float, setting("linear rise at the start; below 1 a fraction of all steps, else a number", unit="fraction or steps", ge=0)
    ] = 0.1
    clip: Annotated[float, setting("largest norm of the gradient; 0: no clipping", unit="L2 norm", ge=0)] = 1.0


class BatchSettings(Section):
    """What one optimizer step is made of. Gradient accumulation follows from these; it is not a setting."""

    pairs_per_step: Annotated[int, setting("examples in one optimizer step, over all ranks", unit="examples", ge=1)] = 32
    tokens_per_microbatch: Annotated[
        int, setting("most tokens read in one forward pass on one device; never changes the result", unit="tokens", ge=1)
    ] = 8192
    max_length: Annotated[
        int, setting("longest prompt + response; older prompt turns are cut first, and counted", unit="tokens", ge=2)
    ] = 1024


class Lora(Section):
    """Low-rank adapters (PEFT). The reference is then the same weights with the adapter off."""

    r: Annotated[int, setting("rank of the adapters; 0: train all weights", ge=0)] = 0
    alpha: Annotated[float, setting("adapters are scaled by alpha / r", gt=0)] = 32.0
    dropout: Annotated[float, setting("dropout before the adapters", unit="fraction", ge=0, lt=1)] = 0.0
    targets: Annotated[
        str | list[str], setting("module names that get an adapter, or all-linear (every linear layer but the head)")
    ] = "all-linear"
    merge: Annotated[bool, setting("also write the merged model to OUT/merged")] = False


class Evaluation(Section):
    """Evaluation during training, on prompts that training never sees."""

    data: Annotated[Text | list[Text] | None, setting("held-out preferences; null: split off `data`, by prompt")] = None
    fraction: Annotated[float, setting("share of the prompts held out when `eval.data` is null", unit="fraction", ge=0, lt=1)] = 0.05
    every: Annotated[
        int | None, setting("steps between evaluations; 0: never; null: about ten in a run", unit="steps", ge=0)
    ] = None
    patience: Annotated[
        int | None, setting("stop after this many evaluations without a better metric; null: never", unit="evaluations", ge=1)
    ] = None
    metric: Annotated[
        Text, setting("the metric that says which step is best: loss, rewards/accuracies, rewards/margins, kl")
    ] = "loss"
    keep: Annotated[Literal["last", "best"] | None, setting("which step OUT/model holds; null: best with patience, else last")] = None


class Checkpoints(Section):
    """What is kept so that an interrupted run goes on bit for bit."""

    every: Annotated[int, setting("steps between checkpoints; 0: only when interrupted and at the end", unit="steps", ge=0)] = 100
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
    data: Annotated[Text | list[Text] | None, setting("preference file, folder, saved dataset or hub id; or a list (required)")] = None
    out: Annotated[Text | None, setting("folder of the run; null: runs/LOSS-TIME")] = None
    seed: Annotated[int, setting("seed of order, split, sampling and LoRA initialisation", ge=0)] = 0
    epochs: Annotated[float, setting("passes over the data", unit="epochs", gt=0)] = 1.0
    steps: Annotated[int | None, setting("optimizer steps; null: as many as `epochs` needs", unit="steps", ge=1)] = None
    format: Annotated[Text, setting("data format, or auto (detected by columns and said in the log)")] = "auto"
    fields: Annotated[dict[str, Text], setting("our column name: the file's column name, where they differ")] = Field(
        default_factory=dict
    )
    template: Annotated[
        Text | None, setting("chat template: chatml, plain, or a Jinja file; null: the tokenizer's own")
    ] = None
    quarantine: Annotated[Text | None, setting("file that bad rows are moved to, with the reason; null: a bad row stops the run")] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "pure_bf16"],
        setting("auto: fp32 weights, bf16 autocast on a GPU that has it; pure_bf16: bf16 weights too (small updates are lost)"),
    ] = "auto"
    device: Annotated[Text, setting("auto, cpu, cuda, cuda:1, …")] = "auto"
    cache: Annotated[Text | None, setting("folder of reference log-probs; null: ~/.cache/preftune")] = None
    trackers: Annotated[list[Literal["tensorboard", "wandb"]], setting("also write the metrics there")] = Field(default_factory=list)
    loss: Annotated[SerializeAsAny[Section], setting("the objective: `loss.name`, then its own parameters")]
    optim: Optim = Optim()
    batch: BatchSettings = BatchSettings()
    lora: Lora = Lora()
    eval: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    samples: SampleSettings = SampleSettings()

    @model_validator(mode="before")
    @classmethod
    def _loss_section(cls, values: Any) -> Any:
        if isinstance(values, dict) and not isinstance(values.get("loss"), Section):
            given = values.get("loss") or {}
            if isinstance(given, str):
                given = {"name": given}
            if isinstance(given, dict) and isinstance(given.get("name", "dpo"), str):
                section = loss_section(given.get("name", "dpo"))
                values = {**values, "loss": _validated(section, given, prefix="loss.")}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(f"format: data format {self.format!r} does not exist: {nearest(self.format, FORMATS)}")
        if self.eval.patience is not None and self.eval.every == 0:
            raise ValueError("eval.patience: early stopping needs evaluations, but eval.every is 0")
        return self

    @classmethod
    def load(cls, recipe: str | Path | None = None, words: Sequence[str] = ()) -> Config:
        """Settings from a recipe and `key=value` words. Raises ConfigError that lists every mistake with its place."""
        values, places = load_yaml(Path(recipe)) if recipe is not None else ({}, Places())
        for word in words:
            _assign(values, places, word)
        return cls.of(values, places)

    @classmethod
    def of(cls, values: Config | Mapping[str, Any], places: Places | None = None) -> Config:
        """Settings from a nested mapping; keys may be dotted ("loss.beta")."""
        if isinstance(values, Config):
            return values
        nested: dict[str, Any] = {}
        for key, value in values.items():
            _set(nested, key.split("."), value)
        return cast(Config, _validated(cls, nested, places=places))

    def resolved(self) -> Config:
        """The same settings with every `null` that stands for a rule replaced by its value."""
        rate = self.optim.lr
        if rate is None:
            rate = (2e-5 if self.loss_name == "sft" else 1e-6) * (10 if self.lora.r else 1)
        keep = self.eval.keep or ("best" if self.eval.patience else "last")
        return self.model_copy(
            update={"optim": self.optim.model_copy(update={"lr": rate}), "eval": self.eval.model_copy(update={"keep": keep})}
        )

    @property
    def loss_name(self) -> str:
        """Name of the objective in LOSSES."""
        return cast(str, self.loss.name)  # type: ignore[attr-defined]

    @property
    def loss_parameters(self) -> dict[str, Any]:
        """Keyword arguments of the objective."""
        return {k: v for k, v in self.loss.model_dump().items() if k != "name"}

    def to_yaml(self) -> str:
        """YAML that `Config.load` reads back equal."""
        return dump_yaml(self.model_dump(mode="json"))


@cache
def loss_section(name: str) -> type[Section]:
    """The section `loss` for one objective: its keyword-only parameters with their defaults, help and bounds."""
    function = LOSSES[name]
    hints = get_type_hints(function, include_extras=True)
    parameters = {
        p.name: (hints[p.name], p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    named = (Annotated[Literal[name], setting(f"objective: {', '.join(sorted(LOSSES))}")], name)  # type: ignore[valid-type]
    return create_model(f"Loss_{name}", __base__=Section, name=named, **parameters)  # type: ignore[call-overload, no-any-return]


def _assign(values: dict[str, Any], places: Places, word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word!r} is not a setting: expected key=value, such as loss.beta=0.1")
    _set(values, key.split("."), parse_scalar(text, where=word))
    places[key] = f"command line: {word}"


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for at, part in enumerate(path[:-1]):
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            if part != "loss" or not isinstance(inner, str):
                raise ConfigError(f"{'.'.join(path)}: {'.'.join(path[: at + 1])} is a value, not a section")
            inner = values[part] = {"name": inner}  # `loss: dpo` in a recipe, `loss.beta=…` after it
        values = inner
    values[path[-1]] = value


def _validated(model: type[Section], values: Mapping[str, Any], *, prefix: str = "", places: Places | None = None) -> Section:
    """`model` made of `values`, or one ConfigError that lists every mistake: where, what, what was expected."""
    try:
        return model(**values)
    except ConfigError as error:  # from the loss section, whose places are known only here
        raise ConfigError(_placed(str(error), places)) from None
    except ValidationError as error:
        problems: list[str] = []
        for e in error.errors():
            path = [str(p) for p in e["loc"]]
            name = prefix + ".".join(p for p in path if p in _names(model) or "[" not in p)
            name = _without_union_arms(name)
            problem = _problem(name, e, model, prefix)
            if problem not in problems:
                problems.append(problem)
        raise ConfigError(_placed("\n".join(problems), places)) from None


def _problem(name: str, error: Any, model: type[Section], prefix: str) -> str:
    if error["type"] == "extra_forbidden":
        return f"{name}: no such setting; {nearest(name, (prefix + n for n in _names(model)))}"
    if error["type"] == "value_error" and not error["loc"]:
        return str(error["ctx"]["error"])
    return f"{name}: {error['msg'][0].lower() + error['msg'][1:]}; got {error['input']!r}"


def _without_union_arms(name: str) -> str:
    arms = {"str", "list", "int", "float", "constrained-str", "function-after", "list[constrained-str]"}
    return ".".join(p for p in name.split(".") if p not in arms)


def _placed(text: str, places: Places | None) -> str:
    lines = text.splitlines()
    if places:
        lines = [f"{places[n]}: {line}" if (n := line.split(":", 1)[0]) in places else line for line in lines]
    return lines[0] if len(lines) == 1 else f"{len(lines)} settings are wrong:\n" + listing(lines)


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if inspect.isclass(inner) and issubclass(inner, Section) and inner is not Section:
            names += _names(inner, f"{prefix}{name}.")
        names.append(prefix + name)
    return names


def describe(loss: str = "dpo") -> str:
    """Every setting with its default, unit and one line of help, as YAML that is itself a recipe."""
    config = Config.of({"loss": {"name": loss}})
    lines = ["# Every setting of preftune with its default. Unit in [brackets]. Give any of them as key=value on the command line."]
    lines += _described(type(config), config, indent="")
    return "\n".join(lines) + "\n"


def _described(model: type[BaseModel], values: BaseModel, indent: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        value = getattr(values, name)
        if isinstance(value, Section):
            title = (type(value).__doc__ or "").strip().splitlines()[0] if name != "loss" else field.description
            lines += ["", f"{indent}{name}:  # {title}", *_described(type(value), value, indent + "  ")]
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        unit = f" [{extra['unit']}]" if "unit" in extra else ""
        choices = _choices(field.annotation)
        help = f"{field.description}{unit}" + (f" ({' | '.join(choices)})" if choices else "")
        shown = dump_yaml({name: value}).strip() if field.default is not PydanticUndefined or value else f"{name}: {value}"
        lines.append(f"{indent}{shown:<{34 - len(indent)}}  # {help}")
    return lines


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(a) for a in get_args(annotation)] if len(get_args(annotation)) > 1 else []
    return [c for a in get_args(annotation) for c in _choices(a)]
