"""The one page that lists everything that a setting can name: objectives, their modifiers, and data formats.

An entry is a name and the place of a function, imported when somebody asks for it, so that this page costs nothing to read
and `preftune --help` never imports torch:

    >>> sorted(LOSSES)[:3]
    ['aot', 'aot_unpaired', 'apo_down']
    >>> LOSSES["dpo"]            # imports preftune.losses.dpo
    <function dpo ...>

A new objective is one function and one line here; so is a new data format.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, nearest


class Registry(Mapping[str, Callable[..., Any]]):
    """Names mapped to functions that are imported on first use."""

    def __init__(
        self, kind: str, entries: Mapping[str, str], *, own: str | None = None, elsewhere: Mapping[str, str] | None = None
    ) -> None:
        """`entries` maps a name to "module:function"; `kind` is how errors call such a thing.

        own: "module:function" of what loads a user's own from "FILE.py:FUNCTION"; None where there can be none.
        elsewhere: names that papers and other libraries use, each with what to write here; errors tell of them.
        """
        self.kind = kind
        self._entries = dict(entries)
        self._own = own
        self.elsewhere = dict(elsewhere or {})

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """The function called `name`; raises ConfigError with the nearest known name."""
        name = self.whole_name(name)
        if name in self._entries:
            return _imported(self._entries[name])
        assert self._own is not None
        found: Callable[..., Any] = _imported(self._own)(name)
        return found

    def whole_name(self, name: object) -> str:
        """`name` as it is known from any folder: of a user's own the whole path. Raises ConfigError for an unknown name."""
        if isinstance(name, str) and self._own and ".py:" in name:
            file, _, function = name.rpartition(":")
            return f"{Path(file).expanduser().resolve()}:{function}"
        if not isinstance(name, str) or name not in self._entries:
            own = f", or your own as FILE.py:FUNCTION; got {name!r}" if self._own else ""
            if not isinstance(name, str):
                raise ConfigError(f"expected the name of a {self.kind}{own}")
            raise ConfigError(f"{self.kind} {name!r} does not exist; {self._meant(name)}")
        return name

    def _meant(self, name: str) -> str:
        plain = name.strip().lower().replace("-", "_").replace(" ", "_")
        return f"here it is {self.elsewhere[plain]}" if plain in self.elsewhere else nearest(plain, self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:  # Mapping's would import the entry
        return name in self._entries


def _imported(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


LOSSES = Registry(
    "loss",
    {
        "aot": "preftune.losses.transport:aot",
        "aot_unpaired": "preftune.losses.transport:aot_unpaired",
        "apo_down": "preftune.losses.sides:apo_down",
        "apo_zero": "preftune.losses.sides:apo_zero",
        "apo_zero_unpaired": "preftune.losses.unpaired:apo_zero_unpaired",
        "bco": "preftune.losses.unpaired:bco",
        "bco_pair": "preftune.losses.sides:bco_pair",
        "beta_dpo": "preftune.losses.dpo:beta_dpo",
        "bradley_terry": "preftune.losses.reward:bradley_terry",
        "cpo": "preftune.losses.reference_free:cpo",
        "discopop": "preftune.losses.margins:discopop",
        "dpo": "preftune.losses.dpo:dpo",
        "dpo_norm": "preftune.losses.dpo:dpo_norm",
        "dpo_soft": "preftune.losses.dpo:dpo_soft",
        "dpop": "preftune.losses.dpo:dpop",
        "exo": "preftune.losses.margins:exo",
        "grpo": "preftune.losses.rollout:grpo",
        "hinge": "preftune.losses.margins:hinge",
        "ipo": "preftune.losses.margins:ipo",
        "kto": "preftune.losses.unpaired:kto",
        "nca": "preftune.losses.sides:nca",
        "odpo": "preftune.losses.dpo:odpo",
        "orpo": "preftune.losses.reference_free:orpo",
        "plackett_luce": "preftune.losses.ranked:plackett_luce",
        "ppo": "preftune.losses.rollout:ppo",
        "preferred_ft": "preftune.losses.reference_free:preferred_ft",
        "rloo": "preftune.losses.rollout:rloo",
        "robust": "preftune.losses.dpo:robust",
        "sft": "preftune.losses.sft:sft",
        "simpo": "preftune.losses.reference_free:simpo",
        "sppo": "preftune.losses.sides:sppo",
        "tdpo1": "preftune.losses.token_level:tdpo1",
        "tdpo2": "preftune.losses.token_level:tdpo2",
    },
    own="preftune.losses.own:load",
    elsewhere={
        "aot_pair": "aot",
        "b_dpo": "beta_dpo",
        "bce": "bco or bco_pair",
        "bt": "bradley_terry",
        "cdpo": "dpo with loss.label_smoothing=0.1",
        "chosen_nll": "preferred_ft",
        "conservative_dpo": "dpo with loss.label_smoothing=0.1",
        "dpo_positive": "dpop",
        "dr_grpo": "loss.name=grpo loss.lengths=sum rollout.scale=false",
        "ema": "a setting of its own: average.kind=ema",
        "exo_pair": "exo",
        "f_dpo": "dpo with loss.divergence=forward_kl, js or an α",
        "k_wise_dpo": "plackett_luce",
        "kto_pair": "kto, which reads pairs too",
        "ld_dpo": "dpo with loss.ld_alpha=0.5",
        "length_normalized_dpo": "dpo_norm",
        "listwise_dpo": "plackett_luce",
        "margin_dpo": "odpo (score margins) or dpo_soft (confidences)",
        "mpo": "a list: [dpo, bco_pair, {name: preferred_ft, weight: 1}]",
        "nca_pair": "nca",
        "nll": "preferred_ft (of pairs) or sft",
        "pl": "plackett_luce",
        "r_dpo": "dpo with loss.length_margin=0.01",
        "rdpo": "dpo with loss.length_margin=0.01, or robust",
        "reinforce": "loss.name=rloo loss.clip=0",
        "reward": "bradley_terry",
        "reward_model": "bradley_terry",
        "rm": "bradley_terry",
        "rlhf": "ppo",
        "robust_dpo": "robust",
        "rpo": "a list: [dpo, {name: preferred_ft, weight: 1}]",
        "rso": "hinge",
        "sigmoid": "dpo",
        "sigmoid_norm": "dpo_norm",
        "slic": "hinge",
        "slic_hf": "hinge",
        "soft_dpo": "dpo_soft",
        "sppo_hard": "sppo",
        "tdpo": "tdpo1 or tdpo2 (the better of the two in its paper)",
        "tr_dpo": "dpo with sync.every=512 and sync.mix=0.6",
        "wpo": "dpo with loss.wpo=true",
    },
)
"""Objectives: a pure function from named log-probs to one value per unit. The records it takes say what is computed."""

MODIFIERS = Registry(
    "modifier",
    {
        "ld": "preftune.losses.modifiers:ld",
        "f_divergence": "preftune.losses.modifiers:f_divergence",
        "length_margin": "preftune.losses.modifiers:length_margin",
        "wpo": "preftune.losses.modifiers:wpo",
    },
)
"""What composes with every objective of the same record: another record, or weights. In the order in which they apply."""

FORMATS = Registry(
    "data format",
    {  # order matters: a row is read as the first format whose columns it has
        "alpaca_eval": "preftune.data.formats:alpaca_eval",
        "two_outputs": "preftune.data.formats:two_outputs",
        "sharegpt": "preftune.data.formats:sharegpt",
        "prompt_chosen_rejected": "preftune.data.formats:prompt_chosen_rejected",
        "hh": "preftune.data.formats:hh",
        "chosen_rejected": "preftune.data.formats:chosen_rejected",
        "prompt_completion_label": "preftune.data.formats:prompt_completion_label",
        "prompt_responses": "preftune.data.formats:prompt_responses",
        "ultrafeedback": "preftune.data.formats:ultrafeedback",
        "preference_strength": "preftune.data.formats:preference_strength",
        "helpsteer": "preftune.data.formats:helpsteer",
        "prompt_completion": "preftune.data.formats:prompt_completion",
        "messages": "preftune.data.formats:messages",
        "conversations": "preftune.data.formats:conversations",
    },
)
"""Data formats: a function from one row of a file to one Example."""

CHECKS = Registry(
    "check",
    {  # in the order in which they are told
        "bad_rows": "preftune.diagnose.content:bad_rows",
        "size": "preftune.diagnose.content:size",
        "concentration": "preftune.diagnose.repeats:concentration",
        "duplicates": "preftune.diagnose.repeats:duplicates",
        "near_copies": "preftune.diagnose.repeats:near_copies",
        "contradictions": "preftune.diagnose.repeats:contradictions",
        "same_sides": "preftune.diagnose.repeats:same_sides",
        "stock_responses": "preftune.diagnose.repeats:stock_responses",
        "leakage": "preftune.diagnose.leakage:leakage",
        "length": "preftune.diagnose.shortcuts:length",
        "first_word": "preftune.diagnose.shortcuts:first_word",
        "formatting": "preftune.diagnose.shortcuts:formatting",
        "refusals": "preftune.diagnose.shortcuts:refusals",
        "flattery": "preftune.diagnose.shortcuts:flattery",
        "language": "preftune.diagnose.shortcuts:language",
        "surface": "preftune.diagnose.shortcuts:surface",
        "label_noise": "preftune.diagnose.noise:label_noise",
        "unsure_labels": "preftune.diagnose.noise:unsure_labels",
        "audit": "preftune.diagnose.audit:audit",
        "margins": "preftune.diagnose.noise:margins",
        "both_refuse": "preftune.diagnose.content:both_refuse",
        "empty_responses": "preftune.diagnose.content:empty_responses",
        "very_long": "preftune.diagnose.content:very_long",
        "damaged_text": "preftune.diagnose.content:damaged_text",
        "html": "preftune.diagnose.content:html",
        "turn_markers": "preftune.diagnose.content:turn_markers",
        "secrets": "preftune.diagnose.content:secrets",
        "personal_data": "preftune.diagnose.content:personal_data",
        "truncation": "preftune.diagnose.tokens:truncation",
        "template": "preftune.diagnose.tokens:template",
        "distance": "preftune.diagnose.tokens:distance",
    },
)
"""Checks of data: a function from a Corpus to one Finding."""

SYMPTOMS = Registry(
    "finding",
    {  # in the order in which they are told
        "stopped": "preftune.diagnose.origin:stopped",
        "reference_mismatch": "preftune.diagnose.origin:reference_mismatch",
        "no_effect": "preftune.diagnose.effect:no_effect",
        "lost_updates": "preftune.diagnose.effect:lost_updates",
        "no_wins": "preftune.diagnose.outcome:no_wins",
        "preferences": "preftune.diagnose.fit:preferences",
        "trivial_pairs": "preftune.diagnose.fit:trivial_pairs",
        "overfitting": "preftune.diagnose.fit:overfitting",
        "drifted": "preftune.diagnose.outcome:drifted",
        "displacement": "preftune.diagnose.fit:displacement",
        "length_bias": "preftune.diagnose.outcome:length_bias",
        "forgetting": "preftune.diagnose.outcome:forgetting",
        "conservative": "preftune.diagnose.outcome:conservative",
        "off_policy": "preftune.diagnose.origin:off_policy",
        "truncated": "preftune.diagnose.origin:truncated",
        "judge": "preftune.diagnose.judging:judge",
        "spikes": "preftune.diagnose.course:spikes",
        "clipped": "preftune.diagnose.effect:clipped",
    },
)
"""Findings about a run: a function from a Case to one Finding."""
