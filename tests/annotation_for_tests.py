"""A real annotation server in a process of its own, and what talks to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from worlds import command, finish, spawn

TOKEN = "a-token-for-tests"


class Annotation:
    """`preftune annotate` on a free port."""

    def __init__(self, data: Path, db: Path, *words: str, port: int = 0) -> None:
        self.data, self.db, self.words, self.port = data, db, words, port
        self.people: list[Person] = []
        self._log = db.with_name(f"{db.stem}-said.txt")
        self.start()

    def start(self) -> None:
        """Starts it, on the same port as before if there was one."""
        words = ["annotate", str(self.data), "--db", str(self.db), "--port", str(self.port), "--token", TOKEN, *self.words]
        self._log.touch()
        self._before = len(self._log.read_text())
        self.process = spawn(command, words, str(self._log))
        until(lambda: "Ctrl-C ends" in self.said or self.process.exitcode is not None, 60)
        assert self.said.startswith("http") or ": http" in self.said.partition("\n")[0], self.said
        self.port = int(self.said.split("//")[1].split("/")[0].rsplit(":", 1)[1])

    @property
    def said(self) -> str:
        """What it has printed since it was started last."""
        return self._log.read_text()[self._before :]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.join()

    def stop(self) -> int:
        """As Ctrl-C would; the exit status."""
        os.kill(self.process.pid, signal.SIGINT)
        return finish(self.process, timeout=20)[0]

    def stranger(self, cookie: str = "") -> Person:
        """Somebody with this cookie, who has not signed in."""
        self.people.append(Person(self.port, cookie))
        return self.people[-1]

    def person(self, name: str, token: str = TOKEN) -> Person:
        """Somebody who has signed in."""
        someone = self.stranger()
        status, body, headers = someone.ask("POST", "/api/enter", {"name": name, "token": token})
        assert status == 200, body
        someone.cookie = headers["set-cookie"].split(";")[0]
        return someone

    def __enter__(self) -> Annotation:
        return self

    def __exit__(self, *args: object) -> None:
        for someone in self.people:
            someone.connection.close()
        self.kill()


class Person:
    """One client with its cookie, over one connection."""

    def __init__(self, port: int, cookie: str = "") -> None:
        self.cookie, self.port = cookie, port
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def ask(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, the body (JSON where it is), and the headers in lower case."""
        sent = {"Content-Type": "application/json", "Cookie": self.cookie}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        self.connection.request(method, path, content, sent)
        answer = self.connection.getresponse()
        text = answer.read().decode()
        kind = answer.headers.get("content-type", "")
        return (
            answer.status,
            json.loads(text) if kind == "application/json" else text,
            {k.lower(): v for k, v in answer.headers.items()},
        )

    def next(self, tab: str = "1") -> Any:
        return self.ask("POST", "/api/next", {"tab": tab})[1]

    def judge(self, item: int, choice: str, key: str, tab: str = "1", **more: Any) -> Any:
        given = {"item": item, "choice": choice, "key": key, "tab": tab, "seconds": 1.5, **more}
        return self.ask("POST", "/api/judge", given)[1]


def write_pairs(path: Path, n: int, **first: str) -> Path:
    """`n` pairs; the first one with texts of the caller's."""
    rows = [{"prompt": f"question {i}", "chosen": f"a good answer {i}", "rejected": f"a poor answer {i}"} for i in range(n)]
    rows[0] |= first
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def until(true: Any, seconds: float = 10.0) -> None:
    """Waits for what another process does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
