"""Prompts that a policy is to answer while it trains: read from any data, split, and as token ids.

    data = read_asked(config, renderer)
    data.asked[0].example.prompt, data.asked[0].ids

Responses that the data hold are not read: the policy writes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.config import Config
from preftune.data.split import leaked_prompts, split_by_prompt
from preftune.data.template import Renderer
from preftune.data.types import Branch, Example, Tree
from preftune.errors import DataError, listing
from preftune.losses.objective import Objective
from preftune.sampling.prompts import read_prompts
from preftune.training.material import Material
from preftune.training.prepare import Data, Said, Split, check_evaluation


class Asked(NamedTuple):
    """A prompt, as text and as the model reads it."""

    example: Example  # without responses
    ids: NDArray[np.int32]


@dataclass
class AskedData(Data):
    """Prompts of a run: `train` and `held_out` hold them as trees without branches."""

    asked: list[Asked] = field(default_factory=list)
    asked_held_out: list[Asked] = field(default_factory=list)
    max_tokens: int = 1

    @property
    def trees(self) -> list[Tree]:
        """The shortest and the longest prompt with a made-up reply as long as one may be: to measure a model's paths on."""
        order = sorted([*self.asked, *self.asked_held_out], key=lambda a: len(a.ids))
        return [
            Tree(a.example.id, a.ids, (Branch(np.resize(a.ids, n), np.ones(n, np.bool_)),))
            for a, n in ((order[0], 2), (order[-1], self.max_tokens))
        ]


def split_asked(config: Config) -> Split:
    """The prompts of `data`, as examples without responses, some of them held out. Raises DataError."""
    assert config.data is not None
    notes: list[Said] = []
    examples = _read(config, config.data, "", notes)
    notes.append(Said("data", "of the data the prompts are taken; responses there are not read, the policy writes its own"))
    held_out: Sequence[Example] = []
    if config.eval.data is not None:
        held_out = _read(config, config.eval.data, "eval-", notes)
        if leaked := leaked_prompts(examples, held_out):
            notes.append(Said("warning", f"{len(leaked)} of {len(held_out)} evaluation prompts stand in the training data too"))
    elif config.eval.fraction and config.eval.every != 0:
        examples, held_out = split_by_prompt(examples, config.eval.fraction, config.seed)
    return Split(examples, held_out, {}, notes)


def read_asked(config: Config, renderer: Renderer, goal: Sequence[Objective]) -> AskedData:
    """The prompts of `data` as tokens. Raises DataError where none can be answered."""
    examples, held_out, _, notes = split_asked(config)
    dropped: list[tuple[str, str]] = []
    asked, asked_held_out = (_as_ids(config, renderer, part, dropped) for part in (examples, held_out))
    if dropped:
        notes.append(Said("warning", f"{len(dropped)} prompts are not asked: {dropped[0][1]}"))
    if not asked:
        raise DataError(f"data: no prompt can be answered:\n{listing([f'{name}: {why}' for name, why in dropped])}")
    if any(not isinstance(a.example.prompt, str) for a in asked):
        notes += [Said("tokens", line) for line in renderer.describe()]
    data = AskedData(
        train=_material(asked),
        held_out=_material(asked_held_out) if asked_held_out else None,
        samples=[(a.example, a.ids) for a in (asked_held_out or asked)[: config.samples.n]],
        notes=notes,
        asked=asked,
        asked_held_out=asked_held_out,
        max_tokens=config.rollout.max_tokens,
    )
    check_evaluation(config, goal, data)
    data.counts = {
        "prompts": len(examples) + len(held_out),  # different ones: used + dropped
        "used": len(asked) + len(asked_held_out),
        "dropped": len(dropped),
        "train_examples": len(asked),
        "eval_examples": len(asked_held_out),
        "longest_prompt_tokens": max(len(a.ids) for a in asked),
        "dropped_rows": [list(d) for d in dropped],
        "digest": data.digest(),
    }
    return data


def _read(config: Config, source: str | list[str], prefix: str, notes: list[Said]) -> list[Example]:
    """Each prompt of all sources once."""
    aside = Path(config.quarantine) if config.quarantine else None
    if aside and prefix:
        aside = aside.with_name(f"{prefix}{aside.name}")
    found: dict[str, Example] = {}
    n_asked = 0
    for one in [source] if isinstance(source, str) else source:
        read = read_prompts(one, fields=config.fields, format=config.format, quarantine=aside)
        notes += [Said("data", note) for note in read.notes]
        n_asked += len(read.prompts)
        for asked in read.prompts:
            example = Example(asked.id, asked.prompt, (), one, reference=asked.reference)
            found.setdefault(example.prompt_key, example)
    if len(found) < n_asked:
        notes.append(Said("data", f"{n_asked - len(found)} prompts stand in several sources; each prompt is asked once"))
    return list(found.values())


def _as_ids(config: Config, renderer: Renderer, examples: Sequence[Example], dropped: list[tuple[str, str]]) -> list[Asked]:
    """Those that leave room for the longest reply; the others are told in `dropped`."""
    room = renderer.max_length - config.rollout.max_tokens
    asked = []
    for example in examples:
        try:
            ids = renderer.prompt_ids(example.prompt)
        except DataError as reason:
            dropped.append((example.id, str(reason)))
            continue
        if 0 < len(ids) <= room:
            asked.append(Asked(example, ids))
        else:
            why = f"{len(ids)} tokens and a reply of rollout.max_tokens={config.rollout.max_tokens} are more than "
            why += f"{renderer.max_length} (batch.max_length, or the model's context)" if len(ids) else "an empty prompt"
            dropped.append((example.id, why if len(ids) else "the prompt has no token"))
    return asked


def _material(asked: Sequence[Asked]) -> Material:
    trees = [Tree(a.example.id, a.ids, ()) for a in asked]
    return Material(trees, np.zeros((len(trees), 1), np.int64), [], [])
