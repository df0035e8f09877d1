"""What every test stands on: shapes and types checked, one thread, no network, no home folder, no surprises from outside."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from worlds import World

_SCRATCH = tempfile.mkdtemp(prefix="preftune-tests-")  # before any library reads these
os.environ |= {
    "XDG_CACHE_HOME": _SCRATCH,
    "HF_HOME": f"{_SCRATCH}/huggingface",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
    "MPLCONFIGDIR": f"{_SCRATCH}/matplotlib",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}

# What a shell starts in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("preftune", "beartype.beartype")  # every annotation of the package is checked at every call

settings.register_profile("preftune", deadline=None, derandomize=os.environ.get("CI") == "true")  # CI: the same cases each time
settings.load_profile("preftune")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: PREFTUNE_DATA, or shared/data beside the repository. Tests skip without it, except under CI."""
    folder = Path(os.environ.get("PREFTUNE_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if folder.is_dir():
        return folder
    reason = f"the real data is not here ({folder}); PREFTUNE_DATA says where it is"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or the program that CHROMIUM names. Tests skip without it, except under CI."""
    import shutil

    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no chromium; apt-get install chromium")
        pytest.skip("needs chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model and data to train it on; read-only, shared by all tests."""
    from worlds import blank_page, build

    import preftune.api

    preftune.api.write_report = blank_page
    return build(tmp_path_factory.mktemp("world"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


def pytest_sessionfinish() -> None:
    """Leaves nothing behind."""
    import shutil

    shutil.rmtree(_SCRATCH, ignore_errors=True)
