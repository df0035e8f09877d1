"""What a run on rollouts has to have, and its parts opened: the reward, the critic, and `Rollouts` over them."""

from __future__ import annotations

from collections.abc import Iterator

from preftune.config import Config
from preftune.data.template import Renderer
from preftune.engine.policy import Policy
from preftune.errors import ConfigError
from preftune.losses.records import Replies
from preftune.model.device import Precision
from preftune.rollout_settings import Critic as CriticSettings
from preftune.rollout_settings import Reward, Rollout
from preftune.run import Run
from preftune.training.critic import load_critic
from preftune.training.dist import Ranks
from preftune.training.prepare import Said
from preftune.training.prompts import AskedData
from preftune.training.rewards import Rewards
from preftune.training.rollouts import Rollouts
from preftune.training.shadow import Shadow
from preftune.training.step import Goal

_SECTIONS = {"rollout": Rollout(), "reward": Reward(), "critic": CriticSettings()}


def require_rollouts(config: Config, goal: Goal, ranks: Ranks) -> None:
    """Raises ConfigError that lists what is missing or contradicts itself, of settings that are resolved."""
    problems = _problems(config, goal, ranks) if config.needs_rollouts else _without_rollouts(config)
    if problems:
        raise ConfigError("\n".join(problems))


def _without_rollouts(config: Config) -> list[str]:
    unused = [name for section in _SECTIONS for name in _changed(config, section)]
    if not unused:
        return []
    return [
        f"{', '.join(unused)}: for objectives that learn from the policy's own replies; loss.name={config.loss_name} does not"
    ]


def _problems(config: Config, goal: Goal, ranks: Ranks) -> list[str]:
    r, given = config.rollout, [name for name in ("model", "rule") if getattr(config.reward, name) is not None]
    tied = float(config.loss_parameters.get("beta", 0.0))
    checks = [
        (len(goal) > 1, f"loss: {config.loss_name}: an objective on the policy's own replies stands by itself"),
        (not given, "reward: say what a reply earns: reward.model=PATH (a reward model) or reward.rule=FILE.py:FUNCTION"),
        (len(given) > 1, "reward: a model and a rule are given; leave one out"),
        (config.reward.template is not None and "rule" in given, "reward.template: a rule reads texts; leave it out"),
        (r.estimator == "gae" and goal[0].record is Replies,
         f"rollout.estimator=gae judges tokens, {config.loss_name} whole replies; take rloo or grpo, or loss.name=ppo"),
        (r.estimator != "gae" and r.n == 1, f"rollout.n=1: {r.estimator} compares replies to one prompt; expected 2 or more"),
        (r.kl_target is not None and not r.beta, "rollout.kl_target: β is 0 and would stay so; set rollout.beta above 0"),
        (bool(tied and r.beta), f"loss.beta={tied:g} and rollout.beta={r.beta} both tie to the reference; set one to 0"),
        (config.lora.dropout > 0, "lora.dropout: π/π_old would be of two different functions; leave it out"),
        (ranks.world > 1, f"loss.name={config.loss_name} trains in one process; {ranks.world} were started"),
    ]  # fmt: skip
    idle = {
        "gae": [] if r.estimator == "gae" else [*_changed(config, "rollout", "gamma", "lam"), *_changed(config, "critic")],
        "grpo": [] if r.estimator == "grpo" else _changed(config, "rollout", "scale"),
    }
    found = [message for wrong, message in checks if wrong]
    found += [f"{', '.join(names)}: for rollout.estimator={e}, but it is {r.estimator}" for e, names in idle.items() if names]
    if r.kl_target is None and _changed(config, "rollout", "kl_gain"):
        found.append("rollout.kl_gain: of no effect while β is fixed; set rollout.kl_target")
    return found


def _changed(config: Config, section: str, *names: str) -> list[str]:
    """Settings of a section (or these of them) that are not as they come."""
    usual, now = _SECTIONS[section], getattr(config, section)
    return [f"{section}.{n}" for n in names or type(usual).model_fields if getattr(now, n) != getattr(usual, n)]


def open_rollouts(
    config: Config,
    run: Run,
    policy: Policy,
    reference: Shadow | None,
    goal: Goal,
    data: AskedData,
    renderer: Renderer,
    precision: Precision,
) -> Iterator[Said | Rollouts]:
    """What it says of reward and critic, and the Rollouts last. `reference`: the policy as it starts."""
    assert reference is not None
    device = next(policy.parameters()).device
    rewards = Rewards.of(config.reward, device)
    yield Said("reward", f"by {config.reward.model or config.reward.rule}")
    critic = None
    if config.rollout.estimator == "gae":
        critic, why = load_critic(config, renderer, data.trees, device, precision)
        yield Said("critic", why)
    rollouts = Rollouts(
        config=config,
        run=run,
        policy=policy,
        reference=reference,
        goal=goal,
        critic=critic,
        rewards=rewards,
        renderer=renderer,
        asked=data.asked,
        held_out=data.asked_held_out,
    )
    r, n_steps = config.rollout, rollouts.schedule.n_steps
    said = f"iterations × prompts × replies: {rollouts.schedule.n_iterations} × {min(r.prompts, len(data.asked))} × {r.n}, "
    yield Said("rollouts", f"{said}updates: {n_steps}; advantages by {r.estimator}, β {r.beta:g}")
    yield rollouts
