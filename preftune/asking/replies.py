"""Replies that were paid for, in one SQLite file: the same question to the same model is never asked twice.

    >>> with Replies(cache_folder() / "replies.sqlite") as replies:
    ...     for index, answer in ask(server, requests, replies=replies, keep=readable, ledger=Ledger()): ...

A reply is on the disk before the next one is looked at (WAL), so a killed process loses at most what was still under way.
Several processes may share the file.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from preftune.asking.records import Answer, Asker, Failed, Ledger, Request
from preftune.errors import StorageError
from preftune.files import make_folder

_TABLES = """
CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, model TEXT NOT NULL, place TEXT NOT NULL, answer TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_FULL = "not asked: the next request could go beyond --max-cost"


class Replies:
    """The file of replies. Raises StorageError where it is no such file or cannot be written."""

    def __init__(self, path: Path) -> None:
        """Opens the file, and makes it and its folder if need be."""
        self.path = path
        make_folder(path.parent)
        try:
            self._file = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.executescript(_TABLES)
            secret = (secrets.token_hex(16),)
            self._file.execute("INSERT OR IGNORE INTO settings VALUES ('secret', ?)", secret)
            [[self.secret]] = self._file.execute("SELECT value FROM settings WHERE name='secret'").fetchall()
        except sqlite3.Error as error:
            raise self._broken(error) from None

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def get(self, key: str) -> Answer | None:
        """The reply of that name, or None."""
        try:
            found = self._file.execute("SELECT answer FROM replies WHERE key=?", (key,)).fetchone()
            return None if found is None else Answer(**json.loads(found[0]))._replace(seconds=0.0)
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise self._broken(error) from None

    def put(self, key: str, request: Request, place: str, answer: Answer) -> None:
        """Keeps a reply; it is on the disk when this returns."""
        text = json.dumps(answer._asdict(), ensure_ascii=True)
        try:
            self._file.execute("INSERT OR REPLACE INTO replies VALUES (?,?,?,?)", (key, request.model, place, text))
        except sqlite3.Error as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> StorageError:
        return StorageError(f"{self.path}: cannot be used as the file of replies: {error}; name another one with --cache")


def ask(
    asker: Asker,
    requests: Sequence[Request],
    *,
    replies: Replies,
    ledger: Ledger,
    keep: Callable[[int, Answer], bool] = lambda index, answer: True,
    max_cost: float | None = None,
) -> Iterator[tuple[int, Answer | Failed]]:
    """(index of the request, its answer) as they come, those that are remembered first. Equal requests are asked once.

    keep:      which answers to remember; one that could not be read is not, and is asked again next time.
    max_cost:  no request is sent that could bring the cost above it, at the worst (`Request.most_tokens`) for those under way.
    """
    places: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        places.setdefault(request.key(asker.place), []).append(index)
    missing: dict[Request, str] = {}
    for key, indices in places.items():
        known = replies.get(key)
        if known is None:
            missing[requests[indices[0]]] = key
            continue
        for index in indices:
            yield index, known
        ledger.count(requests[indices[0]], known, remembered=True)
    sending = _Sending(list(missing), ledger, max_cost)
    for request, answer in asker.answers(sending.take):
        key = missing[request]
        sending.back(request)
        _book(request, answer, ledger)
        if isinstance(answer, Answer) and keep(places[key][0], answer):
            replies.put(key, request, asker.place, answer)
        for index in places[key]:
            yield index, answer
    for request in sending.left:
        for index in places[missing[request]]:
            yield index, Failed(_FULL, asked=False)


def _book(request: Request, answer: Answer | Failed, ledger: Ledger) -> None:
    if isinstance(answer, Failed):
        ledger.n_failed += 1
    else:
        ledger.count(request, answer, remembered=False)


class _Sending:
    """The requests that may be sent, one after the other, as long as the money lasts."""

    def __init__(self, requests: Sequence[Request], ledger: Ledger, max_cost: float | None) -> None:
        self.left = list(requests)
        self.left.reverse()  # taken from the end
        self._ledger, self._max_cost = ledger, max_cost
        self._under_way = 0.0

    def take(self) -> Request | None:
        """The next request; None where there is none, or where it has to wait for what those under way really cost."""
        if not self.left:
            return None
        most = self._most(self.left[-1])
        if self._max_cost is not None and self._ledger.cost + self._under_way + most > self._max_cost:
            return None
        self._under_way += most
        return self.left.pop()

    def back(self, request: Request) -> None:
        """A request that was sent has come to its end."""
        self._under_way -= self._most(request)

    def _most(self, request: Request) -> float:
        return self._ledger.price(*request.most_tokens)
