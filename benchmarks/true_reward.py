"""The true reward of the demo's world as a rule that a run can name: reward.rule=benchmarks/true_reward.py:true_reward."""

from __future__ import annotations

from preftune.data.types import Prompt, Response
from preftune.demo import rubric


def true_reward(prompt: Prompt, response: Response) -> float:
    """What a reply to a complaint is worth, exactly."""
    return rubric.reward(prompt, response)
