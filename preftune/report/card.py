"""The model card: README.md beside the weights, with the true figures of the run, in the form that the Hugging Face hub reads.

Written when training ends, and again whenever the report is: an evaluation that came later is then in it. A card that somebody
has made their own, by removing its last line, is left as it is. Paths are shortened, since a card is made to be published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from preftune.files import write_atomic
from preftune.report import measured
from preftune.report.loaded import Loaded
from preftune.report.text import number, short, text

MARK = "<!-- preftune writes this card anew with every report; remove this line to keep your own words -->"
_PRIVATE = ("out", "cache")  # where things lay on somebody's disk
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_cards(one: Loaded) -> list[Path]:
    """Writes the card of each model in the run's folder and returns their paths. Raises StorageError."""
    written = []
    for folder in (one.run.model, one.run.merged):
        file = folder / "README.md"
        if folder.is_dir() and (not file.exists() or MARK in file.read_text(encoding="utf-8", errors="replace")):
            write_atomic(file, card(one, folder))
            written.append(file)
    return written


def card(one: Loaded, folder: Path) -> str:
    """The card of the model in `folder`."""
    adapter, scores = (folder / "adapter_config.json").exists(), _is_reward_model(folder)
    front = yaml.safe_dump(_front(one, adapter=adapter, scores=scores), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n",
        f"# {one.name}\n",
        _verdict(one),
        _table(("", ""), _facts(one)),
        "## Evaluation\n",
        _evaluation(one),
        "## Data\n",
        _table(("", ""), [(name, text(one.data[name])) for name in _COUNTS if name in one.data]) or one.missing["data"] + "\n",
        "## Use\n",
        _use(adapter=adapter, scores=scores),
        "## Settings\n",
        _fenced("".join(f"{name}: {value}\n" for name, value in _settings(one)), "yaml"),
        "## Versions\n",
        _table(("", ""), [(name, text(one.environment[name])) for name in _VERSIONS if one.environment.get(name)]),
        MARK + "\n",
    ]
    return "\n".join(part for part in parts if part)


_COUNTS = (
    "rows_read",
    "prompts",
    "used",
    "dropped",
    "quarantined",
    "train_examples",
    "eval_examples",
    "train_tokens",
    "longest_example_tokens",
)
_VERSIONS = ("preftune", "git", "torch", "transformers", "python", "device")


def _front(one: Loaded, *, adapter: bool, scores: bool) -> dict[str, Any]:
    """What the hub reads: a base model and data sets are named where they are on the hub."""
    values = one.values
    base, data = values.get("model", ""), values.get("data", "")
    front: dict[str, Any] = {"base_model": base} if _on_hub(base) else {}
    front["library_name"] = "peft" if adapter else "transformers"
    front["pipeline_tag"] = "text-classification" if scores else "text-generation"
    front["tags"] = ["preftune", "alignment", *_objectives(values), *(["lora"] if adapter else [])]
    if _on_hub(data):
        front["datasets"] = [data]
    if results := _results(one, front["pipeline_tag"]):
        front["model-index"] = [{"name": one.name, "results": results}]
    return front


def _results(one: Loaded, task: str) -> list[dict[str, Any]]:
    found = one.evaluation
    if found is None:
        return []
    metrics = [
        {"type": "win_rate", "value": round(wins.win_rate.value, 3), "name": f"win rate against {short(wins.against)}, %"}
        for wins in found.wins
    ]
    if found.held_out:
        value = round(found.held_out.accuracy.value, 5)
        metrics.append({"type": "accuracy", "value": value, "name": "held-out preference accuracy"})
    if found.samples and found.samples.kl_per_response:
        value = round(found.samples.kl_per_response.value, 4)
        metrics.append({"type": "kl", "value": value, "name": "KL from the reference, nats per response"})
    data = {"name": "held-out preferences", "type": "preferences"}
    return [{"task": {"type": task}, "dataset": data, "metrics": metrics}] if metrics else []


def _verdict(one: Loaded) -> str:
    found = one.evaluation
    if found is None:
        return "Whether alignment worked was not evaluated.\n"
    sentence = found.verdict
    for place in (found.policy, found.against or "", *(wins.against for wins in found.wins)):
        sentence = sentence.replace(place, short(place)) if place else sentence
    return f"{sentence}\n"


def _facts(one: Loaded) -> list[tuple[str, str]]:
    values = one.values
    names = {"model": "base model", "reference": "reference", "data": "data", "loss.beta": "β", "optim.lr": "learning rate"}
    facts = [("objective", ", ".join(_objectives(values)))]
    facts += [(shown, short(values[name])) for name, shown in names.items() if values.get(name, "none") != "none"]
    steps = [row["step"] for row in one.metrics if row.get("split") == "train" and isinstance(row.get("step"), int)]
    return [*facts, ("steps", number(max(steps) + 1))] if steps else facts


def _objectives(values: Mapping[str, str]) -> list[str]:
    named = [values["loss.name"]] if "loss.name" in values else []
    return named or re.findall(r'"name": "([\w:.-]+)"', values.get("loss", ""))


def _evaluation(one: Loaded) -> str:
    if one.evaluation is None:
        return f"{one.missing['evaluation'] or 'Not evaluated.'} `preftune eval` on the run's folder measures it.\n"
    rows = [(row.name.strip(), row.before, row.value, row.interval) for row in measured.rows(one.evaluation)]
    return _table(("Measured", "Before", "Value", "95 % interval"), rows)


def _use(*, adapter: bool, scores: bool) -> str:
    kind = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    library = "peft" if adapter else "transformers"
    kind = f"AutoPeft{kind.removeprefix('Auto')}" if adapter else kind
    imports = f"from {library} import {kind}\nfrom transformers import AutoTokenizer\n"
    imports = imports if adapter else f"from transformers import {kind}, AutoTokenizer\n"
    return _fenced(
        f'{imports}\nmodel = {kind}.from_pretrained("PATH")\ntokenizer = AutoTokenizer.from_pretrained("PATH")\n', "python"
    ) + ("" if scores else "\nor `preftune chat PATH`\n")


def _settings(one: Loaded) -> Iterable[tuple[str, str]]:
    return ((name, short(value)) for name, value in one.values.items() if name not in _PRIVATE)


def _on_hub(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _is_reward_model(folder: Path) -> bool:
    try:
        content = json.loads((folder / "config.json").read_bytes())
        return any("SequenceClassification" in name for name in content["architectures"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [_cells(row) for row in rows]
    return "\n".join([_cells(head), "|" + " --- |" * len(head), *lines]) + "\n" if lines else ""


def _cells(row: Iterable[str]) -> str:
    """A row of a table, its texts on one line and read as text."""
    cells = (re.sub(r"([\\`*_\[\]|<>])", r"\\\1", " ".join(cell.split())) for cell in row)
    return "| " + " | ".join(cells) + " |"


def _fenced(content: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", content)), default=0))
    return f"{fence}{language}\n{content}{fence}\n"
