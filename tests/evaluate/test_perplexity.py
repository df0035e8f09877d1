"""Perplexity against one plain forward after another, and windows against what each token may see."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import World, cli, write_jsonl

from preftune.errors import DataError
from preftune.evaluate.models import Models
from preftune.evaluate.perplexity import perplexity, read_documents, windows

TEXTS = ["the kettle is broken and the lamp too", "ærø 🙂", "a", "please send a new one soon, thank you " * 9]


@given(st.integers(1, 90), st.integers(2, 40), st.data())
def test_every_token_counts_once_and_sees_what_came_before_it(n: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    ids = np.arange(1, n + 1, dtype=np.int32)
    seen: list[int] = []
    for _, part in windows(ids, first=0, window=window, stride=stride):
        (branch,) = part.branches
        read = [*part.prompt.tolist(), *branch.ids.tolist()]
        assert len(read) <= window and read == list(range(read[0], read[0] + len(read)))
        for token in branch.ids[branch.scored].tolist():
            seen.append(token)
            assert token - read[0] >= min(token, window - stride), "as much before it as there is, or window - stride"
    assert seen == ids.tolist()


def by_definition(folder: Path, text: str, window: int, stride: int) -> float:
    """Negative log-prob of a text: each token from one forward of what its window holds before it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    total, done = 0.0, 1
    while done < len(ids):
        end = min(len(ids), window if done == 1 else done + stride)
        with torch.no_grad():
            logps = model(torch.tensor([ids[max(0, end - window) : end]])).logits[0].log_softmax(-1)
        total -= sum(float(logps[at - max(0, end - window) - 1, ids[at]]) for at in range(done, end))
        done = end
    return total


def test_it_is_that_of_the_definition(world: World) -> None:
    models = Models.open(str(world.base), against=str(world.other), budget=100)
    found = perplexity(models, "texts", TEXTS, window=48, stride=16, on_progress=lambda *_: None)
    ours, theirs = ([by_definition(folder, text, 48, 16) for text in TEXTS] for folder in (world.base, world.other))
    lengths = [len(models.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    n, n_bytes = sum(lengths), sum(len(text.encode()) for text in TEXTS)
    assert (found.n_tokens, found.n_documents, found.window, found.stride) == (n, 4, 48, 16)
    assert found.policy == pytest.approx(math.exp(sum(ours) / n), rel=1e-4)
    assert found.reference == pytest.approx(math.exp(sum(theirs) / n), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(sum(ours) / math.log(2) / n_bytes, rel=1e-4)
    assert found.change is not None and found.change.n == 4
    assert found.change.value == pytest.approx((sum(ours) - sum(theirs)) / n, abs=1e-4)
    assert found.change.low < found.change.value < found.change.high


def test_of_one_document_the_windows_give_the_interval(world: World) -> None:
    models = Models.open(str(world.base), against=str(world.base))
    found = perplexity(models, "one", TEXTS[-1:], window=32, stride=16, on_progress=lambda *_: None)
    assert found.change is not None and found.change.n == 9 and found.change[:3] == (0.0, 0.0, 0.0)


def test_documents_are_lines_or_rows_with_text(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("one\n\n  \ntwo\n")
    assert read_documents(plain) == ["one", "two"]
    assert read_documents(write_jsonl(tmp_path / "rows.jsonl", [{"text": "a\nb"}, {"text": ""}])) == ["a\nb"]
    with pytest.raises(DataError, match=r"bad.jsonl:2: no column text"):
        read_documents(write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"words": "b"}]))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name, why in (("empty.txt", "no text"), ("bytes.txt", "not UTF-8"), ("none.txt", "no such file")):
        with pytest.raises(DataError, match=why):
            read_documents(tmp_path / name)


@pytest.mark.parametrize(
    ("window", "stride", "why"),
    [
        ("0", "1", "--window 0"),
        ("8", "0", "--stride 0"),
        ("1", "1", "--window 1"),
        ("9999", "5", "--window"),
        ("8", "8", "--stride 8"),
    ],
)
def test_windows_that_cannot_be_are_refused(world: World, tmp_path: Path, window: int, stride: int, why: str) -> None:
    (tmp_path / "text.txt").write_text("hello")
    words = ["eval", world.base, "--against", world.other, "--data", world.file("held_out"), "--out", tmp_path / "out"]
    left = cli(*words, "--n-prompts", 0, "--perplexity", tmp_path / "text.txt", "--window", window, "--stride", stride)
    assert left.code == 2 and why in left.err
