"""Scores by a reward model: any sequence-classification model with one output, ours or somebody else's.

>>> scored = score_by_reward(examples, "runs/reward/model")
>>> scored[0].score
1.84

Prompt and response are rendered by the model's own chat template, exactly as in training. A model without one that is asked
about messages (an encoder such as DeBERTa) reads the prompt's text and the response's as a pair of texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preftune.data.template import Renderer
from preftune.data.types import Example, Tree
from preftune.engine.policy import Path as Way
from preftune.engine.reward import RewardModel
from preftune.engine.score import by_length, logps_of_all
from preftune.errors import ModelError
from preftune.label.implicit import FILE, ImplicitReward, read_implicit
from preftune.label.scored import Scored
from preftune.label.template import instruction, transcript
from preftune.model.device import pick_device, precision_of
from preftune.model.load import context_length, load_tokenizer, quiet_transformers, resolve, stop_ids
from preftune.model.reward import load_reward_model
from preftune.scoring import scorer

Place = tuple[int, int]
"""Which example, which of its responses."""


class RewardScorer:
    """A reward that is open: it scores as often as it is asked."""

    def __init__(self, model: str, *, template: str | None = None, device: str = "auto", tokens_per_batch: int = 8192) -> None:
        """Loads a sequence classifier; of an implicit reward the two models are loaded each time that it is asked.

        model: a sequence classifier, or a folder with an implicit reward (`preftune score --reward`).

        Raises ModelError for a model with other than one output.
        """
        quiet_transformers()
        self._template, self._device, self._budget = template, device, tokens_per_batch
        self._path: Way | None = None  # of a classifier, as it was measured on what was asked first
        self._implicit = reward = read_implicit(model)
        if reward is not None:
            self.folder = Path(model.removesuffix(f"/{FILE}"))
            lengths = (context_length(resolve(f)) for f in (reward.policy, reward.reference))
            self.limit = min((n for n in lengths if n), default=None)
        else:
            self.folder = resolve(model)
            self._network = load_reward_model(self.folder).to(pick_device(device)).eval()
            self._tokenizer, self.limit = load_tokenizer(self.folder), context_length(self.folder)

    def __call__(
        self, examples: Sequence[Example], *, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Scored]:
        """The score of every response, in the order of the examples; None where a text is longer than the model's context.

        Raises ModelError for scores that are not finite.
        """
        return _collected(examples, self._found(examples), self.folder, self.limit, on_progress)

    def _found(self, examples: Sequence[Example]) -> Iterator[tuple[Place, float]]:
        if self._implicit is not None:
            return _implicit(self._implicit, examples, self.limit, self._template, self._device, self._budget)
        without = self._template is None and self._tokenizer.chat_template is None
        if without and any(not isinstance(e.prompt, str) for e in examples):
            return _by_texts(self._network, self._tokenizer, examples, self.limit)
        return self._by_trees(_trees(self.folder, examples, self._template))

    def _by_trees(self, trees: Sequence[Tree]) -> Iterator[tuple[Place, float]]:
        """Scores of the packed forest, longest trees first; branches beyond the context are left out."""
        kept = _fitting(trees, self.limit)
        if not kept:
            return
        if self._path is None:
            self._path = RewardModel.choose(self._network, [tree for _, _, tree in kept]).path
        model = RewardModel(self._network, self._path)
        model.eval()
        for group in by_length(range(len(kept)), [tree.n_tokens for _, _, tree in kept], self._budget):
            with torch.inference_mode():
                values = iter(model(model.pack([kept[at][2] for at in group])).float().cpu().tolist())
            for at in group:
                n, fits, _ = kept[at]
                yield from (((n, k), next(values)) for k in fits)


def score_by_reward(
    examples: Sequence[Example],
    model: str,
    *,
    template: str | None = None,
    device: str = "auto",
    tokens_per_batch: int = 8192,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scored]:
    """What a `RewardScorer` of this model says of the examples."""
    opened = RewardScorer(model, template=template, device=device, tokens_per_batch=tokens_per_batch)
    return opened(examples, on_progress=on_progress)


def _collected(
    examples: Sequence[Example],
    found: Iterator[tuple[Place, float]],
    folder: Path,
    limit: int | None,
    on_progress: Callable[[int, int], None],
) -> list[Scored]:
    """A score for every response, None for those that none was found for: they are longer than `limit` tokens."""
    total = sum(len(e.responses) for e in examples)
    scores: dict[Place, float] = {}
    for place, score in found:
        if not math.isfinite(score):
            raise ModelError(f"{folder}: the score of example {examples[place[0]].id!r} is {score}: the weights are damaged")
        scores[place] = score
        on_progress(len(scores), total)
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    result = []
    for place in ((n, k) for n, e in enumerate(examples) for k in range(len(e.responses))):
        why = "" if place in scores else f"longer than the model's context of {limit} tokens"
        result.append(Scored(examples[place[0]].id, place[1], scores.get(place), f"reward:{folder.name}", 0.0, at, why))
    return result


def _implicit(
    reward: ImplicitReward, examples: Sequence[Example], limit: int | None, template: str | None, device: str, budget: int
) -> Iterator[tuple[Place, float]]:
    """β · log π/π_ref of whole responses, those beyond the limit left out."""
    policy, reference = resolve(reward.policy), resolve(reward.reference)
    kept = _fitting(_trees(policy, examples, template), limit)
    if not kept:
        return
    trees, where = [tree for _, _, tree in kept], pick_device(device)
    precision = precision_of("auto", where)
    tokenizer = load_tokenizer(policy)
    sums = []
    for folder in (policy, reference):
        model = scorer(folder, tokenizer, trees, precision, where, lambda text: None)
        sums.append([[float(x.astype(np.float64).sum()) for x in logps] for logps in logps_of_all(model, trees, budget)])
    for (n, fits, _), ours, theirs in zip(kept, *sums, strict=True):
        yield from (((n, k), reward.beta * (a - b)) for k, a, b in zip(fits, ours, theirs, strict=True))


def _trees(folder: Path, examples: Sequence[Example], template: str | None) -> list[Tree]:
    """Whole examples, as this model reads them: whoever is too long is said to be, not cut."""
    renderer = Renderer(load_tokenizer(folder), template=template, max_length=10**9, stop_ids=stop_ids(folder))
    trees = []
    for example, tree in zip(examples, renderer.trees(examples), strict=True):
        if tree is None:
            raise ModelError(f"{folder}: its template refuses example {example.id!r}: {renderer.report.dropped[-1][1]}")
        trees.append(tree)
    return trees


def _fitting(trees: Sequence[Tree], limit: int | None) -> list[tuple[int, list[int], Tree]]:
    """Which tree, which of its branches fit the context, and the tree with these alone."""
    kept = []
    for n, tree in enumerate(trees):
        fits = [k for k, b in enumerate(tree.branches) if limit is None or len(tree.prompt) + len(b.ids) <= limit]
        if fits:
            branches = tuple(tree.branches[k] for k in fits)
            kept.append((n, fits, replace(tree, branches=branches, pairs=(), labels=(), scores=())))
    return kept


def _by_texts(network: Any, tokenizer: Any, examples: Sequence[Example], limit: int | None) -> Iterator[tuple[Place, float]]:
    """Scores of pairs of texts, one by one: their tokenizer alone knows how two texts are joined."""
    where = next(network.parameters()).device
    for n, example in enumerate(examples):
        for k, response in enumerate(example.responses):
            given = tokenizer(instruction(example.prompt), transcript(response), truncation=False, return_tensors="pt")
            if limit is None or given["input_ids"].shape[1] <= limit:
                with torch.inference_mode():
                    score = float(network(**given.to(where)).logits[0, 0])
                yield (n, k), score
