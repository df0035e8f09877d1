r"""Tokenization: an Example (text or messages) becomes a Tree (token ids), exactly as inference will see it.

    >>> renderer = Renderer(tokenizer, max_length=1024)
    >>> trees = build_trees(examples, renderer)
    >>> print("\n".join(renderer.describe() + renderer.report.lines()))
    >>> print(renderer.show(trees[0]))          # what is scored stands in ⟦ ⟧

A prompt is tokenized alone, since that is what the model is given. A reply is what the whole text adds to those tokens; where
tokens would merge across the boundary, it is the reply's text tokenized alone. It ends with exactly one end of turn, scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.data.chat import CHOICES, Segment, choose
from preftune.data.codec import Codec, Tokenizer, special_pattern
from preftune.data.tokens import Kept, Report, Tokenized
from preftune.data.truncate import shorten
from preftune.data.types import Branch, Example, Message, Prompt, Response, Tree
from preftune.errors import ConfigError, DataError, ModelError, listing

CHUNK = 256
"""Examples whose texts are tokenized in one call."""


class _Plan(NamedTuple):
    """An example as text: the prompt, and each response as segments that continue it."""

    prompt: str
    branches: list[list[Segment]]
    chat: bool

    def texts(self) -> Iterator[str]:
        """Every text whose tokens are needed: the prompt, and the prompt continued up to the end of each segment."""
        yield self.prompt
        for segments in self.branches:
            text = self.prompt
            for segment in segments:
                text += segment.text
                yield text

    def merging(self, known: dict[str, list[int]]) -> Iterator[str]:
        """The first segment of each branch whose tokens would change the prompt's."""
        prompt = known[self.prompt]
        for segments in self.branches:
            if known[self.prompt + segments[0].text][: len(prompt)] != prompt:
                yield segments[0].text


class _Encoded(NamedTuple):
    """An example as ids."""

    prompt: list[int]
    branches: list[tuple[list[int], list[bool]]]  # ids, scored
    merges: int

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(len(ids) for ids, _ in self.branches)


class Renderer:
    """Turns Examples into Trees with one tokenizer, one template and one limit.

    chat_template:  Jinja text that was used, to be saved with the model; None where there is none (text prompts only).
    end_of_turn:    id of the token that ends a reply to messages.
    end_of_text:    id of the token that ends a reply to a text prompt: EOS (where there is none, `end_of_turn`).
    stop_ids:       every id that ends a generated reply.
    report:         counts over all examples seen; put a fresh `Report()` there to start anew.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, template: str | None = None, max_length: int, stop_ids: Sequence[int] = ()
    ) -> None:
        """Chooses and probes the template.

        template:    "chatml", "plain", the path of a Jinja file, or None for the tokenizer's own.
        max_length:  most tokens of prompt + response.
        stop_ids:    ids that end generation besides (those of generation_config.json).

        Raises ConfigError for a template that does not exist, ModelError for one that cannot be used, and where neither the
        template nor the tokenizer has a token that could end a reply.
        """
        if max_length < 2:
            raise ConfigError(f"batch.max_length: {max_length} leaves no room for a prompt and a response; expected 2 or more")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.report = Report()
        self._chat = choose(tokenizer, template)
        self._special = special_pattern(tokenizer)
        self._codec = Codec(tokenizer)
        eos: int | None = tokenizer.eos_token_id
        turn = self._chat.end_of_turn if self._chat and self._chat.end_of_turn is not None else eos
        if turn is None:
            raise ModelError(
                "no token could end a reply: the tokenizer has no EOS token"
                + (f" and {self._chat.name} writes none after a reply" if self._chat else "")
                + '; name one as "eos_token" in tokenizer_config.json'
            )
        self.end_of_turn = turn
        self.end_of_text = turn if eos is None else eos
        self.stop_ids = frozenset({self.end_of_turn, self.end_of_text, *stop_ids})
        ends = [tokenizer.convert_ids_to_tokens(i) for i in (self.end_of_turn, self.end_of_text)]
        self._ends = tuple(dict.fromkeys(ends))

    @property
    def chat_template(self) -> str | None:
        """The Jinja text in use; None where there is none."""
        return self._chat.source if self._chat else None

    def describe(self) -> list[str]:
        """Which template and which control tokens are in use, as sentences for the log."""
        if self._chat is None:
            return [f"no chat template: prompts must be text; a reply ends with {self._ends[-1]!r}"]
        said = [f"messages are rendered by {self._chat.name}; a reply ends with {self._ends[0]!r} ({self.end_of_turn})"]
        if self._chat.end_of_turn is None:
            said.append("the template writes no special token after a reply: EOS is appended to the last one")
        if self._chat.opens.strip():
            said.append(f"the prompt ends with {self._chat.opens!r}, as at inference: a reply continues from there")
        if self._codec.bos is not None and self._codec.bos in self._codec.lead:
            ids = self.prompt_ids((Message("user", "Hello"),))
            if self._codec.bos not in ids:
                said.append("the tokenizer puts a BOS before plain text and the template writes none: messages have no BOS")
        return said

    def prompt_ids(self, prompt: Prompt) -> NDArray[np.int32]:
        """[P] ids that inference feeds for this prompt, not truncated. Raises DataError where the template refuses it."""
        plan = self._plan(prompt, ())
        return np.asarray(self._codec.ids([plan.prompt], chat=plan.chat)[0], dtype=np.int32)

    def tree(self, example: Example) -> Tree | None:
        """The example as ids within `max_length`; None where it is dropped (`report.dropped` says why)."""
        return self.trees([example])[0]

    def trees(self, examples: Sequence[Example]) -> list[Tree | None]:
        """`tree` of each example, tokenized in one call."""
        return [self.report.count(e, made) for e, made in zip(examples, self.tokenized(examples), strict=True)]

    def tokenized(self, examples: Sequence[Example]) -> list[Tokenized | str]:
        """What becomes of each example's text, tokenized in one call: its ids, or the reason to drop it. Not counted yet."""
        plans: list[_Plan | str] = []
        for example in examples:
            try:
                plans.append(self._plan(*_continued(example)))
            except DataError as reason:
                plans.append(str(reason))
        encoded = iter(self._encode([p for p in plans if isinstance(p, _Plan)]))
        found: list[Tokenized | str] = []
        for example, plan in zip(examples, plans, strict=True):
            try:
                found.append(plan if isinstance(plan, str) else self._within(example, plan, next(encoded)))
            except DataError as reason:
                found.append(str(reason))
        return found

    def decode(self, ids: Iterable[int] | NDArray[np.int32]) -> str:
        """Text of a reply, without special tokens."""
        return self._codec.text(list(map(int, ids)), skip_special_tokens=True)

    def pieces(self, prompt: NDArray[np.int32], reply: NDArray[np.int32]) -> list[str]:
        """The text that each token of a reply adds, control tokens too; "" for one that only begins a character."""
        found: list[str] = []
        for piece, n_tokens in self._added(prompt.tolist(), reply.tolist()):
            found += [""] * (n_tokens - 1) + [piece]
        return found

    def render(self, item: Example | Tree) -> str:
        """The item with its scored tokens marked, or why it is dropped."""
        if isinstance(item, Tree):
            return self.show(item)
        kept, self.report = self.report, Report()
        try:
            tree = self.tree(item)
            return self.show(tree) if tree else f"dropped: {self.report.dropped[0][1]}"
        finally:
            self.report = kept

    def show(self, tree: Tree) -> str:
        """The prompt as the model reads it, then each response token by token; a scored token stands in ⟦ ⟧."""
        prompt = tree.prompt.tolist()
        blocks = [f"prompt, {len(prompt)} tokens:\n{self._codec.text(prompt)}"]
        for number, branch in enumerate(tree.branches, start=1):
            marked = "".join(f"⟦{piece}⟧" if scored else piece for piece, scored in self._pieces(prompt, branch))
            blocks.append(f"response {number}, {len(branch.ids)} tokens, {int(branch.scored.sum())} scored:\n{marked}")
        return "\n\n".join(blocks)

    # From an example to text

    def _plan(self, prompt: Prompt, responses: Sequence[Response]) -> _Plan:
        if isinstance(prompt, str):
            if not all(isinstance(r, str) for r in responses):
                raise DataError("the prompt is text and a response is messages: give both as messages, or both as text")
            return _Plan(prompt, [[Segment(self._unended(str(r)), True)] for r in responses], chat=False)
        if self._chat is None:
            raise ConfigError(f"the data are messages, and this tokenizer has no chat template: choose {CHOICES}")
        opened = self._chat.render(prompt, reply_follows=True)
        return _Plan(opened, [self._chat.segments(prompt, opened, self._turns(r)) for r in responses], chat=True)

    def _turns(self, response: Response) -> tuple[Message, ...]:
        turns = (Message("assistant", response),) if isinstance(response, str) else response
        return tuple(Message(t.role, self._unended(t.content)) if t.role == "assistant" else t for t in turns)

    def _unended(self, text: str) -> str:
        """`text` without end-of-turn tokens written out at its end: exactly one is added later."""
        while text.rstrip().endswith(self._ends):
            text = text.rstrip()
            text = next(text.removesuffix(end) for end in self._ends if text.endswith(end))
        return text

    # From text to ids

    def _encode(self, plans: Sequence[_Plan]) -> list[_Encoded]:
        known: dict[bool, dict[str, list[int]]] = {}
        for chat in (False, True):
            texts = list(dict.fromkeys(text for plan in plans if plan.chat is chat for text in plan.texts()))
            known[chat] = dict(zip(texts, self._codec.ids(texts, chat=chat), strict=True))
        apart = self._codec.alone([text for plan in plans for text in plan.merging(known[plan.chat])])
        return [self._assembled(plan, known[plan.chat], apart) for plan in plans]

    def _assembled(self, plan: _Plan, known: dict[str, list[int]], apart: dict[str, list[int]]) -> _Encoded:
        prompt = known[plan.prompt]
        end = self.end_of_turn if plan.chat else self.end_of_text
        branches, merges = [], 0
        for segments in plan.branches:
            ids, scored, text = list(prompt), [False] * len(prompt), plan.prompt
            for segment in segments:
                text += segment.text
                whole = known[text]
                canonical = whole[: len(ids)] == ids
                new = whole[len(ids) :] if canonical else self._codec.continuing(ids, segment.text, whole, apart)
                merges += not canonical
                ids += new
                scored += [segment.scored] * len(new)
            while len(ids) > len(prompt) and ids[-1] == end:
                del ids[-1], scored[-1]
            branches.append(([*ids[len(prompt) :], end], [*scored[len(prompt) :], True]))
        return _Encoded(prompt, branches, merges)

    # Within the limit

    def _within(self, example: Example, plan: _Plan, encoded: _Encoded) -> Tokenized:
        prompt, responses = _continued(example)
        if not encoded.prompt:
            raise DataError("the prompt has no token: it is empty, and the tokenizer adds no BOS")
        whole = encoded
        if len(encoded.prompt) + encoded.longest > self.max_length:
            encoded = self._shortened(prompt, responses, encoded)
        branches, n_cut = self._cut(encoded)
        return Tokenized(
            prompt=np.asarray(encoded.prompt, dtype=np.int32),
            branches=tuple(Branch(np.asarray(i, dtype=np.int32), np.asarray(s, dtype=np.bool_)) for i, s in branches),
            prompt_truncated=encoded.prompt != whole.prompt,
            responses_truncated=n_cut,
            boundary_merges=encoded.merges,
            text_prompt=self._chat is not None and not plan.chat,
            special_in_text=self._has_special(prompt, responses),
        )

    def _shortened(self, prompt: Prompt, responses: tuple[Response, ...], encoded: _Encoded) -> _Encoded:
        """With the oldest part of the prompt gone, so that the longest response fits.

        Where it does not fit whatever goes, it will lose its tail anyway; then the prompt keeps up to half of `max_length`.
        """
        if isinstance(prompt, str):
            return self._shortened_text(encoded)
        room = self.max_length - encoded.longest

        def fits(messages: tuple[Message, ...]) -> bool:
            return len(self.prompt_ids(messages)) <= room

        def encode(messages: tuple[Message, ...]) -> tuple[_Encoded, int]:
            found = self._encode([self._plan(messages, responses)])[0]
            return found, len(found.prompt) + found.longest - self.max_length

        if encode(shorten(prompt, lambda _: False))[1] > 0:
            room = self.max_length // 2
            return encoded if len(encoded.prompt) <= room else encode(shorten(prompt, fits))[0]
        while True:
            shorter, over = encode(shorten(prompt, fits))
            if over <= 0:
                return shorter
            room -= over  # a reply may take more tokens after this prompt than after the whole one

    def _shortened_text(self, encoded: _Encoded) -> _Encoded:
        lead = len(self._codec.lead) or int(encoded.prompt[0] == self._codec.bos)
        room = self.max_length - encoded.longest
        if room <= lead:
            room = self.max_length // 2
        keep = max(room - lead, 1)
        return encoded._replace(prompt=encoded.prompt[:lead] + encoded.prompt[lead:][-keep:])

    def _cut(self, encoded: _Encoded) -> tuple[list[tuple[list[int], list[bool]]], int]:
        """Responses without the tail that does not fit, and how many lost one. Raises DataError where one loses all."""
        room = self.max_length - len(encoded.prompt)
        branches, n_cut = [], 0
        for ids, scored in encoded.branches:
            if len(ids) > room:
                ids, scored, n_cut = ids[: max(room, 0)], scored[: max(room, 0)], n_cut + 1
            if not any(scored):
                raise DataError(
                    f"nothing of a response would be left: the shortest prompt has {len(encoded.prompt)} tokens "
                    f"and batch.max_length is {self.max_length}"
                )
            branches.append((ids, scored))
        return branches, n_cut

    def _has_special(self, prompt: Prompt, responses: tuple[Response, ...]) -> bool:
        if self._special is None:
            return False
        texts = [prompt] if isinstance(prompt, str) else [m.content for m in prompt]
        texts += [turn.content for response in responses for turn in self._turns(response)]
        return any(self._special.search(text) for text in texts)

    # From ids to text

    def _pieces(self, prompt: list[int], branch: Branch) -> Iterator[tuple[str, bool]]:
        """Text that each token of the branch adds, and whether it is scored; tokens that share a character come as one."""
        done = 0
        for piece, n_tokens in self._added(prompt, branch.ids.tolist()):
            done += n_tokens
            yield piece, bool(branch.scored[done - 1])

    def _added(self, prompt: list[int], reply: list[int]) -> Iterator[tuple[str, int]]:
        """Text that is added by one token, or by several that share a character, and how many they are."""
        ids, start, done = prompt + reply, len(prompt) - 1, len(prompt)
        for end in range(len(prompt) + 1, len(ids) + 1):
            text, before = self._codec.text(ids[start:end]), self._codec.text(ids[start:done])
            if text.endswith("\ufffd") and end < len(ids):
                continue
            yield text[len(before) :], end - done
            start, done = done, end


def build_trees(
    examples: Sequence[Example],
    renderer: Renderer,
    *,
    kept: Kept | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Tree]:
    """Trees of all examples that are not dropped, in order; `on_progress` is told how many examples are done.

    kept: tokens of former runs, to which those that it lacks are added.

    Raises DataError where there are examples and every one is dropped.
    """
    made: list[Tokenized | str | None] = [None] * len(examples) if kept is None else list(kept.known(examples))
    todo = [i for i, one in enumerate(made) if one is None]
    try:
        for start in range(0, len(todo), CHUNK):
            part = todo[start : start + CHUNK]
            for i, one in zip(part, renderer.tokenized([examples[i] for i in part]), strict=True):
                made[i] = one
                if kept:
                    kept.add(examples[i], one)
            if on_progress:
                on_progress(len(examples) - len(todo) + start + len(part))
    finally:  # Ctrl-C too keeps what was tokenized
        if kept:
            kept.flush()
    n_dropped = len(renderer.report.dropped)
    counted = (renderer.report.count(e, one) for e, one in zip(examples, made, strict=True) if one is not None)
    trees = [tree for tree in counted if tree is not None]
    if examples and not trees:
        reasons = [f"{source}: {reason}" for source, reason in renderer.report.dropped[n_dropped:]]
        raise DataError(f"no example can be used, all {len(examples)} are dropped:\n{listing(reasons)}")
    return trees


def _continued(example: Example) -> tuple[Prompt, tuple[Response, ...]]:
    """Prompt and responses, where the turns before the assistant's first belong to the prompt."""
    prompt, responses = example.prompt, example.responses
    if isinstance(prompt, str) or len(responses) != 1 or isinstance(responses[0], str):
        return prompt, responses
    turns = responses[0]
    first = next((i for i, t in enumerate(turns) if t.role == "assistant"), 0)
    return prompt + turns[:first], (turns[first:],)
