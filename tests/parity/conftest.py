"""The peer writes no progress bars and no warnings between the tests, and its collections of garbage are cheap."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest

from preftune.model.load import quiet_transformers


@pytest.fixture(autouse=True, scope="session")
def _imported() -> None:
    """Each of TRL's trainers collects garbage over all that is alive: the libraries, which stay, are taken out of that."""
    import trl

    _ = trl.DPOTrainer, trl.KTOTrainer, trl.SFTTrainer
    gc.freeze()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import datasets

    quiet_transformers()
    logging.getLogger("trl").setLevel(logging.ERROR)
    datasets.disable_progress_bar()
    yield
    datasets.enable_progress_bar()
