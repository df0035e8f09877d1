"""A chat endpoint that replays recorded replies and knows nothing else; it can be told to misbehave.

A tape is a JSON line per prompt: `key`, the sha256 of the messages as compact JSON [[role, content], …]; `choice`, what was
returned; `usage` where it is known. A prompt that was never recorded gets a 400: an error in rendering shows at once.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = Callable[[list[dict[str, str]]], str | dict[str, Any] | None]
FAULTS = ("429", "429-date", "500", "drop", "slow", "cut", "empty", "garbage")


def key_of(messages: Sequence[Mapping[str, str]]) -> str:
    content = [[m["role"], m["content"]] for m in messages]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def tape(path: Path) -> dict[str, dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {row["key"]: row for row in map(json.loads, file)}


@dataclass
class TapeServer:
    """What it serves, how it misbehaves, and what it saw.

    faults:  number of the request (from 0) -> one of FAULTS; the request is then not answered properly.
    change:  is given each choice and may change it (no log-probs, cut off, …).
    delay:   seconds before each reply.
    refuses: parameter -> what the 400 says that a request with it gets.
    """

    recorded: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    reply: Reply | None = None
    faults: Mapping[int, str] = field(default_factory=dict)
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda choice: choice
    delay: float = 0.0
    refuses: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
    n_requests: int = 0
    served: Counter[str] = field(default_factory=Counter)  # prompts that were answered properly
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    times: list[float] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any]) -> dict[str, Any] | None:
        key = key_of(body["messages"])
        row = self.recorded.get(key)
        if row is None and self.reply is not None:
            said = self.reply(body["messages"])
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop", "logprobs": None}
            row = said if isinstance(said, dict) else {"choice": choice} if said is not None else None
        if row is None:
            return None
        choice = self.change(json.loads(json.dumps(row["choice"])))
        usage = {"usage": row["usage"]} if row.get("usage") else {}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, **choice}], **usage}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    state: TapeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.state.lock:
            fault = self.state.faults.get(self.state.n_requests)
            self.state.n_requests += 1
            self.state.at_once += 1
            self.state.most_at_once = max(self.state.most_at_once, self.state.at_once)
            self.state.headers.append({k.lower(): v for k, v in self.headers.items()})
            self.state.bodies.append(body)
            self.state.times.append(time.monotonic())
        try:
            self._serve(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.state.lock:
                self.state.at_once -= 1

    def _serve(self, body: dict[str, Any], fault: str | None) -> None:
        time.sleep(1.0 if fault == "slow" else self.state.delay)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "429":
            self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.3"})
        elif fault == "429-date":
            from email.utils import formatdate

            self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": formatdate(time.time() + 1, usegmt=True)})
        elif fault and fault.isdigit():
            said = f"no: {self.headers.get('authorization', '')} \x1b[31m"
            self._send(int(fault), {"error": {"message": said}}, {})
        elif fault == "garbage":
            self._raw(200, b"<html>busy</html>", {})
        else:
            self._proper(body, fault)

    def _proper(self, body: dict[str, Any], fault: str | None) -> None:
        for name, said in self.state.refuses.items():
            if name in body:
                return self._send(400, {"error": {"message": said}}, {})
        found = {"choices": []} if fault == "empty" else self.state.answer(body)
        if found is None:
            return self._send(400, {"error": {"message": f"a prompt that was never recorded: {key_of(body['messages'])}"}}, {})
        if fault not in ("cut", "empty"):
            with self.state.lock:
                self.state.served[key_of(body["messages"])] += 1
        return self._raw(200, json.dumps(found).encode(), {}, cut=fault == "cut")

    def _send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        self._raw(status, json.dumps(content).encode(), headers)

    def _raw(self, status: int, data: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(state: TapeServer) -> Iterator[TapeServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
