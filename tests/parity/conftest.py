"""The peer writes no progress bars and no warnings between the tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from preftune.model.load import quiet_transformers


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import datasets

    quiet_transformers()
    logging.getLogger("trl").setLevel(logging.ERROR)
    datasets.disable_progress_bar()
    yield
    datasets.enable_progress_bar()
