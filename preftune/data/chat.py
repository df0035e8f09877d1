r"""Chat templates: which one is used, and what a probe shows of how it ends a reply.

    >>> chat = choose(tokenizer, "chatml")
    >>> chat.render((Message("user", "Hi"),), reply_follows=True)
    '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    >>> chat.ending, chat.after
    ('<|im_end|>', '\n')

Nothing about a template is known by its name. A reply that no template could invent is put through it, and what stands behind
that reply in the text says which token ends a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from preftune.data.codec import Tokenizer, leading_ids, special_pattern
from preftune.data.types import Message
from preftune.errors import ConfigError, DataError, ModelError

BUILT_IN = ("chatml", "plain")
"""Templates that come with preftune."""

CHOICES = "template=chatml, template=plain (turns as plain text, for base models) or template=FILE (a Jinja file)"

SENTINEL = "preftuneprobereply"


class Segment(NamedTuple):
    """A stretch of a response: what the model writes (scored), or what it is given."""

    text: str
    scored: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and what a probe shows of it.

    source:       the Jinja text, to be saved with the model.
    name:         how messages call it.
    ending:       text between a reply and its end: the end-of-turn token's own text, and what stands before it.
    after:        text that the template writes behind the end of turn; nobody generates it.
    end_of_turn:  id of the special token that ends a reply; None where the template writes none.
    trims:        white space around a reply is removed.
    opens:        text that the prompt for a reply holds beyond the header of a finished one ("<think>"), or "".
    """

    tokenizer: Tokenizer
    source: str
    name: str
    ending: str = ""
    after: str = ""
    end_of_turn: int | None = None
    trims: bool = False
    opens: str = ""

    def render(self, messages: Sequence[Message], *, reply_follows: bool) -> str:
        """The dialogue as text; with the header of the next reply where `reply_follows`. Raises DataError."""
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, chat_template=self.source, tokenize=False, add_generation_prompt=reply_follows
            )
        except Exception as error:  # a template is a program: what it can raise is not known here
            roles = ", ".join(m.role for m in messages) or "no message at all"
            raise DataError(f"{self.name} refuses these turns ({roles}): {error}") from error
        return text

    def finished(self, messages: Sequence[Message]) -> str:
        """The dialogue as text, up to and with the end of its last reply. Raises DataError."""
        text = self.render(messages, reply_follows=False)
        end = "" if self.end_of_turn is None else self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
        return text[: len(text) - len(self.after)] if text.endswith(end + self.after) else text

    def segments(self, prompt: tuple[Message, ...], opened: str, turns: tuple[Message, ...]) -> list[Segment]:
        """The text that continues `opened` (the rendered prompt) up to the end of the last assistant's turn.

        An assistant's turn is one scored segment, its end of turn included; what stands between two of them is one that is not
        scored. Raises DataError where a later turn changes how an earlier one is rendered, so that no one row can hold both.
        """
        if not turns or turns[0].role != "assistant":
            raise DataError("a response in messages must begin with an assistant's turn")
        segments: list[Segment] = []
        text = opened
        for at, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            if at > 0:
                opened = self.render(prompt + turns[:at], reply_follows=True)
            if not opened.startswith(text):
                raise DataError(
                    f"{self.name} renders a turn differently once another follows it, so the turns cannot be scored in one "
                    f"row: split the dialogue into one example per reply, or choose another template"
                )
            if opened != text:
                segments.append(Segment(opened[len(text) :], False))
            reply = self._reply(opened, self.finished(prompt + turns[: at + 1]), turn.content)
            segments.append(Segment(reply, True))
            text = opened + reply
        return segments

    def _reply(self, opened: str, finished: str, content: str) -> str:
        """What the model has to write after `opened`: the template's rendering, or the file's text where that lost some."""
        if finished.startswith(opened):
            rendered = finished[len(opened) :]
            if content.strip() in rendered or "".join(content.split()) in "".join(rendered.split()):
                return rendered
        content = content.strip() if self.trims else content
        opens = self.opens.strip()
        if opens and content.lstrip().startswith(opens):  # the prompt has written this already
            content = content.lstrip().removeprefix(opens).lstrip()
        return content + self.ending


def choose(tokenizer: Tokenizer, template: str | None) -> ChatTemplate | None:
    """The template that the user names, else the tokenizer's own, else None. Raises ConfigError or ModelError."""
    source, name = _source(tokenizer, template)
    if source is None:
        return None
    if template in BUILT_IN and leading_ids(tokenizer) and tokenizer.bos_token:
        source = "{{- bos_token -}}\n" + source  # as this tokenizer does with plain text; the file read back says so too
    if template == "chatml":
        _need_chatml_tokens(tokenizer)
    return _probed(ChatTemplate(tokenizer, source, name))


def _source(tokenizer: Tokenizer, template: str | None) -> tuple[str | None, str]:
    if template is None:
        try:
            return (tokenizer.get_chat_template() if tokenizer.chat_template else None), "the tokenizer's chat template"
        except ValueError:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise ModelError(
                f"this tokenizer has several chat templates ({names}) and none is the default: "
                f"write the one you want to a file and name it with template=FILE"
            ) from None
    if template in BUILT_IN:
        text = (files("preftune.data") / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
        return text, f"the template {template}"
    path = Path(template).expanduser()
    if not path.is_file():
        raise ConfigError(f"template: {template!r} is neither a built-in template nor a file; choose {CHOICES}")
    try:
        return path.read_text(encoding="utf-8"), f"the template {template}"
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"template: {template} cannot be read as UTF-8 text: {error}") from None


def _need_chatml_tokens(tokenizer: Tokenizer) -> None:
    known = {t.content for t in tokenizer.added_tokens_decoder.values()}
    missing = [t for t in ("<|im_start|>", "<|im_end|>") if t not in known]
    if missing:
        raise ModelError(
            f"template=chatml needs the special tokens <|im_start|> and <|im_end|>, and this tokenizer has no "
            f"{' and no '.join(missing)}: choose template=plain, which needs none, or a model that has them"
        )


def _probed(chat: ChatTemplate) -> ChatTemplate:
    user = Message("user", "Hello")
    try:
        opened = chat.render([user], reply_follows=True)
        whole = chat.render([user, Message("assistant", SENTINEL)], reply_follows=False)
        spaced = chat.render([user, Message("assistant", f"  {SENTINEL}  ")], reply_follows=False)
    except DataError as error:
        raise ModelError(f"{chat.name} cannot render a question and its reply: {error}; choose {CHOICES}") from error
    if whole.count(SENTINEL) != 1:
        raise ModelError(f"{chat.name} writes a reply {whole.count(SENTINEL)} times, expected once; choose {CHOICES}")
    header, behind = whole.split(SENTINEL)
    ending, token = _first_token(chat.tokenizer, behind)
    return ChatTemplate(
        chat.tokenizer,
        chat.source,
        chat.name,
        ending=ending,
        after=behind[len(ending) :],
        end_of_turn=token,
        trims=f"  {SENTINEL}  " not in spaced,
        opens=opened[len(header) :] if opened.startswith(header) else "",
    )


def _first_token(tokenizer: Tokenizer, behind: str) -> tuple[str, int | None]:
    """`behind` up to and with its first special token, and that token's id; ("", None) where it has none."""
    special = special_pattern(tokenizer)
    found = special.search(behind) if special else None
    if found is None:
        return "", None
    return behind[: found.end()], int(tokenizer.convert_tokens_to_ids(found.group()))
