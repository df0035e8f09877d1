"""What tokenization makes of one example, the account of it over all examples, and how it is kept for the next run.

Tokens are kept by the text that they stand for (prompt and responses), in a folder that is named by everything else that they
depend on: the tokenizer's files, the template, the limit of length, the versions of the libraries, and the code that tokenizes.
Ids, preferences, labels, order and split are no part of either, so another seed, objective or order of rows finds them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.data.store import Store
from preftune.data.types import Branch, Example, Tree, content_digest
from preftune.errors import DataError, StorageError, listing

_SHARD = 4096  # examples in one file of the store
_FIXED = 7  # numbers at the start of a record
_CODE = ("template", "codec", "chat", "truncate", "tokens")


class Tokenized(NamedTuple):
    """An example's prompt and responses as ids within the limit, and what had to be done for it."""

    prompt: NDArray[np.int32]
    branches: tuple[Branch, ...]
    prompt_truncated: bool
    responses_truncated: int
    boundary_merges: int
    text_prompt: bool
    special_in_text: bool

    def tree(self, example: Example) -> Tree:
        """The Tree of the example. Raises DataError where cutting left the two sides of a pair the same."""
        if self.responses_truncated:
            for pair in example.pairs:
                if np.array_equal(self.branches[pair.winner].ids, self.branches[pair.loser].ids):
                    raise DataError("both responses of a pair are the same once they are cut to batch.max_length")
        return Tree(example.id, self.prompt, self.branches, example.pairs, example.labels, example.scores)


@dataclass
class Report:
    """What tokenization did to the examples. `n_examples == n_trees + len(dropped)`.

    prompts_truncated:    examples whose prompt lost its oldest part.
    responses_truncated:  responses that lost their tail, end of turn included.
    dropped:              (source, reason) of examples that gave no tree.
    boundary_merges:      replies tokenized alone, since their first token would merge with the prompt's last.
    text_prompts:         examples with a text prompt, although there is a chat template: it is not applied to them.
    special_in_text:      examples with the text of a special token written in them, which then is that token.
    longest:              tokens of the longest prompt + response.
    """

    n_examples: int = 0
    n_trees: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    dropped: list[tuple[str, str]] = field(default_factory=list)
    boundary_merges: int = 0
    text_prompts: int = 0
    special_in_text: int = 0
    longest: int = 0

    def count(self, example: Example, made: Tokenized | str) -> Tree | None:
        """The example's tree; None where there is only a reason to drop it."""
        self.n_examples += 1
        try:
            if isinstance(made, str):
                raise DataError(made)
            tree = made.tree(example)
        except DataError as reason:
            self.dropped.append((example.source or example.id, str(reason)))
            return None
        self.n_trees += 1
        self.prompts_truncated += made.prompt_truncated
        self.responses_truncated += made.responses_truncated
        self.boundary_merges += made.boundary_merges
        self.text_prompts += made.text_prompt
        self.special_in_text += made.special_in_text
        self.longest = max(self.longest, len(made.prompt) + max(len(b.ids) for b in made.branches))
        return tree

    def lines(self) -> list[str]:
        """What happened, as sentences for the log; no sentence about what did not happen."""
        said = [f"{self.n_trees} of {self.n_examples} examples tokenized; the longest takes {self.longest} tokens"]
        counts = {
            "prompts lost their oldest part, to fit batch.max_length": self.prompts_truncated,
            "responses lost their tail, too long for batch.max_length by themselves": self.responses_truncated,
            "replies were tokenized apart from a prompt whose last token they would change": self.boundary_merges,
            "examples have a text prompt, which stays as it is: the chat template is for messages": self.text_prompts,
            "examples contain the text of a special token, which the model reads as that token": self.special_in_text,
        }
        said += [f"{count} {what}" for what, count in counts.items() if count]
        if self.dropped:
            reasons = [f"{source}: {reason}" for source, reason in self.dropped]
            said.append(f"{len(self.dropped)} examples dropped:\n{listing(reasons)}")
        return said


class Kept:
    """Tokens of former runs, and those of this one for the next. Examples that are dropped are not kept.

    problem:  why nothing more can be written, or "": tokens are a convenience, and a cache that is read-only stops no run.
    """

    def __init__(self, cache: Path, identity: str) -> None:
        """Opens CACHE/tokens/<identity>; `identity` is what `tokenization_identity` says."""
        self._store = Store(cache / "tokens" / identity)
        self._fresh: list[tuple[Example, Tokenized]] = []
        self.problem = ""

    def known(self, examples: Sequence[Example]) -> Iterator[Tokenized | None]:
        """For each example its tokens, if they are kept."""
        for start in range(0, len(examples), _SHARD):
            for record in self._store.get([_key(e) for e in examples[start : start + _SHARD]]):
                yield None if record is None else _of_record(record)

    def add(self, example: Example, made: Tokenized | str) -> None:
        """Keeps the tokens of one example, on disk once there are enough for a file."""
        if not isinstance(made, str) and not self.problem:
            self._fresh.append((example, made))
        if len(self._fresh) >= _SHARD:
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet."""
        fresh, self._fresh = self._fresh, []
        try:
            self._store.add([_key(e) for e, _ in fresh], [_record(made) for _, made in fresh])
        except StorageError as error:
            self.problem = f"{error}; tokens are not kept for the next run"


def tokenization_identity(folder: Path, *settings: object) -> str:
    """Names all that tokens depend on besides the text: the tokenizer in `folder`, the settings, the versions, the code."""
    digest = hashlib.blake2b(repr(settings).encode(errors="surrogatepass"), digest_size=16)
    for library in ("tokenizers", "transformers"):
        digest.update(f"{library} {version(library)};".encode())
    patterns = ("*.json", "*.model", "*.txt", "*.jinja")
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    for file in [*files, *(Path(__file__).with_name(f"{name}.py") for name in _CODE)]:
        data = file.read_bytes()
        digest.update(f"{file.name}:{len(data)}:".encode() + data)
    return digest.hexdigest()


def _key(example: Example) -> bytes:
    return content_digest((example.prompt, example.responses), size=16)


def _record(made: Tokenized) -> NDArray[np.int32]:
    """[n] what was done, lengths of prompt and branches, and all ids; an id that is not scored is kept as its complement."""
    done = (made.prompt_truncated, made.responses_truncated, made.boundary_merges, made.text_prompt, made.special_in_text)
    sizes = (len(made.prompt), len(made.branches), *(len(b.ids) for b in made.branches))
    ids = (np.where(b.scored, b.ids, ~b.ids) for b in made.branches)
    return np.concatenate([np.array([*done, *sizes], np.int32), made.prompt, *ids])


def _of_record(record: NDArray[np.int32]) -> Tokenized:
    cut, n_cut, merges, text, special, n_prompt, n_branches = record[:_FIXED].tolist()
    at = _FIXED + n_branches
    prompt, at = record[at : at + n_prompt], at + n_prompt
    branches = []
    for n in record[_FIXED : _FIXED + n_branches].tolist():
        ids, at = record[at : at + n], at + n
        scored = ids >= 0
        branches.append(Branch(ids if scored.all() else np.where(scored, ids, ~ids), scored))
    return Tokenized(prompt, tuple(branches), bool(cut), n_cut, merges, bool(text), bool(special))
