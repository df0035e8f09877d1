"""Log-probs of every response of a data set, and implicit rewards against a reference.

    for row in score("runs/first", "pairs.jsonl"):
        print(row["id"], row["response"], row["logp_sum"], row["reward"])

r(x, y) = β · (log π(y|x) − log π_ref(y|x)) is the reward that a DPO-trained model stands for, up to a constant per prompt
(Rafailov et al., 2023, arXiv 2305.18290, equation 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preftune.config import Config
from preftune.data.read import read_examples
from preftune.data.template import build_trees
from preftune.data.types import Tree
from preftune.engine.policy import Policy
from preftune.engine.score import Logps, logps_of_all
from preftune.errors import ConfigError
from preftune.losses.objective import goal_of
from preftune.model.device import Precision, pick_device, precision_of
from preftune.model.load import check_vocabulary, load_model, open_renderer, quiet_transformers, resolve
from preftune.run import Run

Row = dict[str, Any]


def score(
    model: str | Path,
    data: Any,
    *,
    reference: str | Path | None = None,
    beta: float | None = None,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    template: str | None = None,
    quarantine: str | Path | None = None,
    max_length: int | None = None,
    tokens_per_microbatch: int = 8192,
    precision: str = "auto",
    device: str = "auto",
    on_note: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Row]:
    """One row per response, in the order of the data: `id`, `response` (its index), `logp_sum` (nats), `n_tokens` (scored).

    With a reference also `ref_logp_sum` and `reward` = beta · (logp_sum − ref_logp_sum). For a run folder the reference and β
    are those of the run unless they are given; else β is 0.1. An example that is dropped gets no row and is said
    through `on_note`. Raises PreftuneError subclasses for what is wrong with the model, the data or the settings.
    """
    note = on_note or (lambda text: None)
    quiet_transformers()
    is_run = Run(model).config_file.exists()
    if is_run:
        reference, beta, max_length = of_run(Run(model).config(), reference, beta, max_length)
    if beta is not None and reference is None:
        raise ConfigError("beta: scales the reward against a reference, and there is none; give a reference")
    beta = _positive(0.1 if beta is None else beta)
    renderer = open_renderer(model, template=template, max_length=max_length, usual=1024 if is_run else None)
    source = read_examples(data, format=format, fields=fields, quarantine=Path(quarantine) if quarantine else None)
    trees = build_trees(source.examples, renderer)
    for line in (*source.notes, *renderer.report.lines()):
        note(line)
    total, where = len(trees) * (1 if reference is None else 2), pick_device(device)
    kind = precision_of(precision, where)

    def logps(which: str | Path, done: int) -> list[Logps]:
        policy = scorer(resolve(which), renderer.tokenizer, trees, kind, where, note)
        count = None if on_progress is None else lambda n: on_progress(done + n, total)
        return logps_of_all(policy, trees, tokens_per_microbatch, on_progress=count)

    yield from _rows(trees, logps(model, 0), None if reference is None else logps(reference, len(trees)), beta)


def _rows(trees: list[Tree], policy: list[Logps], frozen: list[Logps] | None, beta: float) -> Iterator[Row]:
    for i, tree in enumerate(trees):
        for k in range(len(tree.branches)):
            row: Row = {"id": tree.id, "response": k, "logp_sum": _sum(policy[i][k]), "n_tokens": len(policy[i][k])}
            if frozen is not None:
                row["ref_logp_sum"] = _sum(frozen[i][k])
                row["reward"] = beta * (row["logp_sum"] - row["ref_logp_sum"])
            yield row


def _positive(beta: float) -> float:
    if beta <= 0:
        raise ConfigError(f"beta: {beta} given, expected a number above 0")
    return beta


def of_run(
    config: Config, reference: str | Path | None, beta: float | None, max_length: int | None
) -> tuple[str | Path | None, float | None, int | None]:
    """Reference, β and limit: what was not given, as the run had it."""
    length = max_length or config.batch.max_length
    if not any(o.needs_reference for o in goal_of(config)):  # without a reference a result has no implicit reward
        return reference, beta, length
    return reference or config.reference or config.model, config.loss_parameters.get("beta") if beta is None else beta, length


def scorer(
    folder: Path, tokenizer: Any, trees: Sequence[Tree], precision: Precision, device: torch.device, note: Callable[[str], None]
) -> Policy:
    """The model of a folder, scored by the path that was measured exact on `trees`. Raises ModelError."""
    model = load_model(folder, dtype=precision.weights).to(device)
    check_vocabulary(model, tokenizer, folder)
    policy = Policy.choose(model, trees, autocast=precision.autocast)
    note(f"{folder}: {policy.path.why}")
    return policy


def _sum(logps: np.ndarray) -> float:
    return float(logps.astype(np.float64).sum())
