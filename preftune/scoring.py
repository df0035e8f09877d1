"""Log-probs of every response of a data set, and implicit rewards against a reference.

    for row in score("runs/first", "pairs.jsonl"):
        print(row["id"], row["response"], row["logp_sum"], row["reward"])

r(x, y) = β · (log π(y|x) − log π_ref(y|x)) is the reward that a DPO-trained model stands for, up to a constant per prompt
(Rafailov et al., 2023, arXiv 2305.18290, equation 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from preftune.config import Config
from preftune.data.read import read_examples
from preftune.data.template import build_trees
from preftune.data.types import Tree
from preftune.engine.policy import Policy
from preftune.engine.score import score_all
from preftune.errors import ConfigError
from preftune.model.device import pick_device, precision_of
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
        reference, beta, max_length = _of_run(Run(model).config(), reference, beta, max_length)
    beta = _positive(0.1 if beta is None else beta)
    renderer = open_renderer(model, template=template, max_length=max_length, usual=1024 if is_run else None)
    source = read_examples(data, format=format, fields=fields, quarantine=Path(quarantine) if quarantine else None)
    trees = build_trees(source.examples, renderer)
    for line in (*source.notes, *renderer.report.lines()):
        note(line)
    n_passes = 1 if reference is None else 2
    done = 0

    def measured(which: Path) -> list[list[np.ndarray]]:
        nonlocal done
        scorer = _scorer(which, renderer.tokenizer, trees, precision, device, note)
        found: list[list[np.ndarray]] = [[] for _ in trees]
        for group, scored in score_all(scorer, trees, budget=tokens_per_microbatch):
            for i, logps in zip(group, scored, strict=True):
                found[i] = logps
            done += len(group)
            if on_progress:
                on_progress(done, n_passes * len(trees))
        return found

    policy = measured(resolve(model))
    frozen = None if reference is None else measured(resolve(reference))
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


def _of_run(
    config: Config, reference: str | Path | None, beta: float | None, max_length: int | None
) -> tuple[str | Path | None, float | None, int | None]:
    """What was not given, as the run had it."""
    beta = config.loss_parameters.get("beta") if beta is None else beta
    return reference or config.reference or config.model, beta, max_length or config.batch.max_length


def _scorer(
    folder: Path, tokenizer: Any, trees: list[Tree], precision: str, device: str, note: Callable[[str], None]
) -> Policy:
    where = pick_device(device)
    kind = precision_of(precision, where)
    model = load_model(folder, dtype=kind.weights).to(where)
    check_vocabulary(model, tokenizer, folder)
    policy = Policy.choose(model, trees, autocast=kind.autocast)
    note(f"{folder}: {policy.path.why}")
    return policy


def _sum(logps: np.ndarray) -> float:
    return float(logps.astype(np.float64).sum())
