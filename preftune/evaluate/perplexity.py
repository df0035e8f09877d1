"""Perplexity of a text under a model, and how much worse it is than the reference's: whether general ability was kept.

A file is documents: one a line, or JSONL with `text`. A document longer than the window is read in windows that overlap: each
token is predicted from at least `window - stride` tokens before it (where there are as many), and counts once. A document
begins after BOS, or EOS for a tokenizer without BOS, so its first token counts too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.data.readers import rows_of_file
from preftune.data.types import Branch, Tree
from preftune.engine.score import logps_of_all
from preftune.errors import ConfigError, DataError, listing
from preftune.evaluate.estimate import ratio
from preftune.evaluate.models import Models, Progress
from preftune.evaluate.record import Perplexity

_USUAL_WINDOW = 1024


class Window(NamedTuple):
    """Some tokens of a document: the first is given, those marked are scored."""

    document: int
    tree: Tree


def read_documents(file: Path) -> list[str]:
    """The texts of a file, empty ones left out. Raises DataError that lists every row without a text."""
    if not file.is_file():
        raise DataError(f"--perplexity {file}: no such file; expected text with a document a line, or JSONL with `text`")
    if file.suffix in (".jsonl", ".json", ".parquet", ".gz", ".csv"):
        rows = list(rows_of_file(file))
        bad = [
            f"{r.place}: {r.problem or 'no column text with text in it'}"
            for r in rows
            if r.problem or not isinstance(r.value, dict) or not isinstance(r.value.get("text"), str)
        ]
        if bad:
            raise DataError(f"{len(bad)} of {len(rows)} rows of {file} have no text:\n{listing(bad)}")
        texts = [str(r.value["text"]) for r in rows]
    else:
        try:
            texts = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 at byte {error.start}; expected text with a document a line") from None
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise DataError(f"{file}: no text in it")
    return kept


def windows(ids: NDArray[np.int32], *, first: int, window: int, stride: int, document: int = 0) -> Iterator[Window]:
    """A document in windows of at most `window` tokens, `first` (BOS or EOS) before it; every token is scored once."""
    whole = np.concatenate([np.array([first], np.int32), ids])
    scored_to = 1
    while scored_to < len(whole):
        end = min(len(whole), scored_to + (window - 1 if scored_to == 1 else stride))
        start = max(0, end - window)
        rest = whole[start + 1 : end]
        marked = np.arange(start + 1, end) >= scored_to
        yield Window(document, Tree(f"{document}@{start}", whole[start : start + 1], (Branch(rest, marked),)))
        scored_to = end


def spans(models: Models, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride, in tokens; None: 1024 or the model's context, and half of that. Raises ConfigError."""
    context = models.renderer.max_length
    window = min(context, _USUAL_WINDOW) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= context:
        raise ConfigError(f"--window {window}: expected 2 to {context}, the longest sequence that the model reads here")
    if not 1 <= stride < window:
        raise ConfigError(f"--stride {stride}: expected 1 to {window - 1}, less than the window")
    return window, stride


def perplexity(
    models: Models, name: str, texts: Sequence[str], *, window: int, stride: int, on_progress: Progress
) -> Perplexity:
    """The perplexity of documents under the policy and, where there is one, the reference. Raises DataError."""
    tokenizer = models.renderer.tokenizer
    bos = getattr(tokenizer, "bos_token_id", None)
    first = models.renderer.end_of_text if bos is None else int(bos)
    parts: list[Window] = []
    for k, text in enumerate(texts):
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        parts += windows(ids, first=first, window=window, stride=stride, document=k)
    if not parts:
        raise DataError(f"{name}: its text has no token")
    ours = _nats(models, parts, "policy", on_progress)
    theirs = None if models.against is None else _nats(models, parts, "reference", on_progress)
    return summed(name, texts, parts, ours, theirs, window=window, stride=stride)


def summed(
    name: str,
    texts: Sequence[str],
    parts: Sequence[Window],
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64] | None,
    *,
    window: int,
    stride: int,
) -> Perplexity:
    """The record of [window] negative log-probs, nats, summed over each window's own tokens."""
    counts = np.array([float(w.tree.branches[0].scored.sum()) for w in parts])
    n_tokens, n_bytes = counts.sum(), sum(len(text.encode()) for text in texts)
    change = None
    if theirs is not None:
        # documents are what is independent; of one, its windows have to do
        cluster = [w.document if len(texts) > 1 else k for k, w in enumerate(parts)]
        worse: dict[int, list[float]] = {}
        lengths: dict[int, list[float]] = {}
        for key, difference, n in zip(cluster, (ours - theirs).tolist(), counts.tolist(), strict=True):
            worse.setdefault(key, []).append(difference)
            lengths.setdefault(key, []).append(n)
        change = ratio(list(worse.values()), list(lengths.values()))
    return Perplexity(
        name=name,
        n_tokens=int(n_tokens),
        policy=math.exp(ours.sum() / n_tokens),
        reference=None if theirs is None else math.exp(theirs.sum() / n_tokens),
        change=change,
        n_documents=len(texts),
        bits_per_byte=float(ours.sum() / math.log(2) / n_bytes),
        reference_bits_per_byte=None if theirs is None else float(theirs.sum() / math.log(2) / n_bytes),
        window=window,
        stride=stride,
    )


def _nats(models: Models, parts: Sequence[Window], which: str, on_progress: Progress) -> NDArray[np.float64]:
    """[window] negative log-prob of its own tokens, this rank's share scored here and the others' gathered."""
    trees = [w.tree for w in parts]
    mine = range(models.ranks.rank, len(trees), models.ranks.world)
    scorer = models.policy(trees) if which == "policy" else models.reference(trees)

    def progress(done: int) -> None:
        on_progress(f"perplexity of the {which}", done, len(mine))

    scored = logps_of_all(scorer, [trees[i] for i in mine], models.budget, on_progress=progress)
    nats = [(i, -float(logps[0].astype(np.float64).sum())) for i, logps in zip(mine, scored, strict=True)]
    return np.array([value for _, value in sorted(models.ranks.gather_items(nats))])
