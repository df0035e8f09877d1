from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, byte_level

from preftune.data import tokens as module
from preftune.data.template import Renderer, build_trees
from preftune.data.tokens import Kept, Report, Tokenized, tokenization_identity
from preftune.data.types import Branch, Example, Message, Pair, Tree
from preftune.errors import StorageError


def turns(*said: str) -> tuple[Message, ...]:
    return tuple(Message("user" if i % 2 else "assistant", text) for i, text in enumerate(said))


QUESTION = (Message("user", "What is two and two? " * 3),)
EXAMPLES = [
    Example("a", QUESTION, ("Four.", "Five, I think. " * 9), pairs=(Pair(0, 1),), source="f:1"),
    Example("b", "Plain text, as it is:", (" yes", " no <|im_end|> no"), pairs=(Pair(1, 0, 0.8),), source="f:2"),
    Example("c", (Message("user", "x" * 300), Message("user", "And now?")), ("Ünïcode 🙂",), labels=(True,)),
    Example(
        "d", (Message("user", "Hi"),), ((Message("assistant", "One."), Message("user", "?"), Message("assistant", "Two.")),)
    ),
    Example("e", QUESTION, ("s" * 200 + "a", "s" * 200 + "b"), pairs=(Pair(0, 1),), source="f:5"),  # the same once cut
    Example("f", QUESTION, ("Three.", "Four.", "Five."), scores=(1.0, 3.0, 2.0)),
]


def renderer(max_length: int = 90) -> Renderer:
    made = byte_level(special=("<|im_start|>", "<|im_end|>", "<|end|>"), eos="<|im_end|>", pad="<|end|>", template=CHATML)
    return Renderer(made, max_length=max_length)


def same(a: list[Tree], b: list[Tree]) -> bool:
    def flat(tree: Tree) -> Any:
        parts = [(b.ids.tolist(), b.scored.tolist(), str(b.ids.dtype), str(b.scored.dtype)) for b in tree.branches]
        return tree.id, tree.prompt.tolist(), str(tree.prompt.dtype), parts, tree.pairs, tree.labels, tree.scores

    return [flat(t) for t in a] == [flat(t) for t in b]


def built(examples: list[Example], kept: Kept | None) -> tuple[list[Tree], Report, int]:
    """Trees, the report, and how many examples were tokenized for it."""
    made, n = renderer(), 0
    tokenized = made.tokenized

    def counted(some: Any) -> Any:
        nonlocal n
        n += len(some)
        return tokenized(some)

    made.tokenized = counted  # type: ignore[method-assign]
    return build_trees(examples, made, kept=kept), made.report, n


def test_kept_tokens_are_the_tokens_and_so_is_the_account(tmp_path: Path) -> None:
    expected, report, _ = built(EXAMPLES, None)
    assert report.prompts_truncated and report.responses_truncated and report.special_in_text and report.text_prompts
    assert [reason for source, reason in report.dropped if source == "f:5"] == [
        "both responses of a pair are the same once they are cut to batch.max_length"
    ]
    for n_tokenized in (len(EXAMPLES), 0):
        trees, again, n = built(EXAMPLES, Kept(tmp_path, "x"))
        assert same(trees, expected) and again == report and n == n_tokenized


def test_ids_preferences_order_and_split_do_not_matter(tmp_path: Path) -> None:
    built(EXAMPLES, Kept(tmp_path, "x"))
    others = [dataclasses.replace(e, id=f"{e.id}2", pairs=(), split="eval", source="g") for e in reversed(EXAMPLES)]
    trees, _, n = built(others, Kept(tmp_path, "x"))
    assert n == 0 and same(trees, built(others, None)[0]) and "e2" in [t.id for t in trees], "without a pair it can be used"


def test_only_what_is_new_is_tokenized(tmp_path: Path) -> None:
    built(EXAMPLES[:3], Kept(tmp_path, "x"))
    changed = dataclasses.replace(EXAMPLES[0], responses=("Four!", EXAMPLES[0].responses[1]))
    trees, _, n = built([*EXAMPLES, changed], Kept(tmp_path, "x"))
    assert n == 4 and same(trees, built([*EXAMPLES, changed], None)[0])
    assert built(EXAMPLES, Kept(tmp_path, "y"))[2] == len(EXAMPLES), "another tokenizer, limit or template"


def test_dropped_examples_are_tried_again(tmp_path: Path) -> None:
    refused = Example("r", QUESTION, ("",), source="f:9")
    long = Example(
        "l", (Message("user", "Hi"),), ((Message("assistant", "a"), Message("user", "u" * 99), Message("assistant", "b")),)
    )
    for _ in range(2):
        trees, report, n = built([EXAMPLES[0], refused, long], Kept(tmp_path, "x"))
        assert report.n_examples == 3 == len(trees) + len(report.dropped)


def test_damaged_tokens_are_made_again(tmp_path: Path) -> None:
    built(EXAMPLES, Kept(tmp_path, "x"))
    (file,) = (tmp_path / "tokens" / "x").iterdir()
    whole = file.read_bytes()
    at = whole.index(built(EXAMPLES, None)[0][0].prompt.tobytes())
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    trees, _, n = built(EXAMPLES, Kept(tmp_path, "x"))
    assert n == len(EXAMPLES) and same(trees, built(EXAMPLES, None)[0])


def test_a_folder_that_takes_no_files_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(keys: Any, values: Any) -> None:
        raise StorageError("the disk is full")

    kept = Kept(tmp_path, "x")
    monkeypatch.setattr(kept._store, "add", full)
    assert same(built(EXAMPLES, kept)[0], built(EXAMPLES, None)[0])
    assert kept.problem == "the disk is full; tokens are not kept for the next run"


def test_an_interrupted_pass_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.data.template.CHUNK", 2)

    def stop(done: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_trees(EXAMPLES, renderer(), kept=Kept(tmp_path, "x"), on_progress=stop)
    told: list[int] = []
    trees = build_trees(EXAMPLES, renderer(), kept=Kept(tmp_path, "x"), on_progress=told.append)
    assert told == [6] and same(trees, built(EXAMPLES, None)[0])


def test_what_tokens_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, code = tmp_path / "base", tmp_path / "code"
    renderer().tokenizer.save_pretrained(folder)
    shutil.copytree(Path(module.__file__).parent, code)
    monkeypatch.setattr(module, "__file__", str(code / "tokens.py"))
    found = [tokenization_identity(folder, 512, "template")]
    (folder / "model.safetensors").write_bytes(b"weights")
    assert tokenization_identity(folder, 512, "template") == found[0], "the weights are no part of it"
    found += [tokenization_identity(folder, 511, "template"), tokenization_identity(folder, 512, "other")]
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    found.append(tokenization_identity(folder, 512, "template"))
    (code / "codec.py").write_text("# other code")
    found.append(tokenization_identity(folder, 512, "template"))
    monkeypatch.setattr(module, "version", lambda library: "99")
    found.append(tokenization_identity(folder, 512, "template"))
    assert len(set(found)) == 6


@given(
    st.lists(st.integers(0, 2**31 - 1), max_size=5),
    st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=5), max_size=4),
    st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 9), st.booleans(), st.booleans()),
)
def test_a_record_holds_any_tokens(prompt: list[int], parts: Any, done: Any) -> None:
    branches = tuple(Branch(np.array([i for i, _ in b], np.int32), np.array([s for _, s in b], np.bool_)) for b in parts)
    made = Tokenized(np.array(prompt, np.int32), branches, *done)
    again = module._of_record(module._record(made))
    assert again[2:] == made[2:] and again.prompt.tolist() == prompt
    assert [(b.ids.tolist(), b.scored.tolist()) for b in again.branches] == [
        (b.ids.tolist(), b.scored.tolist()) for b in branches
    ]
