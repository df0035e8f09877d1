"""Trackers read the same stream as metrics.jsonl."""

from __future__ import annotations

import importlib.util
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from crashes_for_tests import killed_at
from worlds import World, cli, finish, spawn

import preftune
from preftune.config import Config
from preftune.errors import ConfigError
from preftune.run import Run
from preftune.training.trackers import check_trackers


def recorded(run: Run) -> dict[tuple[str, str, int], list[float]]:
    """What TensorBoard's own reader finds: (split, metric, step) -> values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    found: dict[tuple[str, str, int], list[float]] = {}
    for tag in events.Tags()["scalars"]:
        split, _, name = tag.partition("/")
        for event in events.Scalars(tag):
            found.setdefault((split, name, event.step), []).append(event.value)
    return found


def assert_equal(run: Run) -> None:
    found = recorded(run)
    expected = {
        (row["split"], name, row["step"]): value
        for row in run.metrics()
        for name, value in row.items()
        if name not in ("step", "split")
    }
    assert found.keys() == expected.keys() and len(expected) > 50
    for key, value in expected.items():
        assert len(found[key]) == 1, key
        if key[1] not in ("tokens_per_second", "seconds"):
            assert found[key][0] == pytest.approx(value, rel=1e-6, abs=1e-12), key


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # TensorBoard's own


def test_tensorboard_holds_the_numbers_of_the_metrics_file(world: World, tmp_path: Path) -> None:
    assert_equal(preftune.train(world.settings(tmp_path / "run", trackers=["tensorboard"]), quiet=True))


def test_a_resumed_run_replaces_what_it_repeats(world: World, tmp_path: Path) -> None:
    words = ["train", *world.words(tmp_path / "run", trackers=["tensorboard"], checkpoint__every=2)]
    assert finish(spawn(killed_at, words, str(tmp_path / "log"), "update", 4)) == [-signal.SIGKILL]
    time.sleep(1.1)  # TensorBoard orders its files by the second in their names
    left = cli(*words, "--resume")
    assert left.code == 0, left.err
    assert_equal(Run.open(tmp_path / "run"))


def test_a_tracker_that_is_not_installed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name == "wandb" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ConfigError, match=r"trackers: wandb is not installed; pip install 'preftune\[wandb\]'"):
        preftune.train(world.settings(tmp_path / "run", trackers=["tensorboard", "wandb"]))
    assert not (tmp_path / "run").exists()


def test_a_folder_called_wandb_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="wandb is not installed"):
        check_trackers(["wandb"])


def test_an_unknown_tracker() -> None:
    with pytest.raises(ConfigError, match=r"trackers\.0: expected .*tensorboard.*wandb"):
        Config.of({"trackers": ["mlflow"]})
