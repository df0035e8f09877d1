"""Scores by a reward model: any sequence-classification model with one output, ours or somebody else's.

>>> scored = score_by_reward(examples, "runs/reward/model")
>>> scored[0].score
1.84

Prompt and response are rendered by the model's own chat template, exactly as in training; a model without one (an encoder such
as DeBERTa) reads the prompt's text and the response's as a pair of texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preftune.data.template import Renderer
from preftune.data.types import Example
from preftune.engine.score import by_length
from preftune.errors import ModelError
from preftune.label.scored import Scored
from preftune.label.template import instruction, transcript
from preftune.model.device import pick_device
from preftune.model.load import context_length, load_tokenizer, quiet_transformers, resolve, stop_ids
from preftune.model.reward import load_reward_model


def score_by_reward(
    examples: Sequence[Example],
    model: str,
    *,
    template: str | None = None,
    device: str = "auto",
    tokens_per_batch: int = 8192,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scored]:
    """The model's output for every response, in the order of the examples; None where a text is longer than its context.

    Raises ModelError for a model with other than one output, or whose outputs are not finite.
    """
    quiet_transformers()
    folder = resolve(model)
    network = load_reward_model(folder).to(pick_device(device)).eval()
    tokenizer = load_tokenizer(folder)
    limit = context_length(folder)
    annotator = f"reward:{folder.name}"
    places = [(e, k) for e in examples for k in range(len(e.responses))]
    ids = _rendered(examples, tokenizer, folder, template, limit)
    fits = [n for n, row in enumerate(ids) if limit is None or len(row) <= limit]
    scores: dict[int, float] = {}
    for group, values in _forward(network, ids, fits, tokens_per_batch):
        scores.update(zip(group, values, strict=True))
        on_progress(len(scores), len(fits))
    if bad := [n for n, value in scores.items() if not math.isfinite(value)]:
        raise ModelError(f"{folder}: the score of example {places[bad[0]][0].id!r} is not finite: the weights are damaged")
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return [
        Scored(
            e.id,
            k,
            scores.get(n),
            annotator,
            0.0,
            at,
            "" if n in scores else f"{len(ids[n])} tokens, the model's context is {limit}",
        )
        for n, (e, k) in enumerate(places)
    ]


def _rendered(
    examples: Sequence[Example], tokenizer: Any, folder: Path, template: str | None, limit: int | None
) -> list[list[int]]:
    """Token ids of each response with its prompt, not truncated."""
    if template is None and tokenizer.chat_template is None and any(not isinstance(e.prompt, str) for e in examples):
        return [
            tokenizer(instruction(e.prompt), transcript(r), truncation=False)["input_ids"]
            for e in examples
            for r in e.responses
        ]
    longest = 10**9  # whoever is too long is said to be, not cut
    renderer = Renderer(tokenizer, template=template, max_length=longest, stop_ids=stop_ids(folder))
    rows = []
    for e, tree in zip(examples, renderer.trees(examples), strict=True):
        if tree is None:
            raise ModelError(f"{folder}: its template refuses example {e.id!r}: {renderer.report.dropped[-1][1]}")
        rows += [np.concatenate([tree.prompt, branch.ids]).tolist() for branch in tree.branches]
    return rows


@torch.inference_mode()
def _forward(
    network: Any, ids: Sequence[Sequence[int]], rows: Sequence[int], budget: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Scores in batches of about equal length; one by one without a padding token, by which a decoder finds a row's end."""
    pad = network.config.pad_token_id
    where = next(network.parameters()).device
    lengths = [len(row) for row in ids]
    for group in by_length(rows, lengths, budget):
        parts = [group] if pad is not None else [[n] for n in group]
        for part in parts:
            width = max(lengths[n] for n in part)
            tokens = torch.full((len(part), width), pad or 0, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for at, n in enumerate(part):
                tokens[at, : lengths[n]] = torch.tensor(ids[n], dtype=torch.long)
                mask[at, : lengths[n]] = 1
            out = network(input_ids=tokens.to(where), attention_mask=mask.to(where)).logits
            yield part, out[:, 0].float().cpu().tolist()
