from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data import store as module
from preftune.data.store import Store
from preftune.errors import StorageError

KEYS = [bytes(16), bytes(range(16)), b"\0" * 15 + b"\1", b"\xff" * 16]
VALUES = [np.array(v, np.float32) for v in ([-1.5, -2.0], [-0.1], [], [3.0, 4.0, 5.0])]


def plain(values: list[Any]) -> list[list[float] | None]:
    return [None if v is None else v.tolist() for v in values]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Store(tmp_path / "store").add(KEYS, VALUES)
    return tmp_path / "store"


def shard_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def test_what_was_added_is_found_by_whoever_opens_the_store(folder: Path) -> None:
    store = Store(folder)
    assert len(store) == 4
    unknown = [b"\1" + bytes(15), b"\xfe" * 16]
    found = store.get([KEYS[3], unknown[0], KEYS[0], KEYS[2], KEYS[0], unknown[1], KEYS[1]])
    assert plain(found) == [[3.0, 4.0, 5.0], None, [-1.5, -2.0], [], [-1.5, -2.0], None, [np.float32(-0.1)]]
    assert store.get([]) == [] and plain(Store(folder / "none").get(KEYS)) == [None] * 4 and len(Store(folder / "none")) == 0


@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(-9, 9), max_size=4)), max_size=6), max_size=6))
def test_a_store_is_a_dictionary_of_many_files(tmp_path_factory: pytest.TempPathFactory, added: list[Any]) -> None:
    """Whatever was added together, in whatever order; the value of a key is a function of it, as in use."""
    values = {n: np.array(v, np.int32) for rows in added for n, v in rows}
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder)
    for rows in added:
        store.add([n.to_bytes(16, "little") for n, _ in rows], [values[n] for n, _ in rows])
    for opened in (store, Store(folder)):
        expected = [values[n].tolist() if n in values else None for n in range(31)]
        assert plain(opened.get([n.to_bytes(16, "little") for n in range(31)])) == expected
        assert len(opened) == len(values) and opened.damaged == []


def test_opening_reads_no_value_and_reading_only_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of what a run does not use: none, counted in digests."""
    checked = []
    check = module._check
    monkeypatch.setattr(module, "_check", lambda key, value: (checked.append(key), check(key, value))[1])
    store = Store(folder)
    assert len(store) == 4 and checked == []
    store.get([KEYS[1], b"\7" * 16])
    assert checked == [KEYS[1]]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda data: data[: len(data) // 2],
    "torn in its last value": lambda data: data[:-1],
    "empty": lambda data: b"",
    "not safetensors": lambda data: b"hello" * 100,
    "longer": lambda data: data + b"\0\0\0\0",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_set_aside(folder: Path, how: str) -> None:
    file = shard_of(folder)
    file.write_bytes(DAMAGE[how](file.read_bytes()))
    store = Store(folder)
    assert store.damaged == [file] and len(store) == 0
    assert file.with_suffix(".damaged").exists() and not file.exists(), "kept for a look, never read"
    store.add(KEYS, VALUES)
    assert plain(store.get(KEYS)) == plain(VALUES) and Store(folder).damaged == []


def test_no_flipped_bit_goes_unnoticed(folder: Path) -> None:
    file = shard_of(folder)
    whole = file.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            store = Store(folder)
            for key, value in zip(KEYS, VALUES, strict=True):
                (found,) = store.get([key])
                assert found is None or found.tolist() == value.tolist(), (at, bit)
            for left in folder.iterdir():
                left.unlink()


def test_what_a_damaged_file_held_is_unknown_and_the_rest_is_not(folder: Path) -> None:
    first = shard_of(folder)
    other = [bytes([7]) * 16, bytes([8]) * 16]
    Store(folder).add(other, [np.ones(3), np.ones(2)])
    whole = first.read_bytes()
    at = whole.index(VALUES[3].tobytes())
    first.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    store = Store(folder)
    assert plain(store.get([KEYS[0], *other])) == [[-1.5, -2.0], [1.0] * 3, [1.0] * 2], "undamaged parts can be read"
    assert plain(store.get([*other, KEYS[3], KEYS[0]])) == [[1.0] * 3, [1.0] * 2, None, None]
    assert store.damaged == [first] and len(store) == 2


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        Store(tmp_path / "file").add(KEYS, VALUES)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("preftune.files.os.fsync", full)
    store = Store(tmp_path / "store")
    with pytest.raises(StorageError, match="disk is full"):
        store.add(KEYS, VALUES)
    assert list((tmp_path / "store").iterdir()) == [] and len(store) == 0


def _add_many(folder: str, first: int) -> None:
    store = Store(Path(folder))
    for n in range(first, first + 40):
        store.add([(n % 60).to_bytes(16, "big")], [np.full(3, n % 60, np.int32)])


def test_processes_write_and_read_at_once(tmp_path: Path) -> None:
    """Two writers whose keys overlap, and a reader meanwhile."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add_many, args=(str(tmp_path), first)) for first in (0, 20)]
    for writer in writers:
        writer.start()
    keys = [n.to_bytes(16, "big") for n in range(60)]
    while any(writer.is_alive() for writer in writers):
        found = Store(tmp_path).get(keys)
        assert all(v is None or v.tolist() == [n] * 3 for n, v in enumerate(found))
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [0, 0]
    store = Store(tmp_path)
    assert plain(store.get(keys)) == [[n] * 3 for n in range(60)]
    assert len(store) == 60 and store.damaged == [] and len(list(tmp_path.iterdir())) == 60
