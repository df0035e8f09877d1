"""An OpenAI-compatible server: chat completions, several at a time, tried again where that can help.

    >>> with Server("http://127.0.0.1:8000/v1", concurrency=8) as server:
    ...     for request, answer in server.answers(lambda: requests.pop() if requests else None): ...

The key comes from OPENAI_API_KEY in the environment and from nowhere else; it is sent to the named address alone and cut out of
everything that comes back. Without that variable a placeholder is sent, which local servers accept.

Too many requests (429), failures of the server (5xx) and broken connections are tried again after the time that the server
names (Retry-After), else after twice as long as the last time; while one waits for a 429, all do. Of what a server may not know
(a JSON schema, log-probs, max_tokens by its older name) it is told no more once it has refused it. What no repetition can mend
(a wrong key, an unknown model or address, no credit) ends everything with a ServerError.
"""

from __future__ import annotations

import email.utils
import json
import os
import queue
import random
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from preftune.asking.records import Answer, Failed, Request, Take
from preftune.errors import ConfigError, ServerError

KEY_VARIABLE = "OPENAI_API_KEY"
_FATAL = {
    401: "the key was refused",
    403: "the key may not do this",
    404: "there is no such address or model",
    402: "no credit",
}
_AGAIN = {408, 409, 425, 429}
_DISPENSABLE = {"response_format": ("response_format",), "logprobs": ("logprobs", "top_logprobs")}  # the text is read then
_FIRST_PAUSE = 0.5  # seconds
_LOST_IN_A_ROW = 5  # requests that end without any reply, after which the server counts as gone


class Server:
    """Answers requests by an OpenAI-compatible server.

    place:        the address, as it is part of what is remembered.
    retries:      how often one request is tried again.
    longest_wait: seconds; a server that asks for a longer pause is not waited for, the request fails with that reason.
    """

    def __init__(
        self, base_url: str, *, concurrency: int = 8, retries: int = 6, longest_wait: float = 60.0, timeout: float = 120.0
    ) -> None:
        """`timeout`: seconds without a sign of the server. Raises ConfigError for an address that cannot be used."""
        self.place = checked_address(base_url)
        self.has_template = True
        if concurrency < 1 or retries < 0:
            raise ConfigError(f"concurrency={concurrency}, retries={retries}: expected at least 1 and at least 0")
        self.concurrency, self.retries, self.longest_wait = concurrency, retries, longest_wait
        self.n_tried_again = 0
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self._timeout = timeout
        self._client: Any = None  # openai's, which takes half a second to import: opened for the first request
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._not_before = 0.0  # monotonic seconds: a 429 holds everybody back
        self._lost = 0
        self._refused: set[str] = set()  # parameters that this server does not take, found out as it says so

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections; what is under way fails."""
        self._stop.set()
        if self._client is not None:
            self._client.close()

    def answers(self, take: Take) -> Iterator[tuple[Request, Answer | Failed]]:
        """Each request with its answer as they come. Raises ServerError; what is under way then is given up.

        Raises ConfigError where the package that asks is not installed.
        """
        self._stop.clear()
        came: queue.Queue[tuple[Request, Answer | Failed | BaseException]] = queue.Queue()
        n_running = 0
        try:
            while True:
                while n_running < self.concurrency and (request := take()) is not None:
                    self._client = self._client or _client(self.place, self._key or "none", self._timeout)
                    # daemons: when the user interrupts, nobody waits for replies that are still under way
                    threading.Thread(target=self._run, args=(request, came), daemon=True).start()
                    n_running += 1
                if not n_running:
                    return
                request, answer = came.get()
                n_running -= 1
                if isinstance(answer, BaseException):
                    raise answer
                yield request, answer
        finally:
            self._stop.set()

    def _run(self, request: Request, came: queue.Queue[tuple[Request, Answer | Failed | BaseException]]) -> None:
        try:
            came.put((request, self._ask(request)))
        except BaseException as error:  # raised again where the answers are read
            came.put((request, error))

    def _ask(self, request: Request) -> Answer | Failed:
        """One answer, after as many tries as it takes. Raises ServerError."""
        reason = "interrupted"
        for attempt in range(self.retries + 1):
            self._pause(self._not_before - time.monotonic())
            if self._stop.is_set():
                return Failed("interrupted")
            began = time.perf_counter()
            try:
                answer = self._read(self._client.chat.completions.create(**self._parameters(request)), began)
                self._lost = 0
                return answer
            except Exception as error:
                reason, pause = self._judge(error, attempt)
            if pause is None:
                return Failed(reason)
            if attempt < self.retries:
                self.n_tried_again += 1
                self._pause(pause)
        if reason.startswith("no reply"):
            self._count_lost(reason)
        return Failed(f"{reason}, {self.retries + 1} times" if self.retries else reason)

    def _judge(self, error: Exception, attempt: int) -> tuple[str, float | None]:
        """What went wrong, and the seconds until it may be tried again; None where that is useless. Raises ServerError."""
        import openai

        backoff = min(self.longest_wait, _FIRST_PAUSE * 2**attempt * (1 + random.random() / 4))
        if isinstance(error, openai.APIStatusError):
            return self._judge_status(error, backoff)
        if isinstance(error, openai.APITimeoutError):
            return "no reply in time", backoff
        if isinstance(error, openai.APIConnectionError):
            return f"no reply ({_first_line(error.__cause__ or error)})", backoff
        if isinstance(error, (openai.APIResponseValidationError, json.JSONDecodeError, UnicodeDecodeError, _Malformed)):
            return f"the reply is damaged ({self._clean(_first_line(error))})", backoff
        raise error

    def _judge_status(self, error: Any, backoff: float) -> tuple[str, float | None]:
        told = error.body.get("message") if isinstance(error.body, dict) else None
        status, said = error.status_code, self._clean(told if isinstance(told, str) else _first_line(error))
        broke = status == 429 and "insufficient_quota" in said
        if status in _FATAL or broke:
            what = "no credit" if broke else _FATAL[status]
            hint = "" if self._key else f"; {KEY_VARIABLE} is not set"
            raise ServerError(f"{self.place}: {what} (HTTP {status}{hint}): {said}")
        if status in (400, 422) and (name := self._unknown(said)):
            self._refused.add(name)
            return f"HTTP {status}: {said}", 0.0
        if status not in _AGAIN and status < 500:
            return f"HTTP {status}: {said}", None
        pause = _retry_after(error.response.headers)
        if pause is not None and pause > self.longest_wait:
            return f"HTTP {status}: the server asks to wait {pause:.0f} s, longer than {self.longest_wait:g} s", None
        pause = backoff if pause is None else pause
        if status == 429:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + pause)
        return f"HTTP {status}", pause

    def _unknown(self, said: str) -> str:
        """The parameter that the server complains of and that can be done without; "" for none."""
        if "max_completion_tokens" in said:
            return "" if "max_tokens" in self._refused else "max_tokens"
        return next((name for name in _DISPENSABLE if name in said and name not in self._refused), "")

    def _parameters(self, request: Request) -> dict[str, Any]:
        sent = _parameters(request)
        if "max_tokens" in self._refused:
            sent["max_completion_tokens"] = sent.pop("max_tokens")
        for name in self._refused & _DISPENSABLE.keys():
            for part in _DISPENSABLE[name]:
                sent.pop(part, None)
        return sent

    def _count_lost(self, reason: str) -> None:
        with self._lock:
            self._lost += 1
            if self._lost >= _LOST_IN_A_ROW:
                raise ServerError(f"{self.place}: does not answer: {reason}. Is the server running? What was answered is kept")

    def _read(self, completion: Any, began: float) -> Answer:
        """The answer in a completion. Raises _Malformed where there is none."""
        try:
            choice = completion.choices[0]
            text = choice.message.content or ""
            usage = completion.usage
        except (AttributeError, IndexError, TypeError):
            raise _Malformed("no choices in it") from None
        if not isinstance(text, str):
            raise _Malformed("its content is no text")
        return Answer(
            self._without_key(text),
            str(choice.finish_reason or ""),
            _first_token(choice),
            None if usage is None else usage.prompt_tokens,
            None if usage is None else usage.completion_tokens,
            time.perf_counter() - began,
        )

    def _pause(self, seconds: float) -> None:
        if seconds > 0:
            self._stop.wait(seconds)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text

    def _clean(self, text: str) -> str:
        """What a server says, fit for a terminal: one short line, no control characters, no key."""
        return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", self._without_key(text))[:300]


class _Malformed(Exception):
    """HTTP says that all is well, but it is no chat completion."""


def checked_address(base_url: str) -> str:
    """The address without a slash at its end. Raises ConfigError."""
    try:
        parts = urlsplit(base_url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname
    except ValueError:
        parts, bad = urlsplit(""), True
    if parts.username or parts.password:
        raise ConfigError(f"--base-url: a name or password stands in the address; the key comes from {KEY_VARIABLE} alone")
    if bad:
        raise ConfigError(f"--base-url: {base_url!r} is no address, expected such as http://127.0.0.1:8000/v1")
    return base_url.rstrip("/")


def _client(base_url: str, key: str, timeout: float) -> Any:
    try:
        import openai
    except ImportError:
        raise ConfigError(
            "a server is asked through the package openai, which is missing: pip install 'preftune[judge]'"
        ) from None
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout)


def _parameters(request: Request) -> dict[str, Any]:
    """What is sent. Settings at the value that every server assumes are left out: some refuse what they do not know."""
    sent: dict[str, Any] = {
        "model": request.model,
        "messages": [{"role": m.role, "content": m.content} for m in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    if request.top_p < 1:
        sent["top_p"] = request.top_p
    if request.seed is not None:
        sent["seed"] = request.seed
    if request.stop:
        sent["stop"] = list(request.stop)
    if request.top_logprobs:
        sent |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.schema:
        described = {"name": "verdict", "strict": True, "schema": json.loads(request.schema)}
        sent["response_format"] = {"type": "json_schema", "json_schema": described}
    if request.min_p:
        sent["extra_body"] = {"min_p": request.min_p}
    return sent


def _first_token(choice: Any) -> dict[str, float] | None:
    """The likeliest first tokens with their log-probs; None where the server gave none."""
    content = getattr(getattr(choice, "logprobs", None), "content", None)
    if not content:
        return None
    first = content[0]
    return {first.token: first.logprob} | {top.token: top.logprob for top in first.top_logprobs or ()}


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait, given as seconds or as a date; None where it does not."""
    said = headers.get("retry-after")
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = (email.utils.parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
