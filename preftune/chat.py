"""Talking to a model in a terminal: the conversation so far, and answers that come token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.data.template import Renderer
from preftune.data.types import Message
from preftune.errors import DataError
from preftune.generate import Sampling, stream
from preftune.model.device import pick_device
from preftune.model.load import load_model, open_renderer, quiet_transformers, resolve


@dataclass
class Conversation:
    """A model, its template and the messages so far. A model without a chat template continues plain text."""

    model: Any
    renderer: Renderer
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        path: str | Path,
        sampling: Sampling,
        *,
        system: str | None = None,
        template: str | None = None,
        device: str = "auto",
    ) -> Conversation:
        """A conversation with the model of a run, a folder or a hub id. Raises ModelError, ConfigError."""
        quiet_transformers()
        renderer = open_renderer(path, template=template)
        model = load_model(resolve(path)).to(pick_device(device)).eval()
        conversation = cls(model, renderer, sampling, system)
        conversation.restart()
        return conversation

    def restart(self) -> None:
        """Forgets what was said."""
        self.messages = [Message("system", self.system)] if self.system else []

    def answer(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece; when it is whole it becomes part of the conversation. Raises DataError."""
        if not text.strip():
            raise DataError("the prompt is empty: there is nothing to answer")
        chatting = self.renderer.chat_template is not None
        asked = Message("user", text)
        prompt = self.renderer.prompt_ids((*self.messages, asked) if chatting else text)
        pieces = []
        for piece in stream(self.model, prompt, self.sampling, stop_ids=self.renderer.stop_ids, decode=self.renderer.decode):
            pieces.append(piece)
            yield piece
        self.messages += [asked, Message("assistant", "".join(pieces))]  # not one that was broken off
