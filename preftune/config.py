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
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, create_model, model_validator

from preftune.errors import ConfigError, listing, nearest
from preftune.registry import FORMATS, LOSSES
from preftune.yamlfile import Places, dump_yaml, load_yaml, parse_word


def setting(help: str, *, unit: str = "", **bounds: Any) -> Any:
    """What one setting means: a line of help, its unit, and its bounds (`gt`, `ge`, `lt`, `le`).

    Used inside `Annotated[...]`, both here and for the keyword-only parameters of an objective.
    """
    return Field(description=help, json_schema_extra={"unit": unit} if unit else None, **bounds)


def _as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value) if type(value) is int else value  # a folder called 3; a float would not keep its spelling


def _a_format(name: str) -> str:
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"data format {name!r} does not exist; {nearest(name, [*FORMATS, 'auto'])}")
    return name


Text = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]


class Section(BaseModel):
    """A part of the settings: frozen, strict about types, closed to unknown names."""

    model_config = {"frozen": True, "extra": "forbid", "strict": True, "allow_inf_nan": False, "protected_namespaces": ()}


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
    cache: Annotated[Text | None, setting("folder of reference log-probs; null: ~/.cache/preftune")] = None
    trackers: Annotated[list[Literal["tensorboard", "wandb"]], setting("also write the metrics there")] = Field(
        default_factory=list
    )
    loss: Section
    optim: Optim = Optim()
    batch: BatchSettings = BatchSettings()
    lora: Lora = Lora()
    eval: Evaluation = Evaluation()
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
            rate = (2e-5 if self.loss_name == "sft" else 1e-6) * (10 if self.lora.r else 1)
        keep = self.eval.keep or ("best" if self.eval.patience else "last")
        evaluation = self.eval.model_copy(update={"keep": keep, "data": _absolute(self.eval.data)})
        places = {name: _absolute(getattr(self, name)) for name in ("model", "reference", "data", "template")}
        return self.model_copy(update={"optim": self.optim.model_copy(update={"lr": rate}), "eval": evaluation, **places})

    def __reduce__(self) -> tuple[Any, ...]:  # the class was made for the objective: pickle cannot find it by name
        return Config.of, (self.model_dump(),)

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


def _absolute(place: Any) -> Any:
    """A path that exists, whole; hub ids, names of templates and what is not there stay as they are."""
    if isinstance(place, list):
        return [_absolute(p) for p in place]
    if not isinstance(place, str) or not Path(place).expanduser().exists():
        return place
    return str(Path(place).expanduser().resolve())


@cache
def loss_section(name: str) -> type[Section]:
    """The section `loss` for one objective: its keyword-only parameters with their defaults, help and bounds."""
    function = LOSSES[name]
    hints = get_type_hints(function, include_extras=True)
    parameters: dict[str, Any] = {
        p.name: (hints[p.name], p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    parameters = {"name": (Annotated[Literal[name], setting(f"objective: {', '.join(sorted(LOSSES))}")], name), **parameters}
    title = "The objective: its name, then its own parameters."
    return create_model(f"Loss_{name}", __base__=Section, __doc__=title, **parameters)


@cache
def _settings(loss: str) -> type[Config]:
    section = loss_section(loss)
    return create_model("Config", __base__=Config, loss=(section, section()))


def _nested(values: Mapping[Any, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        _set(tree, str(name).split("."), value)
    return tree


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Puts `value` at `path`. A section is merged into what is there; `loss: dpo` means `loss.name: dpo`."""
    section = _is_section(Config.model_fields[path[0]].annotation) if path[0] in Config.model_fields else False
    if path == ["loss"] and isinstance(value, str):
        path = ["loss", "name"]
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
    problems: list[tuple[str, str]] = []
    given = tree.get("loss", {})
    loss = given.get("name", "dpo") if isinstance(given, dict) else getattr(given, "name", "dpo")
    if loss not in list(LOSSES):  # a list: what was given need not be hashable
        problems.append(("loss.name", f"loss {loss!r} does not exist; {nearest(str(loss), LOSSES)}"))
        loss, tree = "dpo", {k: v for k, v in tree.items() if k != "loss"}
    model = _settings(loss)
    try:
        config = model.model_validate(tree)
        if not problems:
            return config
    except ValidationError as error:
        problems += _problems(model, error)
    lines = [f"{where}: {name}: {what}" if (where := places.of(name)) else f"{name}: {what}" for name, what in problems]
    raise ConfigError(lines[0] if len(lines) == 1 else f"{len(lines)} settings are wrong:\n{listing(lines)}") from None


def _problems(model: type[Config], error: ValidationError) -> list[tuple[str, str]]:
    """Each wrong setting once, with what was expected. A union reports every arm: the arms that came deepest count."""
    found: dict[str, list[Any]] = {}
    for e in error.errors():
        found.setdefault(_name(model, e["loc"]), []).append(e)
    deepest = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    problems = []
    for name in deepest:
        what = " or ".join(dict.fromkeys(_expected(model, name, e) for e in found[name]))
        kind, value = found[name][0]["type"], found[name][0]["input"]
        problems.append((name, what if kind in ("extra_forbidden", "value_error") else f"expected {what}; got {_short(value)}"))
    return problems


def _name(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """The dotted name of what pydantic complains about, without the arms of unions: `data.1`, `fields.prompt`."""
    parts: list[str] = []
    at: Any = model
    for part in loc:
        if _is_section(at):
            field = at.model_fields.get(part)
            at = field.annotation if field else None
            parts.append(str(part))
        elif isinstance(part, int) or get_origin(at) is dict and not str(part).startswith("["):
            parts.append(str(part))
    return ".".join(parts)


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (a number or true as text goes in quotes)",
    "too_short": "text that is not empty (null: none)",
    "list_type": "a list, [like, this]",
    "dict_type": "a mapping, {like: this}",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def _expected(model: type[Config], name: str, error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return _unknown(model, name)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "model_type":
        return f"a section with settings such as {next(n for n in _names(model) if n.startswith(name + '.'))}"
    expected: str = _EXPECTED.get(error["type"], error["msg"])
    return expected.format(**error.get("ctx", {}))


def _unknown(model: type[Config], name: str) -> str:
    section, _, parameter = name.partition(".")
    others = [loss for loss in LOSSES if section == "loss" and parameter in loss_section(loss).model_fields]
    if others:
        own = ", ".join(n for n in _names(model) if n.startswith("loss.") and n != "loss.name")
        loss = model.model_fields["loss"].default.name
        return f"a parameter of {', '.join(others)}; the objective {loss} has {own or 'no parameters'}"
    same = [n for n in _names(model) if n.rpartition(".")[2] == name.rpartition(".")[2]]  # `lr` means optim.lr, not lora
    hint = f"did you mean {' or '.join(same)}?" if same else nearest(name, _names(model))
    return f"no such setting; {hint if hint.startswith('did') else '`preftune config` lists them all'}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_section(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, Section)


def _names(model: Any, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from _names(field.annotation, f"{prefix}{name}.")
        yield prefix + name


def describe(loss: str = "dpo") -> str:
    """Every setting with its default, unit and one line of help, as YAML that is itself a recipe."""
    config = Config.of({"loss": {"name": loss}})
    lines = ["# Every setting with its default, its unit in [brackets]. Give any of them as key=value on the command line."]
    lines += _described(type(config), config, indent="")
    return "\n".join(lines) + "\n"


def _described(model: type[BaseModel], values: BaseModel, indent: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        value = getattr(values, name)
        if isinstance(value, Section):
            title = inspect.cleandoc(type(value).__doc__ or "").splitlines()[0]
            lines += ["", f"{indent}{name}:  # {title}", *_described(type(value), value, indent + "  ")]
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        unit = f" [{extra['unit']}]" if "unit" in extra else ""
        choices = _choices(field.annotation)
        help = f"{field.description}{unit}" + (f" ({' | '.join(choices)})" if choices else "")
        shown = dump_yaml({name: value}).strip()
        lines.append(f"{indent}{shown:<{34 - len(indent)}}  # {help}")
    return lines


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(a) for a in get_args(annotation)] if len(get_args(annotation)) > 1 else []
    return [c for a in get_args(annotation) for c in _choices(a)]
