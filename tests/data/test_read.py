"""Reading: every kind of source, format detection, bad input with its place and remedy, counts that add up."""

from __future__ import annotations

import csv
import gzip
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preftune.data.read import Dataset, read_examples
from preftune.data.types import Example, Message, Pair
from preftune.errors import ConfigError, DataError
from preftune.registry import FORMATS

PAIRS = [{"prompt": f"{i}+{i}=?\nBe “exact”.", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}, maybe"} for i in range(5)]
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"Say {i}"}],
        "chosen": [{"role": "assistant", "content": f"{i}"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for i in range(3)
]
RANKED = [{"prompt": f"p{i}", "responses": ["a", "b", "c"], "scores": [1.0, 2.0, 2.0]} for i in range(3)]
ROWS = {"prompt_chosen_rejected": PAIRS, "chat": CHATS, "prompt_responses": RANKED}


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def write_gzip(path: Path, rows: list[Any]) -> Path:
    write = write_json if ".json." in path.name else write_lines
    path.write_bytes(gzip.compress(write(path.with_suffix(""), rows).read_bytes()))
    path.with_suffix("").unlink()
    return path


def write_csv(path: Path, rows: list[Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in rows)
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_saved(path: Path, rows: list[Any]) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


WRITERS: dict[str, Callable[[Path, list[Any]], Path]] = {
    "a.json": write_json,
    "a.jsonl": write_lines,
    "a.ndjson": write_lines,
    "lines.json": write_lines,
    "array.jsonl": write_json,
    "a.json.gz": write_gzip,
    "a.jsonl.gz": write_gzip,
    "a.csv": write_csv,
    "a.tsv": write_csv,
    "a.parquet": write_parquet,
    "saved": write_saved,
}


def content(data: Dataset) -> list[tuple[Any, ...]]:
    return [(e.id, e.prompt, e.responses, e.pairs, e.labels, e.scores) for e in data.examples]


def adds_up(data: Dataset) -> bool:
    n = len(data.examples)
    return n + data.n_dropped + data.n_quarantined == data.n_read and sum(data.formats.values()) == n


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("name", WRITERS)
def test_every_container_holds_the_same_examples(tmp_path: Path, name: str, rows: list[Any]) -> None:
    data = read_examples(WRITERS[name](tmp_path / name, rows))
    assert content(data) == content(read_examples(rows))
    assert data.n_read == len(rows)
    assert adds_up(data)
    assert len({e.id for e in data.examples}) == len(rows)


SAMPLES = {
    "alpaca_eval": {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.2},
    "two_outputs": {"instruction": "a", "output_1": "b", "output_2": "c", "label": 1},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}, "rejected": "c"},
    "prompt_chosen_rejected": PAIRS[0],
    "hh": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "chosen_rejected": {k: CHATS[0]["prompt"] + CHATS[0][k] for k in ("chosen", "rejected")},  # type: ignore[operator]
    "prompt_completion_label": {"prompt": "a", "completion": "b", "label": False},
    "prompt_responses": RANKED[0],
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "ultrafeedback": {"instruction": "a", "completions": [{"response": "b", "annotations": {"help": {"Rating": "4"}}}]},
    "preference_strength": {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 2},
    "helpsteer": {"prompt": "a", "response": "b", "helpfulness": 4},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("container", ["a.jsonl", "a.csv"])
def test_every_format_is_detected_and_said(tmp_path: Path, name: str, container: str) -> None:
    row = SAMPLES[name] | {"year": "2020"}
    if container == "a.csv" and name == "sharegpt":
        row = row | {"chosen": {"from": "gpt", "value": "b"}}
    path = WRITERS[container](tmp_path / container, [row])
    data = read_examples(path)
    assert data.formats == {name: 1}
    assert content(data) == content(read_examples([row], format=name))
    assert data.notes == [f"{path}: 1 row read as {name} (columns {', '.join(SAMPLES[name])}; not used: year)"]


def test_every_format_has_a_sample() -> None:
    assert set(SAMPLES) == set(FORMATS)


def test_places_are_lines(tmp_path: Path) -> None:
    array = write_json(tmp_path / "a.json", PAIRS)  # indented: 5 lines an element, after the bracket
    assert [e.source for e in read_examples(array).examples] == [f"{array}:{2 + 5 * i}" for i in range(5)]
    lines = tmp_path / "b.jsonl"
    lines.write_text("\n\n".join(json.dumps(r) for r in PAIRS))
    assert [e.source for e in read_examples(lines).examples] == [f"{lines}:{1 + 2 * i}" for i in range(5)]
    assert read_examples(lines).n_read == 5
    table = write_csv(tmp_path / "c.csv", PAIRS)  # a prompt has a line break in it
    assert [e.source for e in read_examples(table).examples] == [f"{table}:{2 + 2 * i}" for i in range(5)]
    assert read_examples(PAIRS).examples[1].source == "data[1]"


def test_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", PAIRS[:2])
    write_csv(tmp_path / "a.csv", PAIRS[2:])
    write_lines(tmp_path / "c.jsonl", [SAMPLES["messages"]])
    (tmp_path / "README.md").write_text("hello")
    data = read_examples(tmp_path)
    assert [e.responses[0] for e in data.examples] == ["4", "6", "8", "0", "2", "b"]
    assert data.formats == {"prompt_chosen_rejected": 5, "messages": 1}
    assert data.notes[0] == f"{tmp_path}: 3 files read; left alone: README.md"
    assert content(read_examples([tmp_path / "a.csv", str(tmp_path / "b.jsonl"), tmp_path / "c.jsonl"])) == content(data)


def test_folder_with_splits_asks_for_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", PAIRS[:3])
    write_lines(tmp_path / "test-00.jsonl", PAIRS[3:])
    with pytest.raises(DataError, match=r"must not be mixed: name the split, .*:train"):
        read_examples(tmp_path)
    assert read_examples(f"{tmp_path}:train").n_read == 3
    assert read_examples(f"{tmp_path}:test").n_read == 2
    with pytest.raises(DataError, match="no file is called dev"):
        read_examples(f"{tmp_path}:dev")


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises(DataError, match=r"holds no data file; expected names that end in \.json"):
        read_examples(tmp_path)
    write_lines(tmp_path / "inner" / "a.jsonl", PAIRS)
    with pytest.raises(DataError, match="its folders inner do: name one"):
        read_examples(tmp_path)


def test_saved_dataset_with_splits(tmp_path: Path) -> None:
    import datasets

    parts = datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS[:3]), test=datasets.Dataset.from_list(PAIRS[3:]))
    parts.save_to_disk(str(tmp_path / "d"))
    data = read_examples(tmp_path / "d")
    assert data.n_read == 3
    assert data.notes[0] == f"{tmp_path}/d: split train (there are also: test)"
    assert read_examples(f"{tmp_path}/d:test").examples[0].source == f"{tmp_path}/d:test[0]"
    assert content(read_examples(parts["test"])) == content(read_examples(PAIRS[3:]))
    assert content(read_examples(parts)) == content(data)
    with pytest.raises(DataError, match=r"d:tset: no such split; did you mean test\?"):
        read_examples(f"{tmp_path}/d:tset")
    write_saved(tmp_path / "one", PAIRS)
    with pytest.raises(DataError, match="has no splits"):
        read_examples(f"{tmp_path}/one:train")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="looks like a saved dataset, but it cannot be read"):
        read_examples(tmp_path / "one")


def test_hub_id_without_network() -> None:
    with pytest.raises(DataError, match=r"nobody/nothing: no such file, and as a dataset .* cannot be loaded"):
        read_examples("nobody/nothing:train")
    with pytest.raises(DataError, match=r"nobody/nothing: no such file; the folder nobody does not exist"):
        read_examples(Path("nobody/nothing"))  # a Path is never looked up elsewhere


def test_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    found = datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS), test=datasets.Dataset.from_list(PAIRS[:2]))
    monkeypatch.setattr(datasets, "load_dataset", {"some/pairs": found}.__getitem__)
    data = read_examples("some/pairs:test")
    assert [e.source for e in data.examples] == ["some/pairs:test[0]", "some/pairs:test[1]"]
    assert read_examples("some/pairs").notes[0] == "some/pairs: split train (there are also: test)"


def test_examples_in_memory() -> None:
    mine = Example("mine", "p", ("a", "b"), source="here", pairs=(Pair(1, 0),))
    data = read_examples([mine, PAIRS[0]])
    assert data.examples[0] == mine
    assert data.formats == {"example": 1, "prompt_chosen_rejected": 1}
    for bad, reason in [
        (Example("x", " ", ("a",)), "prompt is empty"),
        (Example("x", "p", ()), "there is no response"),
        (Example("x", "p", ("a", "b"), pairs=(Pair(0, 2),)), "pairs must name two of the 2 responses"),
        (Example("x", "p", ("a", "a"), pairs=(Pair(0, 1),)), "identical"),
        (Example("x", "p", ("a",), scores=(1.0, 2.0)), "scores has 2 entries"),
        (Example("x", (Message("system", "p"),), ("a",)), "ends with a message by the system"),
    ]:
        with pytest.raises(DataError, match=rf"data\[0\]: .*{reason}"):
            read_examples([bad])


def test_fields_rename_columns(tmp_path: Path) -> None:
    swapped = [{"q": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in PAIRS]
    path = write_lines(tmp_path / "a.jsonl", swapped)
    data = read_examples(path, fields={"prompt": "q", "chosen": "rejected", "rejected": "chosen"})
    assert content(data) == content(read_examples(PAIRS))
    assert "prompt from q, rejected from chosen, chosen from rejected" in data.notes[0]
    with pytest.raises(DataError, match=r"fields.prompt=qq: there is no such column; did you mean q\?"):
        read_examples(path, fields={"prompt": "qq"})
    with pytest.raises(ConfigError, match=r"fields.chosn: no data format has a column 'chosn'; did you mean chosen\?"):
        read_examples(path, fields={"chosn": "q"})


def test_columns_of_no_format(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "choosen": "b", "rejected": "c"}])
    with pytest.raises(DataError) as error:
        read_examples(path)
    text = str(error.value)
    assert text.startswith(f"{path}: no data format fits its columns: prompt, choosen, rejected")
    assert "Nearest is prompt_chosen_rejected, of which it lacks chosen" in text
    assert "fields.chosen=choosen" in text
    assert all(name in text for name in FORMATS)
    with pytest.raises(DataError, match="format 'messages' does not fit its columns"):
        read_examples(path, format="messages")
    with pytest.raises(ConfigError, match=r"'mesages' does not exist; did you mean messages\?"):
        read_examples(path, format="mesages")


def test_format_can_be_forced() -> None:
    rows = [{"prompt": "p", "completion": "c", "label": True}]
    assert read_examples(rows).formats == {"prompt_completion_label": 1}
    assert read_examples(rows, format="prompt_completion").examples[0].labels == ()


def test_a_bad_first_row_does_not_decide_the_format() -> None:
    rows = [{"prompt": "p", "chosen": "a"}, *PAIRS]
    with pytest.raises(DataError, match=r"1 of 6 rows cannot be used\n  data\[0\]: column 'rejected' is missing"):
        read_examples(rows)


def test_bad_rows_are_listed_at_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*PAIRS, *({"prompt": f"p{i}", "chosen": "", "rejected": "x"} for i in range(30))])
    with pytest.raises(DataError) as error:
        read_examples(path)
    lines = str(error.value).splitlines()
    assert lines[0] == "30 of 35 rows cannot be used"
    assert lines[1:21] == [f"  {path}:{6 + i}: chosen is empty" for i in range(20)]
    assert lines[21] == "  … and 10 more"
    assert "quarantine=FILE" in lines[22]


def test_quarantine(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps(r) for r in PAIRS]
    nan = '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}'
    path.write_bytes("\n".join([good[0], '{"prompt": "cut', nan, good[1], "[1]"]).encode() + b"\n\xff\n")
    aside = tmp_path / "out" / "bad.jsonl"
    data = read_examples(path, quarantine=aside)
    assert (len(data.examples), data.n_quarantined, data.n_read) == (2, 4, 6)
    assert adds_up(data)
    rows = [json.loads(line) for line in aside.read_text().splitlines()]
    assert [r["source"] for r in rows] == [f"{path}:2:12", f"{path}:3", f"{path}:5", f"{path}:6"]
    assert rows[0]["row"] == '{"prompt": "cut'
    assert "cut off" in rows[0]["reason"]
    assert rows[1]["row"]["margin"] == "nan"
    assert rows[2] == {"source": f"{path}:5", "reason": "a row must be an object with named columns, found a list", "row": [1]}
    assert rows[3]["row"] == "\\xff"
    assert data.notes[-1] == f"4 of 6 rows cannot be used; moved to {aside}, each with the reason"
    read_examples(PAIRS, quarantine=aside)
    assert aside.read_text() == ""  # what this read set aside, not what an earlier one did


def test_quarantine_never_replaces_data(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(ConfigError, match="this is the data itself"):
        read_examples(path, quarantine=path)
    with pytest.raises(ConfigError, match="would be read as data next time"):
        read_examples(tmp_path, quarantine=tmp_path / "bad.jsonl")
    assert read_examples(path).n_read == 5


@pytest.mark.parametrize("content", ['{"precious": 1}\n', "notes\n", '["source", "reason"]\n'])
def test_quarantine_never_replaces_what_is_none(tmp_path: Path, content: str) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(content)
    with pytest.raises(ConfigError, match="in the way"):
        read_examples(PAIRS, quarantine=mine)
    assert mine.read_text() == content


def test_no_usable_row(tmp_path: Path) -> None:
    bad = {"prompt": "", "chosen": "a", "rejected": "b"}
    aside = tmp_path / "bad.jsonl"
    with pytest.raises(DataError, match=r"no usable row: all 1 rows that were read are bad\n  data\[0\]: prompt is empty"):
        read_examples([bad], quarantine=aside)
    assert len(aside.read_text().splitlines()) == 1
    with pytest.raises(DataError, match="data: no rows"):
        read_examples([])


BROKEN: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"", r"a\.jsonl: the file is empty \(0 bytes\)"),
    ("a.jsonl", b"\n \n", r"a\.jsonl: no rows"),
    ("a.json", b"[]", r"a\.json: no rows"),
    ("a.json", b' [\n{"prompt": "a", "chosen": "b"},\n{"prompt": "a"', r"a\.json:3:15: not valid JSON: Expecting ','"),
    ("a.json", b'[{"prompt": "a", "chosen": "b"},\n', r"a\.json:2:1: not valid JSON: the array is cut off after 1"),
    ("a.json", b'[{"prompt": "a", "chosen": "b"}', r"a\.json:1:32: not valid JSON: the array is cut off after 1"),
    ("a.json", b"[1 2]", r"a\.json:1:4: not valid JSON: expected , or \] after"),
    ("a.json", b"[{}]\n[{}]", r"a\.json:2:1: not valid JSON: something follows the array"),
    ("a.json", b"[" * 99_999, r"a\.json:1:2: not valid JSON: maximum recursion"),
    ("a.json", b'"text"', r"a\.json:1: a row must be an object with named columns, found text"),
    ("a.json", b'[\n{"prompt": "\xe9"}]', r"a\.json:2: not UTF-8: byte 0xe9 at byte 14 of the file"),
    ("a.json", b'{"data": [{"a": 1}], "rows": [{"a": 1}]}', r"data and rows are both lists of rows"),
    ("a.jsonl", b'{"a": 1}\n{"prompt": "\xe9"}\n', r"no data format fits its columns: a"),
    ("a.jsonl", b'\n{"prompt": "\xe9"}\n', r"a\.jsonl:2: not UTF-8: byte 0xe9 at byte 13 of the file.*iconv"),
    ("a.jsonl", b'{"prompt": "a", "chos', r"a\.jsonl:1:17: not valid JSON: .* \(the line is cut off\)"),
    ("a.jsonl", b'{"prompt" "a"}', r"a\.jsonl:1:11: not valid JSON: Expecting ':' delimiter$"),
    ("a.jsonl", b'{"a":' * 99_999, r"a\.jsonl:1: not JSON that can be read: maximum recursion"),
    ("a.jsonl", "\ufeff".encode("utf-16-le") + "{}".encode("utf-16-le"), r"this text is UTF-16; expected UTF-8"),
    ("a.jsonl", gzip.compress(b"{}", mtime=0), r"this is a gzip file; rename it to a\.jsonl\.gz"),
    ("a.jsonl.gz", b"{}", r"ends in \.gz, but this is not a gzip file"),
    ("a.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:-12], r"gzip file is damaged or cut off"),
    ("a.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:20] + b"\0" * 30, r"gzip file is damaged or cut off"),
    ("a.parquet", b"PAR1 not really", r"a\.parquet: not a Parquet file, or a damaged one"),
    ("a.csv", b"prompt,chosen,rejected\na,b\n", r"a\.csv:2: 2 cells, but the header has 3 columns"),
    ("a.csv", b"prompt,chosen,rejected\na,b,c,d\n", r"a\.csv:2: 4 cells, but the header has 3 columns"),
    ("a.csv", b'prompt,chosen,rejected\na,b,c\na,"b,c\n', r"a\.csv:3: not valid CSV: .*is a quote missing"),
    ("a.csv", b"prompt,chosen,chosen\na,b,c\n", r"a\.csv:1: the header line is wrong: the column 'chosen' stands there twice"),
    ("a.csv", b"prompt,chosen,\na,b,c\n", r"a\.csv:1: the header line is wrong: a column has no name"),
    ("a.csv", b"prompt,chosen,rejected\na,b,\xe9\n", r"a\.csv:2: not UTF-8: byte 0xe9 at byte 27"),
    ("a.csv", b"prompt,chosen,rejected\n", r"a\.csv: no rows"),
    ("a.csv", b"prompt,responses\na,\"['b', 'c']\"\n", r"a\.csv:2: responses is not JSON.*pandas writes lists this way"),
    ("a.csv", b"prompt,chosen,rejected\na,\"[{'role': 'x'}]\",c\n", r"a\.csv:2: chosen is a list in Python's spelling.*pandas"),
    ("a.txt", b"hello", r"a\.txt: not a data file by its name; expected one that ends in \.json"),
]


@pytest.mark.parametrize(("name", "data", "message"), BROKEN)
def test_broken_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_examples(tmp_path / name)


def test_missing_file_proposes_the_nearest(tmp_path: Path) -> None:
    write_lines(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"pair\.jsonl: no such file or folder; did you mean .*/pairs\.jsonl\?"):
        read_examples(tmp_path / "pair.jsonl")
    with pytest.raises(DataError, match=r"no such file or folder; there: pairs\.jsonl"):
        read_examples(str(tmp_path / "zzz.csv"))
    with pytest.raises(DataError, match=r"the folder .*/no/where does not exist"):
        read_examples(tmp_path / "no" / "where" / "x.csv")
    with pytest.raises(DataError, match=r"a file has no splits"):
        read_examples(f"{tmp_path}/pairs.jsonl:train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PAIRS[0], "data is one object, expected a list of rows"),
        ("", "data is an empty text, expected a file"),
        ("x" * 5000, "x: cannot be read: File name too long"),
        (b"a.json", "data is bytes, expected a path"),
        (["a.json", PAIRS[0]], r"data\[1\] is dict, where others are paths"),
        ([[1]], r"data\[0\]: a row must be an object with named columns, found a list"),
    ],
)
def test_what_is_not_data(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(source)


def test_a_column_can_be_left_out() -> None:
    rows = [RANKED[0] | {"ranks": [1, 2, 3]}]
    with pytest.raises(DataError, match=r"both scores and ranks are given; fields\.ranks=- leaves"):
        read_examples(rows)
    data = read_examples(rows, fields={"ranks": "-"})
    assert content(data) == content(read_examples(RANKED[:1]))
    assert data.notes == ["data: 1 row read as prompt_responses (columns prompt, responses, scores; not used: ranks)"]


def test_accepted_oddities(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIRS[0]).encode() + b"\r\n\r\n" + json.dumps(PAIRS[1]).encode())
    assert content(read_examples(path)) == content(read_examples(PAIRS[:2]))
    array = tmp_path / "a.json"
    array.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIRS).encode())
    assert content(read_examples(array)) == content(read_examples(PAIRS))
    table = tmp_path / "a.csv"
    table.write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\r\n\r\np,a,b\r\n")
    assert content(read_examples(table)) == content(read_examples([{"prompt": "p", "chosen": "a", "rejected": "b"}]))
    wrapped = tmp_path / "w.json"
    wrapped.write_text(json.dumps({"version": 1, "data": PAIRS}))
    assert content(read_examples(wrapped)) == content(read_examples(PAIRS))
    assert read_examples(wrapped).examples[3].source == f"{wrapped}:data[3]"
    wrapped.write_text(json.dumps(PAIRS[0], indent=2))
    assert read_examples(wrapped).n_read == 1


def test_text_that_looks_like_json_stays_text_in_csv(tmp_path: Path) -> None:
    row = {"prompt": '["a", "b"]', "chosen": '{"answer": 1}', "rejected": "[1, 2"}
    data = read_examples(write_csv(tmp_path / "a.csv", [row]))
    assert data.examples[0].prompt == row["prompt"]
    assert data.examples[0].responses == (row["chosen"], row["rejected"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json"])
def test_long_text(tmp_path: Path, name: str) -> None:
    row = {"prompt": "p", "chosen": "word " * 200_000, "rejected": "é" * 100_000}
    data = read_examples(WRITERS[name](tmp_path / name, [row]))
    assert data.examples[0].responses == (row["chosen"], row["rejected"])


def test_ids(tmp_path: Path) -> None:
    rows = [{"id": 7, **PAIRS[0]}, {"id": "7", **PAIRS[0]}, PAIRS[1], PAIRS[1], PAIRS[1], {"id": "", **PAIRS[2]}]
    data = read_examples(rows)
    named = [e.id for e in read_examples(PAIRS).examples]
    assert [e.id for e in data.examples] == ["7", "7#2", named[1], f"{named[1]}#2", f"{named[1]}#3", named[2]]
    assert data.notes[-1].startswith("3 rows repeat the prompt and responses of an earlier one; kept")
    clash = [{"id": "7", **PAIRS[0]}, {"id": "7", **PAIRS[1]}]
    with pytest.raises(DataError, match=r"data\[1\]: the id '7' stands for another prompt .* at data\[0\].*fields\.id=-"):
        read_examples(clash)
    assert [e.id for e in read_examples(clash, fields={"id": "-"}).examples] == named[:2]
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    assert [e.id for e in read_examples([path, path]).examples] == named + [f"{n}#2" for n in named]


def test_max_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    data = read_examples(path, max_rows=3)
    assert content(data) == content(read_examples(PAIRS[:3]))
    assert (data.n_read, data.notes[0]) == (3, f"{path}: stopped after 3 rows, as asked")
    assert read_examples(path, max_rows=5).notes == read_examples(path).notes


KINDS: dict[str, Callable[[int], bytes]] = {
    "good": lambda i: json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}).encode(),
    "empty": lambda i: json.dumps({"prompt": f"p{i}", "chosen": "", "rejected": "b"}).encode(),
    "same": lambda i: json.dumps({"prompt": f"p{i}", "chosen": "b", "rejected": "b"}).encode(),
    "column": lambda i: json.dumps({"prompt": f"p{i}", "chosen": "a"}).encode(),
    "number": lambda i: json.dumps({"prompt": i, "chosen": "a", "rejected": "b"}).encode(),
    "half": lambda i: json.dumps({"prompt": f"p{i}\udc00", "chosen": "a", "rejected": "b"}).encode(),
    "bytes": lambda i: b'{"prompt": "\xff"}',
    "cut": lambda i: b'{"prompt": "p',
    "list": lambda i: b"[1, 2]" if i else b"null",  # at the start it would be a file that is an array
    "blank": lambda i: b"  ",
}


@given(st.lists(st.sampled_from(sorted(KINDS)), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_counts_add_up(tmp_path: Path, kinds: list[str]) -> None:
    path, aside = tmp_path / "mix.jsonl", tmp_path / "aside.jsonl"
    kinds = ["good", *kinds, "good"]
    path.write_bytes(b"\n".join(KINDS[k](i) for i, k in enumerate(kinds)))
    data = read_examples(path, quarantine=aside)
    assert data.n_read == sum(k != "blank" for k in kinds)
    assert [e.source for e in data.examples] == [f"{path}:{i}" for i, k in enumerate(kinds, 1) if k == "good"]
    assert adds_up(data)
    places = [json.loads(line)["source"] for line in aside.read_text().splitlines()]
    assert [int(p.removeprefix(f"{path}:").split(":")[0]) for p in places] == [
        i for i, k in enumerate(kinds, 1) if k not in ("good", "blank")
    ]
    if data.n_quarantined:
        with pytest.raises(DataError, match=f"^{data.n_quarantined} of {data.n_read} rows cannot be used"):
            read_examples(path)


@pytest.mark.parametrize("order", [1, -1])
def test_ids_do_not_depend_on_order_or_container(tmp_path: Path, order: int) -> None:
    data = read_examples(write_parquet(tmp_path / "a.parquet", PAIRS[::order]))
    assert {e.prompt: e.id for e in data.examples} == {e.prompt: e.id for e in read_examples(PAIRS).examples}
    assert read_examples([PAIRS[0]]).examples[0].id == "313948d1865badce"  # ids outlive a release


def test_jsonl_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(500):  # the first 100 are held to detect the format
            file.write(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b", "unused": "x" * 20_000}) + "\n")
    tracemalloc.start()
    data = read_examples(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.n_read == 500
    assert peak < 5e6 < path.stat().st_size


def test_rows_that_repeat_each_other_cost_no_more_than_others() -> None:
    """A bound that only a search through all former repetitions would miss: half a billion look-ups."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    started = time.process_time()
    data = read_examples([row, row | {"id": f"{read_examples([row]).examples[0].id}#3"}, *[row] * 30_000])
    assert time.process_time() - started < 30
    numbers = [int(e.id.partition("#")[2] or 1) for e in data.examples]
    assert numbers == [1, 3, 2, *range(4, 30_003)]
