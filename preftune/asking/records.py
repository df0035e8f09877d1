"""What is asked and what comes back, whoever answers.

>>> request = Request("judge-1", (Message("user", "Yes or no?"),), max_tokens=1, top_logprobs=5)
>>> [(_, answer)] = server.answers(iter([request, None]).__next__)
>>> answer.text, answer.first_token["Yes"]
('Yes', -0.02)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from preftune.data.types import Message

CHOSEN = "choice"
"""`Answer.finish` of a local model that wrote nothing: its choices were scored, and the text is the likeliest of them."""


@dataclass(frozen=True, slots=True)
class Request:
    """One chat completion.

    model:         as the server calls it.
    messages:      with their roles; a role is never read out of a text.
    temperature:   0 takes the likeliest token.
    top_p, min_p:  as in `generate.Sampling`; min_p is sent only where it is not 0, since not every server knows it.
    max_tokens:    longest reply, in tokens.
    seed:          None: none is sent.
    stop:          texts that end the reply.
    top_logprobs:  log-probs of that many likeliest first tokens are asked for; 0: none.
    choices:       the replies that count where the first token decides; a local model scores just these.
    schema:        JSON schema that the reply should follow, as text; "" for none.
    sample:        which of several replies to the same question; part of what is remembered, not of what is sent.
    """

    model: str
    messages: tuple[Message, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    choices: tuple[str, ...] = ()
    schema: str = ""
    sample: int = 0

    def key(self, place: str) -> str:
        """Names the request to the server at `place`: 64 hex digits of everything that the reply may depend on."""
        content = {"place": place, **asdict(self)}
        return hashlib.sha256(json.dumps(content, ensure_ascii=True, sort_keys=True).encode()).hexdigest()

    @property
    def n_characters(self) -> int:
        """Length of all messages."""
        return sum(len(m.content) for m in self.messages)

    @property
    def most_tokens(self) -> tuple[int, int]:
        """Upper bounds on the tokens read and written: a token holds a byte or more, and a message costs a few for its role."""
        return sum(len(m.content.encode()) + 16 for m in self.messages) + 16, self.max_tokens


class Answer(NamedTuple):
    """What the model replied."""

    text: str
    finish: str = "stop"  # "stop": by itself; "length": cut at max_tokens; CHOSEN; or what else the server says
    first_token: Mapping[str, float] | None = None  # token -> log-prob in nats, the likeliest; None where none were given
    tokens_in: int | None = None  # None where the server did not count
    tokens_out: int | None = None
    seconds: float = 0.0  # how long it took; 0 where it was remembered


class Failed(NamedTuple):
    """Why there is no answer to a request."""

    reason: str
    asked: bool = True  # False: it was never sent, since the money would not last


Take = Callable[[], Request | None]
"""Gives the next request to send; None: there is none for now, ask again when an answer has come."""


@runtime_checkable
class Asker(Protocol):
    """Whoever answers: a server, or a model on this machine."""

    place: str  # the server's address or the model's identity: the same request elsewhere is another one
    has_template: bool  # whether it reads messages; else a single message is a text to be continued

    def answers(self, take: Take) -> Iterator[tuple[Request, Answer | Failed]]:
        """Each request with its answer, in the order in which they come; `take` is called as there is room for more."""
        ...


@dataclass
class Ledger:
    """What asking cost. Prices are in the user's currency for a million tokens; 0 where none was given.

    n_requests:       answers that came in now.
    n_remembered:     answers that were known from before, and cost nothing now.
    n_failed:         requests without an answer.
    tokens_in, _out:  of the answers that came in now, as the server counted them.
    all_tokens_in, _out:  of all answers that were used, remembered ones included.
    n_uncounted:      answers without a count of tokens, which are booked as the most that they can have had, a byte each.
    """

    price_in: float = 0.0
    price_out: float = 0.0
    n_requests: int = 0
    n_remembered: int = 0
    n_failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    all_tokens_in: int = 0
    all_tokens_out: int = 0
    n_uncounted: int = 0

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """What that many tokens cost."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    @property
    def cost(self) -> float:
        """What was spent now."""
        return self.price(self.tokens_in, self.tokens_out)

    def count(self, request: Request, answer: Answer, *, remembered: bool) -> None:
        """Books one answer."""
        known = answer.tokens_in is not None and answer.tokens_out is not None
        most_in, most_out = request.most_tokens
        written_most = min(most_out, len(answer.text.encode()) + 1)
        read, written = (answer.tokens_in or 0, answer.tokens_out or 0) if known else (most_in, written_most)
        self.n_uncounted += not known
        self.all_tokens_in += read
        self.all_tokens_out += written
        if remembered:
            self.n_remembered += 1
            return
        self.n_requests += 1
        self.tokens_in += read
        self.tokens_out += written

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        total = self.price(self.all_tokens_in, self.all_tokens_out)
        return asdict(self) | {"cost": self.cost, "cost_of_all_answers": total}

    def lines(self) -> list[str]:
        """For a terminal."""
        said = (
            f"{self.n_requests} requests, {self.n_remembered} remembered, {self.n_failed} failed; "
            f"{self.tokens_in:,} tokens read, {self.tokens_out:,} written"
        )
        found = [said + (f", at a cost of {self.cost:.4f}" if self.price_in or self.price_out else "")]
        if self.n_uncounted:
            found.append(
                f"{self.n_uncounted} answers came without a count of tokens and are booked at the most they can have had"
            )
        return found
