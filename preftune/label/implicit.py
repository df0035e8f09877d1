"""The reward that a preference-trained model stands for, as something that can be kept, moved and judged with.

    export(ImplicitReward("runs/dpo", "base", 0.1), Path("rewards/dpo"))     # preftune score --reward
    preftune judge rewards/dpo --by reward --data pairs.jsonl --out judgments.jsonl

r(x, y) = β · (log π(y|x) − log π_ref(y|x)), up to a constant per prompt (Rafailov et al., 2023, arXiv 2305.18290, equation 5).
A folder with reward.json names the policy, the reference and β; the models stay where they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from preftune.errors import ModelError
from preftune.files import make_folder, storage, write_atomic
from preftune.model.load import load_tokenizer, resolve

FILE = "reward.json"


@dataclass(frozen=True)
class ImplicitReward:
    """β · log π/π_ref. policy, reference: model folders or hub ids."""

    policy: str
    reference: str
    beta: float


def export(reward: ImplicitReward, folder: Path) -> Path:
    """Writes reward.json into the folder, with whole paths. Raises ModelError where the two have different tokens."""
    policy, reference = (str(resolve(name).resolve()) if Path(name).expanduser().exists() else name
                         for name in (reward.policy, reward.reference))  # fmt: skip
    check_same_tokens(policy, reference)
    make_folder(folder)
    content = {"kind": "implicit", "policy": policy, "reference": reference, "beta": reward.beta}
    write_atomic(folder / FILE, json.dumps(content, indent=1) + "\n")
    return folder / FILE


def read_implicit(name: str) -> ImplicitReward | None:
    """The reward that a folder (or its reward.json) holds; None where it is something else. Raises ModelError."""
    place = Path(name).expanduser()
    file = place if place.name == FILE else place / FILE
    if not file.is_file():
        return None
    with storage(file, "read this file"):
        text = file.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
        if found["kind"] != "implicit":
            raise ValueError(f"kind {found['kind']!r}")
        reward = ImplicitReward(str(found["policy"]), str(found["reference"]), float(found["beta"]))
        if not reward.beta > 0:
            raise ValueError(f"beta {reward.beta}")
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file}: not a reward ({type(error).__name__}: {error}); expected kind implicit, policy, reference and a beta "
            "above 0, as `preftune score --reward` writes them"
        ) from None
    return reward


def check_same_tokens(policy: str, reference: str) -> None:
    """Raises ModelError where the log-probs of the two models would not be of the same tokens."""
    ours, theirs = (load_tokenizer(resolve(name)).get_vocab() for name in (policy, reference))
    if ours != theirs:
        n = len(set(ours.items()) ^ set(theirs.items()))
        raise ModelError(
            f"{reference}: its tokenizer is not that of {policy} ({n} entries differ), so log-ratios and KL would compare "
            "different tokens; name a reference with the same tokenizer"
        )
