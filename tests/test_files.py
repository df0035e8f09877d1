"""Files that are either whole or not there: through kills, full disks and torn lines."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.errors import StorageError
from preftune.files import Lock, append_lines, json_line, make_folder, read_jsonl, storage, write_atomic


def failing(error: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    return fail


def test_a_file_is_written_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "new" / "file.txt", "é\n")
    finally:
        os.umask(old)
    file = tmp_path / "new" / "file.txt"
    assert file.read_bytes() == b"\xc3\xa9\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    file = tmp_path / "file.txt"
    file.write_text("old")
    code = f"""
import os, signal, sys
from pathlib import Path
from preftune.files import write_atomic
os.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_atomic(Path(sys.argv[1]), "new" * 100_000)
"""
    assert subprocess.run([sys.executable, "-c", code, str(file)], check=False).returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    write_atomic(file, "newer")  # what the kill left is in nobody's way
    assert file.read_text() == "newer"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errno.ENOSPC, "the disk is full: free some space, or choose another folder"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EACCES, "no permission: choose a folder that you may write to"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: int, advice: str
) -> None:
    file = tmp_path / "file.txt"
    file.write_text("old")
    monkeypatch.setattr(os, moment, failing(error))
    with pytest.raises(StorageError) as caught:
        write_atomic(file, "new")
    assert str(caught.value).startswith(f"{file}: cannot write this file: ")
    assert advice in str(caught.value)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file], "the temporary file is gone"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_really_is_full(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="the disk is full"):
        append_lines(tmp_path / "metrics.jsonl", [{"step": 0}])


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file of this name is in the way"):
        make_folder(tmp_path / "file")
    with pytest.raises(StorageError, match="a part of this path is a file"):
        make_folder(tmp_path / "file" / "run")
    monkeypatch.setattr("tempfile.TemporaryFile", failing(errno.EACCES))  # a folder that exists but takes no files
    with pytest.raises(StorageError, match="no permission"):
        make_folder(tmp_path)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage(tmp_path, "divide"):
        _ = 1 / 0


ROWS = st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.floats(-1, 1)))


@given(ROWS, ROWS)
def test_rows_read_back_equal(tmp_path_factory: pytest.TempPathFactory, first: Any, second: Any) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    assert read_jsonl(file) == []
    append_lines(file, first)
    append_lines(file, second)
    assert read_jsonl(file) == first + second


def test_a_lone_surrogate_and_unusual_line_ends_survive(tmp_path: Path) -> None:
    rows = [{"text": "é\ud800"}, {"text": "a\u2028b\x85c\r\nd"}, {"text": "é"}]
    append_lines(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert json_line({"text": "é"}) == '{"text": "é"}\n'


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        append_lines(tmp_path / "rows.jsonl", [{"step": 0}, {"loss": float("nan")}])
    assert read_jsonl(tmp_path / "rows.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\x00\x00\x00", b"{"])
@pytest.mark.parametrize("whole", [[], [{"step": 0}, {"step": 1}]])
def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path: Path, torn: bytes, whole: list[dict[str, int]]) -> None:
    file = tmp_path / "rows.jsonl"
    append_lines(file, whole)
    with file.open("ab") as f:
        f.write(torn)
    assert read_jsonl(file) == whole
    append_lines(file, [{"step": 2, "loss": 0.5}])
    assert read_jsonl(file) == [*whole, {"step": 2, "loss": 0.5}]


@pytest.mark.parametrize("bad", [b"{\n", b"[1]\n", b"\n", b"\xff\n", b"\x00\n"])
def test_a_damaged_line_is_named(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n' + bad + b'{"a": 2}\n')
    with pytest.raises(StorageError, match=f"{file}:2: not a JSON object"):
        read_jsonl(file)


def test_a_kill_between_rows_keeps_every_row_that_was_logged(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    code = """
import os, signal, sys
from pathlib import Path
from preftune.files import append_lines
for step in range(3):
    append_lines(Path(sys.argv[1]), [{"step": step}])
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2]


def test_a_lock_is_held_by_one_at_a_time_and_let_go_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with Lock(path) as mine, Lock(path) as theirs:
        assert mine.take() and mine.take(), "to take it once more changes nothing"
        assert not theirs.take()
        mine.__exit__()
        assert theirs.take(wait=True)
    with Lock(path) as next_one:
        assert next_one.take()


def test_a_lock_goes_with_the_last_process_that_holds_it(tmp_path: Path) -> None:
    with Lock(tmp_path / ".lock") as mine:
        assert mine.take()
        child = subprocess.Popen(["sleep", "60"], pass_fds=(mine.fileno(),))
    with Lock(tmp_path / ".lock") as other:
        assert not other.take(), "a child that inherited it holds it on"
        child.kill()
        assert other.take(wait=True)
    child.wait()


def test_a_lock_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot lock this file"), Lock(tmp_path / "file" / ".lock") as lock:
        lock.take()
