"""What people get wrong, on the command line: exit code 2, a sentence that says where and what to do, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds import Left, World, cli, command, finish, model, read_jsonl, save_model, spawn, tokenizer

GOOD = {"prompt": "My kettle is broken?", "chosen": "I am sorry.", "rejected": "Not at all."}


def refused(world: World, folder: Path, **more: Any) -> str:
    """The message of a run that must not start; asserts that it is a clean refusal."""
    out = folder / "new" / "run"
    left = cli("train", *world.words(out, **more))
    assert_clean(left, out)
    return left.err


def assert_clean(left: Left, out: Path) -> None:
    """Exit code 2, no traceback, no result, nothing written."""
    assert left.code == 2, left.err
    assert "Traceback" not in left.err and "preftune: " in left.err and left.out == ""
    assert not out.exists() and not out.parent.exists()


def rows_refused(world: World, folder: Path, content: bytes, name: str = "data.jsonl", **more: Any) -> str:
    """The message for a data file with this content."""
    (folder / name).write_bytes(content)
    return refused(world, folder, data=str(folder / name), **more)


def lines(*rows: Any) -> bytes:
    """Rows as JSON lines; bytes are taken as they stand."""
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "empty prompt": (GOOD | {"prompt": "  "}, "prompt"),
    "empty response": (GOOD | {"chosen": ""}, "chosen"),
    "identical responses": (GOOD | {"rejected": GOOD["chosen"]}, "identical"),
    "a number for text": (GOOD | {"prompt": 3}, "prompt"),
    "null": (GOOD | {"rejected": None}, "rejected"),
    "a list of text": (GOOD | {"chosen": ["a"]}, "chosen"),
    "a column is missing": ({"prompt": "a", "chosen": "b"}, "rejected"),
    "not an object": ([1, 2], "object"),
    "truncated JSON": (b'{"prompt": "My ket\n', "JSON"),
    "invalid UTF-8": (b'{"prompt": "caf\xe9?", "chosen": "a", "rejected": "b"}\n', "UTF-8"),
    "lone surrogate": (b'{"prompt": "\\ud800?", "chosen": "a", "rejected": "b"}\n', "surrogate"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_file_and_line(world: World, tmp_path: Path, name: str) -> None:
    row, said = BAD_ROWS[name]
    err = rows_refused(world, tmp_path, lines(GOOD, GOOD | {"prompt": "Another?"}, row))
    assert f"{tmp_path / 'data.jsonl'}:3:" in err and said in err
    assert "1 of 3 rows cannot be used" in err and "quarantine=FILE" in err


def test_all_bad_rows_are_listed_at_once_the_first_twenty_and_the_count(world: World, tmp_path: Path) -> None:
    bad = [GOOD | {"chosen": "", "prompt": f"number {i}?"} for i in range(30)]
    err = rows_refused(world, tmp_path, lines(GOOD, *bad))
    assert "30 of 31 rows cannot be used" in err and err.count("data.jsonl:") == 20 and "… and 10 more" in err


def test_quarantine_sets_them_aside_and_goes_on(world: World, tmp_path: Path) -> None:
    good = read_jsonl(world.file("pairs"))[:6]
    content = lines(*good[:3], *(row for row, _ in BAD_ROWS.values()), *good[3:])
    data, aside = tmp_path / "data.jsonl", tmp_path / "aside" / "bad.jsonl"
    data.write_bytes(content)
    left = cli("train", *world.words(tmp_path / "run", data=data, quarantine=aside, steps=1))
    assert left.code == 0, left.err
    counts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (counts["used"], counts["quarantined"], counts["rows_read"]) == (6, len(BAD_ROWS), 6 + len(BAD_ROWS))
    kept = read_jsonl(aside)
    assert [int(r["source"].rsplit(":", 1)[1]) for r in kept] == list(range(4, 4 + len(BAD_ROWS)))
    assert all(set(r) == {"source", "reason", "row"} and r["reason"] for r in kept)


@pytest.mark.parametrize("column", ["chosen", "answer"])
def test_wrong_columns(world: World, tmp_path: Path, column: str) -> None:
    err = rows_refused(world, tmp_path, lines({"question": "a", column: "b", "worse": "c"}))
    assert "question" in err and "fields." in err


def test_no_usable_row_and_no_row(world: World, tmp_path: Path) -> None:
    err = rows_refused(world, tmp_path, lines(GOOD | {"chosen": ""}), quarantine=str(tmp_path / "bad.jsonl"))
    assert "no usable row: all 1 rows that were read are bad" in err
    assert "the file is empty" in rows_refused(world, tmp_path, b"")
    assert "no rows" in rows_refused(world, tmp_path, b"\n  \n\n")


def test_one_row(world: World, tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_bytes(lines(GOOD))
    left = cli("train", *world.words(tmp_path / "run", data=data, steps=2))
    assert left.code == 0 and "share one prompt: none is held out" in left.err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_bom_blank_lines_and_repeated_rows_are_fine_and_said(world: World, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\xef\xbb\xbf" + lines(GOOD, b"\n", GOOD, b"   \n", GOOD | {"prompt": "Another?"}))
    left = cli("train", *world.words(tmp_path / "run", data=data, steps=1))
    assert left.code == 0, left.err
    counts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (counts["rows_read"], counts["used"]) == (3, 3) and "repeats the prompt and responses" in left.err


def test_an_id_that_stands_for_two_things(world: World, tmp_path: Path) -> None:
    err = rows_refused(world, tmp_path, lines(GOOD | {"id": "a"}, GOOD | {"id": "a", "prompt": "Another?"}))
    assert "data.jsonl:2: the id 'a' stands for another prompt" in err


def test_very_long_texts(world: World, tmp_path: Path) -> None:
    long = "kettle lamp " * 9000
    data = tmp_path / "data.jsonl"
    data.write_bytes(lines(GOOD, GOOD | {"prompt": long}, GOOD | {"chosen": long}))
    left = cli("train", *world.words(tmp_path / "run", data=data, batch__max_length=64, steps=1))
    assert left.code == 0, left.err
    assert "1 prompts lost their oldest part" in left.err and "1 responses lost their tail" in left.err
    counts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert counts["longest_example_tokens"] <= 2 * 64


def test_nothing_fits_the_limit(world: World, tmp_path: Path) -> None:
    err = rows_refused(world, tmp_path, lines(*read_jsonl(world.file("chat"))[:3]), batch__max_length=4)
    assert "no example can be used, all" in err and "batch.max_length is 4" in err


def test_a_limit_beyond_the_context(world: World, tmp_path: Path) -> None:
    err = refused(world, tmp_path, batch__max_length=5000)
    assert "batch.max_length: 5000 is longer than the model's context of 256 tokens" in err


@pytest.mark.parametrize(
    ("name", "said"),
    [("nowhere.jsonl", "nowhere.jsonl"), ("data.docx", "data.docx"), ("empty", "empty")],
)
def test_files_that_are_no_data(world: World, tmp_path: Path, name: str, said: str) -> None:
    if name == "data.docx":
        (tmp_path / name).write_bytes(b"PK\x03\x04")
    if name == "empty":
        (tmp_path / name).mkdir()
    assert said in refused(world, tmp_path, data=str(tmp_path / name))


def _changed(world: World, folder: Path, change: Callable[[Path], object]) -> str:
    base = shutil.copytree(world.base, folder / "base")
    change(base)
    return str(base)


def _edit(name: str, **values: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        written = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(written))

    return edit


def _drop(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (_drop("tokenizer.json", "tokenizer_config.json"), "no tokenizer in it"),
    "no weights": (_drop("model.safetensors"), "no *.safetensors in it"),
    "weights as pickles": (_pickled, "pickles"),
    "weights cut short": (_cut, "could not be loaded"),
    "no config": (_drop("config.json"), "neither config.json nor adapter_config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
    "unknown architecture": (_edit("config.json", model_type="nothing_known"), "does not know this architecture"),
    "weights of another shape": (_edit("config.json", num_hidden_layers=3), "3"),
    "no end of text": (
        lambda folder: [_edit("tokenizer_config.json", eos_token=None)(folder), _drop("chat_template.jinja")(folder)],
        "no token could end a reply",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model_folders(world: World, tmp_path: Path, name: str) -> None:
    change, said = BAD_MODELS[name]
    assert said in refused(world, tmp_path, model=_changed(world, tmp_path, change))


def test_models_that_are_nowhere(world: World, tmp_path: Path) -> None:
    assert "no such folder, and not a hub id" in refused(world, tmp_path, model=str(tmp_path / "none"))
    assert "expected a model folder" in refused(world, tmp_path, model=str(world.file("pairs")))
    assert "the hub did not give it" in refused(world, tmp_path, model="nobody/nothing")


def test_a_tokenizer_larger_than_the_model(world: World, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "small", vocabulary=300)
    assert "they do not belong together" in refused(world, tmp_path, model=str(folder))


def test_messages_without_a_chat_template(world: World, tmp_path: Path) -> None:
    base = _changed(world, tmp_path, _drop("chat_template.jinja"))
    err = refused(world, tmp_path, model=base, data=str(world.file("chat")))
    assert "this tokenizer has no chat template: choose template=chatml" in err
    assert cli("train", *world.words(tmp_path / "text", model=base, steps=1)).code == 0  # text prompts need none


def test_no_pad_token_is_no_problem(world: World, tmp_path: Path) -> None:
    base = _changed(world, tmp_path, _edit("tokenizer_config.json", pad_token=None))
    left = cli("train", *world.words(tmp_path / "run", model=base, steps=1))
    assert left.code == 0, left.err


def test_weights_that_are_not_finite(world: World, tmp_path: Path) -> None:
    import torch

    broken = model()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    broken.save_pretrained(str(tmp_path / "nan"))
    tokenizer().save_pretrained(str(tmp_path / "nan"))
    assert "not finite: its weights are broken" in refused(world, tmp_path, model=str(tmp_path / "nan"))


@pytest.mark.parametrize("more", [{}, {"eval__fraction": 0.0}, {"eval__every": 1}, {"steps": 1, "eval__fraction": 0.0}])
def test_a_learning_rate_beyond_reason(world: World, tmp_path: Path, more: dict[str, Any]) -> None:
    """The loss is not finite after the first update: the run stops, says where, and no model is called the result."""
    out = tmp_path / "run"
    left = cli("train", *world.words(out, optim__lr="1e38", optim__warmup=0, optim__weight_decay=10, **more))
    assert left.code == 2 and "Traceback" not in left.err
    assert "Try a smaller optim.lr (now 1e+38)" in left.err
    assert not (out / "model").exists()
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.betta=0.1"], "loss.betta"),
        (["los.beta=0.1"], "did you mean loss"),
        (["loss.name=dpoo"], "did you mean dpo?"),
        (["epochs=many"], "epochs"),
        (["optim.lr=-1"], "optim.lr"),
        (["batch.pairs_per_step=2.5"], "batch.pairs_per_step"),
        (["loss.beta=0"], "loss.beta"),
        (["eval.fraction=1.5"], "eval.fraction"),
        (["device=tpu"], "device"),
        (["precision=fp8"], "precision"),
        (["a recipe.yaml"], "no such recipe"),
        (["one.yaml", "two.yaml"], "at most one recipe"),
        (["loss.betta=0.1", "epochs=many"], "2 settings are wrong"),
    ],
)
def test_settings(world: World, tmp_path: Path, words: list[str], said: str) -> None:
    out = tmp_path / "new" / "run"
    left = cli("train", *world.words(out), *words)
    assert_clean(left, out)
    assert said in left.err
    if words == ["loss.betta=0.1"]:
        assert "did you mean loss.beta?" in left.err and "command line" in left.err


def test_what_has_no_default() -> None:
    assert "model: give the folder or hub id" in cli("train", "data=x.jsonl").err
    assert "data: give the file" in cli("train", "model=x").err


def test_numbers_in_a_recipe_are_numbers_and_places_are_named(world: World, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim:\n  lr: 1e-6\nloss:\n  beta: 2e-1\n")
    left = cli("train", recipe, *[w for w in world.words(tmp_path / "run", steps=1) if not w.startswith("optim.lr")])
    assert left.code == 0, left.err
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["learning_rate"] == 1e-6
    recipe.write_text('optim:\n  lr: "1e-6"\nloss:\n  betta: 0.2\n')
    left = cli("train", recipe, *world.words(tmp_path / "new" / "run"))
    assert_clean(left, tmp_path / "new" / "run")
    assert f"{recipe}:4: loss.betta" in left.err


def test_out_that_cannot_be_written(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/nothing/run")):
        left = cli("train", *world.words(out))
        assert left.code == 2 and "Traceback" not in left.err
        assert f"{out}: cannot create this folder" in left.err, left.err
    assert (tmp_path / "file").read_text() == ""


def test_out_without_permission(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def denied(self: Path, *arguments: Any, **named: Any) -> None:
        if self.name == "run":
            raise PermissionError(13, "Permission denied")
        real(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", denied)
    err = refused(world, tmp_path)
    assert "no permission: choose a folder that you may write to (out= for a run)" in err


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of a megabyte; where none can be mounted the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("taken", [1000, 900, 700, 450, 250])
def test_a_full_disk(world: World, tmp_path: Path, small_disk: Path, taken: int) -> None:
    """Wherever the space ends, it is said, what was written is whole, and with space the run goes on."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(taken * 1024))
    words = ["train", *world.words(small_disk / "run", checkpoint__every=1, checkpoint__keep=1, trackers=[])]
    left = cli(*words)
    assert left.code == 2, left.err
    assert "the disk is full: free some space" in left.err and "Traceback" not in left.err
    ballast.unlink()
    left = cli(*words, "--resume")
    assert left.code == 0 or "the disk is full" in left.err, left.err


@pytest.mark.parametrize("limit", [600_000, 200_000, 40_000])
def test_a_file_size_limit(world: World, tmp_path: Path, limit: int) -> None:
    """The same without a mount: a limit on the size of any file, met by weights, by moments or by the model."""
    log = tmp_path / "log"
    code = finish(spawn(_limited, ["train", *world.words(tmp_path / "run", cache=str(tmp_path / "cache"))], str(log), limit))
    text = log.read_text()
    assert code == [0] if limit == 600_000 else code == [2], text
    assert "Traceback" not in text
    if limit < 600_000:
        assert "cannot write this checkpoint" in text and not (tmp_path / "run" / "model").exists()


def _limited(words: list[str], log: str, limit: int) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    command(words, log)


def test_other_verbs_refuse_as_cleanly(world: World, tmp_path: Path) -> None:
    for words, said in (
        (["score", "--model", tmp_path / "none", "--data", world.file("pairs")], "no such folder"),
        (["score", "--model", world.base, "--data", tmp_path / "none.jsonl"], "none.jsonl"),
        (["score", "--model", world.base, "--data", world.file("pairs"), "--beta", "-1"], "beta"),
        (["score", "--model", world.base, "--data", world.file("pairs"), "--out", "/proc/nothing/x"], "/proc/nothing"),
        (["check", tmp_path / "none.jsonl"], "none.jsonl"),
        (["check", world.file("pairs"), "--model", tmp_path], "not a model folder"),
        (["chat", tmp_path / "none", "--prompt", "Hello"], "no such folder"),
        (["chat", world.base, "--prompt", "  "], "the prompt is empty"),
        (["chat", world.base, "--prompt", "Hello", "--temperature", "-1"], "temperature"),
        (["report", tmp_path], "not a run folder"),
        (["config", "--loss", "dpoo"], "did you mean dpo?"),
    ):
        left = cli(*map(str, words))
        assert left.code == 2 and "Traceback" not in left.err, words
        assert said in left.err, (words, left.err)


def test_no_traceback_reaches_a_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "preftune", "train", f"model={tmp_path}", "data=none.jsonl", "loss.betta=1"],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "preftune: command line: loss.betta: no such setting; did you mean loss.beta?\n"
