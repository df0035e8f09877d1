"""A user's own objective: a function in a file, and what is said when it is not one."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import World, cli, same_curve

import preftune
from preftune.config import Config, describe
from preftune.errors import ConfigError, PreftuneError

MINE = '''
from __future__ import annotations

from torch.nn.functional import logsigmoid

from preftune.losses.records import PairLoss, RefPairs


def my_loss(pairs: RefPairs, *, strength: float = 0.1) -> PairLoss:
    """What dpo is, by another name."""
    chosen, rejected = strength * pairs.chosen_log_ratio, strength * pairs.rejected_log_ratio
    return PairLoss(-logsigmoid(chosen - rejected), chosen, rejected)
'''


def file(folder: Path, text: str) -> Path:
    path = folder / "my losses.py"
    path.write_text(text)
    return path


def test_a_function_in_a_file_trains_as_one_of_the_package(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file(tmp_path, MINE).parent)
    dpo = preftune.train(world.settings(tmp_path / "dpo", loss__beta=0.3), quiet=True)
    words = world.words(tmp_path / "own", loss__name="my losses.py:my_loss", loss__strength=0.3)
    left = cli("train", *words)
    assert left.code == 0, left.err
    own = preftune.Run.open(tmp_path / "own")
    same_curve(dpo, own)
    assert own.config().loss_name == "my_loss"
    monkeypatch.chdir("/")
    assert cli("train", "--resume", f"out={tmp_path / 'own'}").code == 0, "its path is whole in the run's settings"


def test_its_parameters_are_settings_with_their_types(tmp_path: Path) -> None:
    name = f"{file(tmp_path, MINE)}:my_loss"
    assert "strength: 0.1" in describe(name) and "What dpo is" in describe(name)
    assert Config.of({"loss": name}).loss_parameters == {"strength": 0.1} | {
        k: v for k, v in Config.of({"loss": "dpo"}).loss_parameters.items() if k not in ("beta", "label_smoothing")
    }
    with pytest.raises(ConfigError, match=r"loss.strength: expected a number; got 'much'"):
        Config.of({"loss.name": name, "loss.strength": "much"})
    with pytest.raises(ConfigError, match=r"loss.beta: a parameter of aot"):
        Config.of({"loss.name": name, "loss.beta": 1.0})


LATE = "from __future__ import annotations\n"
HEAD = "from preftune.losses.records import *\nfrom torch import Tensor\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"my losses.py: no function 'mine'; it has no function"),
        (HEAD + "def main(pairs: RefPairs) -> Tensor: ...", r"no function 'mine'; did you mean main\?"),
        ("import nothing_like_it", r"my losses.py:1: cannot be imported: ModuleNotFoundError: No module"),
        ("def mine(:", r"my losses.py:1: cannot be imported: SyntaxError"),
        (HEAD + "def mine(): ...", r":3: mine: expected a first argument annotated with the record"),
        (HEAD + "def mine(pairs) -> Tensor: ...", r":3: mine: expected a first argument .*one of Tokens, Pairs"),
        (LATE + "def mine(pairs: Nothing) -> Tensor: ...", r":2: mine: its annotations cannot be read: name 'Nothing'"),
        (HEAD + "def mine(pairs: Confidence) -> Tensor: ...", r"expected a first argument annotated"),
        (HEAD + "def mine(pairs: Pairs, beta: float = 1) -> Tensor: ...", r"come after a \*, as in mine\(pairs, \*, beta"),
        (HEAD + "def mine(pairs: Pairs, *, beta) -> Tensor: ...", r"expected a type and a default for the parameter beta"),
        (HEAD + "def mine(pairs: Pairs, **more) -> Tensor: ...", r"expected parameters by name, found \*\*more"),
        (HEAD + "def mine(lists: WholeStep[Ranked]) -> Tensor: ...", r"expected Ranked by itself"),
        (HEAD + "def mine(labels: Labels, m: Mismatched) -> Tensor: ...", r"expected WholeStep\[Mismatched\]"),
        (HEAD + "def mine(pairs: Pairs): ...", r"expected a return annotation: PairLoss or ResponseLoss"),
    ],
)  # fmt: skip
def test_what_is_not_an_objective_is_said_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Config.of({"loss": f"{file(tmp_path, text)}:mine"})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss.name: .*none.py: no such file; an objective of your own is named as FILE.py"):
        Config.of({"loss": str(tmp_path / "none.py:mine")})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return pairs.chosen_logp_sum.mean()", r":4: mine: expected one loss for each .*; got a tensor of shape \[\]"),
        ("return {'loss': 1}", r":4: mine: expected one loss for each .* got dict"),
        ("return pairs.chosen_log_ratio", r":5: mine: AttributeError: 'Pairs' object has no attribute 'chosen_log_ratio'"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_it_is_said_with_file_and_line(world: World, tmp_path: Path, body: str, said: str) -> None:
    path = file(tmp_path, f"{HEAD}\ndef mine(pairs: Pairs) -> Tensor:\n    {body}\n")
    with pytest.raises(PreftuneError, match=said):
        preftune.train(world.settings(tmp_path / "run", loss__name=f"{path}:mine"), quiet=True)


def test_a_plain_tensor_is_enough_and_has_no_rewards(world: World, tmp_path: Path) -> None:
    path = file(
        tmp_path, HEAD + "def mine(pairs: Pairs) -> Tensor:\n    return pairs.rejected_logp_mean - pairs.chosen_logp_mean\n"
    )
    run = preftune.train(world.settings(tmp_path / "run", loss__name=f"{path}:mine"), quiet=True)
    row = run.metrics()[0]
    assert {"loss", "logps/chosen", "lengths/rejected"} <= row.keys()
    assert not {name for name in row if name.startswith("rewards") or name == "kl"}


def test_the_example_of_the_docs_trains(world: World, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "own-objective.md").read_text(encoding="utf-8")
    path = file(tmp_path, page.partition("```python\n")[2].partition("```")[0])
    run = preftune.train(world.settings(tmp_path / "run", loss__name=f"{path}:my_loss", loss__margin=0.0), quiet=True)
    dpo = preftune.train(world.settings(tmp_path / "dpo"), quiet=True)
    assert [r["loss"] for r in run.metrics()] == pytest.approx([r["loss"] for r in dpo.metrics()], abs=1e-6)
