"""The two models of an evaluation: the policy, and what it is held against; how texts become their tokens; who computes.

models = Models.open("runs/dpo")        # a run brings its reference, β, template and limit
models.policy(trees)                    # loaded when it is first asked for
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from preftune.config import Config
from preftune.data.store import Store
from preftune.data.template import Renderer
from preftune.data.types import Tree
from preftune.engine.policy import Policy
from preftune.engine.reference import WAITING, Share
from preftune.engine.reward import RewardModel
from preftune.errors import ConfigError, ModelError
from preftune.files import default_cache
from preftune.label.implicit import check_same_tokens
from preftune.losses.objective import Objective, goal_of, objective
from preftune.model.device import Precision, pick_device, precision_of
from preftune.model.identity import identity
from preftune.model.load import is_reward_model, load_model, open_renderer, quiet_transformers, resolve
from preftune.model.reward import load_reward_model
from preftune.run import Run
from preftune.scoring import scorer
from preftune.training.dist import Ranks, join

_BETA = 0.1

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


@dataclass
class Models:
    """A policy, its reference (None: there is none), and how they are scored.

    name, against:  as the user names them.
    config:         of the policy's run; None for a model that is none.
    beta:           of implicit rewards.
    goal:           the run's objectives; () of a model that is no run, and of one that learnt from its own replies: an
                    objective on those says nothing of the data's responses, whose rewards are implicit ones.
    scores_only:    the policy is a reward model.
    budget:         tokens in one forward pass.
    """

    name: str
    against: str | None
    config: Config | None
    beta: float
    goal: tuple[Objective, ...]
    scores_only: bool
    renderer: Renderer
    device: torch.device
    precision: Precision
    ranks: Ranks
    cache: Path
    budget: int
    note: Callable[[str], None]
    _loaded: dict[str, Policy] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: str,
        *,
        against: str | None = None,
        beta: float | None = None,
        template: str | None = None,
        precision: str = "auto",
        device: str = "auto",
        budget: int = 8192,
        note: Callable[[str], None] = lambda text: None,
    ) -> Models:
        """A run folder, model folder or hub id. Raises ConfigError and ModelError for what does not go together."""
        quiet_transformers()
        run, where = Run(model), pick_device(device)
        config = run.config() if run.config_file.exists() else None
        scores_only = is_reward_model(resolve(model))
        own_replies = config is not None and config.needs_rollouts
        goal = goal_of(config) if config else (objective("bradley_terry", {}),) if scores_only else ()
        goal = () if own_replies else goal
        if scores_only and (against is not None or beta is not None):
            raise ConfigError(
                f"--against, --beta: {model} is a reward model, which has scores and no log-probs; leave them out"
            )
        refers = own_replies or any(o.needs_reference for o in goal)
        if against is None and config is not None and refers:
            against = config.reference or config.model
        if beta is not None and beta <= 0:
            raise ConfigError(f"--beta: {beta} given, expected a number above 0")
        own = (config.rollout.beta or config.loss_parameters.get("beta")) if config is not None and refers else None
        renderer = open_renderer(
            model,
            template=template or (config.template if config else None),
            max_length=config.batch.max_length if config else None,
            usual=1024 if config else None,
        )
        if against is not None:
            _check_reference(model, against)
        ranks = join(where)
        return cls(
            name=model,
            against=against,
            config=config,
            beta=beta or own or _BETA,
            goal=goal,
            scores_only=scores_only,
            renderer=renderer,
            device=where,
            precision=precision_of(precision, where),
            ranks=ranks,
            cache=Path(config.cache).expanduser() if config and config.cache else default_cache(),
            budget=budget,
            note=note if ranks.main else lambda text: None,
        )

    def identity(self) -> str:
        """Names what is evaluated: both models and the precision."""

        def names() -> str:
            return "/".join(self._identity(name) for name in (self.name, self.against) if name is not None)

        return hashlib.blake2b(self.ranks.first(names).encode(), digest_size=16).hexdigest()

    def _identity(self, name: str) -> str:
        return identity(resolve(name), str(self.precision), cache=self.cache)

    def policy(self, trees: Sequence[Tree]) -> Policy:
        """The policy as a scorer; which path is exact is measured on the first trees that it is asked for."""
        return self._scorer(self.name, trees)

    def reference(self, trees: Sequence[Tree]) -> Policy:
        """The reference as a scorer."""
        assert self.against is not None, "there is no reference"
        return self._scorer(self.against, trees)

    def _scorer(self, name: str, trees: Sequence[Tree]) -> Policy:
        if name not in self._loaded:
            folder = resolve(name)
            if is_reward_model(folder):
                network = load_reward_model(folder, dtype=self.precision.weights).to(self.device).eval()
                self._loaded[name] = RewardModel.choose(network, trees, autocast=self.precision.autocast)
            else:
                self._loaded[name] = scorer(folder, self.renderer.tokenizer, trees, self.precision, self.device, self.note)
        return self._loaded[name]

    def language_model(self, which: str) -> Any:
        """The "policy" or the "reference" as transformers has it, loaded for code that is not ours."""
        name = self.name if which == "policy" else str(self.against)
        return load_model(resolve(name), dtype=self.precision.weights).to(self.device).eval()

    def reference_logps(self, trees: Sequence[Tree], on_progress: Progress) -> Store:
        """Log-probs of the reference for all of `trees`: what training or a former evaluation stored is not computed again."""
        assert self.against is not None, "there is no reference"
        name, ranks = self.ranks.first(lambda: self._identity(str(self.against))), self.ranks
        with Share(self.cache, name, trees, rank=ranks.rank, world=ranks.world) as share:
            for note in share.notes:
                self.note(note)
            if share.todo and not share.take():
                self.note(WAITING)
                share.take(wait=True)
            if share.todo:
                for done in share.fill(self.reference(trees), budget=self.budget):
                    on_progress("reference", done, len(share.todo))
        ranks.barrier()
        return share.store if ranks.world == 1 else share.reopened()


def _check_reference(model: str, against: str) -> None:
    """Raises ModelError where there is nothing to compare log-probs with."""
    if is_reward_model(resolve(against)):
        raise ModelError(f"--against {against}: a reward model, which writes nothing; name a language model")
    check_same_tokens(model, against)
