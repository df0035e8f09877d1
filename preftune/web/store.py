"""Judgments of people in one SQLite file: who judges what next, what was said, and nothing lost.

    store = Store.open("work.db", examples, overlap=2)
    task = store.next("ada", tab="1")             # a pair that ada has not judged and that still wants judgments
    store.judge("ada", Given(key="…", item=task.item, choice="left", …))
    store.judgments()                             # what `preftune pairs` reads

A judgment is on the disk when `judge` returns (write-ahead log, synchronous), and the same `key` is stored once however often
it is sent. Undo withdraws a judgment; no row is ever deleted or overwritten. Several processes may use the file at once.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from preftune.data.types import Example, Judgment, Strength, Verdict, content_id
from preftune.errors import DataError, StorageError, listing

Choice = Literal["left", "right", "tie", "both_bad", "skip"]
"""What somebody can say of the two answers as they are shown."""
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "both_bad", "skip")
STRENGTHS: tuple[Strength, ...] = ("slight", "clear")

_LEASE = 600.0  # seconds for which a pair that is on somebody's screen is not given to others

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS judgments (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, example TEXT NOT NULL, i INTEGER NOT NULL, j INTEGER NOT NULL,
    content TEXT NOT NULL, annotator TEXT NOT NULL, verdict TEXT NOT NULL, strength TEXT NOT NULL, first INTEGER NOT NULL,
    seconds REAL NOT NULL, at TEXT NOT NULL, why TEXT NOT NULL, withdrawn TEXT
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS once ON judgments (annotator, example, i, j) WHERE withdrawn IS NULL;
CREATE TABLE IF NOT EXISTS sessions (
    digest TEXT PRIMARY KEY, annotator TEXT NOT NULL, owner INTEGER NOT NULL, at TEXT NOT NULL
) STRICT;
"""
_VERSION = "1"


class Task(NamedTuple):
    """A pair on somebody's screen: responses `left` and `right` of `example`."""

    item: int
    example: Example
    left: int
    right: int


class Given(NamedTuple):
    """One judgment as it comes in. `key` is made by whoever sends it: the same one is stored once."""

    key: str
    item: int
    choice: Choice
    strength: Strength
    why: str
    seconds: float


class Progress(NamedTuple):
    """How far one annotator is. `pace` is the median of the last twenty, in seconds; 0 before the first."""

    done: int
    skipped: int
    left: int
    pace: float


class Store:
    """The judgments of one data file. Used from one thread at a time."""

    def __init__(self, db: sqlite3.Connection, file: Path, examples: Sequence[Example], *, overlap: int, seed: int) -> None:
        """See `open`."""
        self.file, self.examples, self.overlap, self.seed = file, examples, overlap, seed
        self.items = [
            (at, i, j) for at, e in enumerate(examples) for i, j in itertools.combinations(range(len(e.responses)), 2)
        ]
        self._number = {(examples[at].id, i, j): n for n, (at, i, j) in enumerate(self.items)}
        self._db = db
        self._orders: dict[str, list[int]] = {}
        self._leases: dict[int, dict[tuple[str, str], float]] = defaultdict(dict)
        self._seen_version = -1
        self._refresh()

    @classmethod
    def open(cls, file: Path, examples: Sequence[Example], *, overlap: int = 1, seed: int = 0) -> Store:
        """Opens or makes the file. `overlap`: how many people judge each pair.

        Raises DataError where no example has two responses, or where the file has judgments on answers that the data has
        otherwise or no more; StorageError where it cannot be used.
        """
        if not any(len(e.responses) > 1 for e in examples):
            raise DataError("nothing to compare: no example has two responses")
        file.parent.mkdir(parents=True, exist_ok=True)
        with _storage(file):
            db = sqlite3.connect(file, isolation_level=None, timeout=10)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")  # what was answered "saved" survives a power cut
            db.executescript(_SCHEMA)
            db.execute("INSERT OR IGNORE INTO meta VALUES ('version', ?)", (_VERSION,))
            ((version,),) = db.execute("SELECT value FROM meta WHERE name = 'version'")
        if version != _VERSION:
            raise StorageError(f"{file}: written by another version of preftune (its format is {version}, this is {_VERSION})")
        return cls(db, file, examples, overlap=overlap, seed=seed)

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    # who judges what

    def next(self, annotator: str, *, tab: str) -> Task | None:
        """What this annotator judges next: the same pair until it is judged, another one in each tab; None when all is done."""
        self._refresh()
        mine, now = self._judged[annotator], time.monotonic()
        for item, holders in list(self._leases.items()):
            if (annotator, tab) in holders and item not in mine:
                return self._lease(item, annotator, tab)
        for item in self._order(annotator):
            if item in mine:
                continue
            held = [who for who, until in self._leases[item].items() if until > now] if item in self._leases else []
            if any(who == annotator for who, _ in held):
                continue  # on another tab of the same person
            if self._count[item] + len(held) < self.overlap:
                return self._lease(item, annotator, tab)
        return None

    def task(self, item: int, annotator: str) -> Task:
        """A pair as this annotator sees it: which answer is on the left was drawn once, and stays."""
        at, i, j = self.items[item]
        left, right = (j, i) if self._draw("side", annotator, item) % 2 else (i, j)
        return Task(item, self.examples[at], left, right)

    def _lease(self, item: int, annotator: str, tab: str) -> Task:
        self._leases[item][annotator, tab] = time.monotonic() + _LEASE
        return self.task(item, annotator)

    def _release(self, item: int, annotator: str) -> None:
        kept = {who: until for who, until in self._leases.pop(item, {}).items() if who[0] != annotator}
        if kept:
            self._leases[item] = kept

    def _order(self, annotator: str) -> list[int]:
        """Each annotator goes through the pairs in an order of their own, so that few people cover many pairs."""
        if annotator not in self._orders:
            drawn = np.random.Generator(np.random.Philox(key=self._draw("order", annotator)))
            self._orders[annotator] = drawn.permutation(len(self.items)).tolist()
        return self._orders[annotator]

    def _draw(self, *of: object) -> int:
        return int.from_bytes(hashlib.blake2b(repr((self.seed, *of)).encode(), digest_size=8).digest(), "big")

    # what was said

    def judge(self, annotator: str, given: Given) -> bool:
        """Stores a judgment; True once it is there. False where this annotator has judged the pair already (in another tab)."""
        task = self.task(given.item, annotator)
        _, i, j = self.items[given.item]
        chosen = {"left": task.left, "right": task.right}.get(given.choice)
        verdict = given.choice if chosen is None else "i" if chosen == i else "j"
        row = (
            given.key, task.example.id, i, j, _content(task.example, i, j), annotator, verdict, given.strength, task.left,
            given.seconds, _utc(), given.why,
        )  # fmt: skip
        try:
            with _storage(self.file):
                self._db.execute(
                    "INSERT INTO judgments (key, example, i, j, content, annotator, verdict, strength, first, seconds, at, why)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
        except sqlite3.IntegrityError:
            same = self._db.execute(
                "SELECT 1 FROM judgments WHERE key = ? AND annotator = ?", (given.key, annotator)
            ).fetchone()
            self._release(given.item, annotator)
            return same is not None
        self._note(given.item, annotator, verdict, 1)
        self._release(given.item, annotator)
        return True

    def undo(self, annotator: str, *, tab: str) -> Task | None:
        """Withdraws this annotator's last judgment and gives its pair again; None where there is none."""
        self._refresh()
        for number, example, i, j, verdict in self._db.execute(
            "SELECT id, example, i, j, verdict FROM judgments WHERE annotator = ? AND withdrawn IS NULL ORDER BY id DESC",
            (annotator,),
        ):
            if (item := self._number.get((example, i, j))) is None:
                continue
            with _storage(self.file):
                self._db.execute("UPDATE judgments SET withdrawn = ? WHERE id = ?", (_utc(), number))
            self._note(item, annotator, verdict, -1)
            for holders in self._leases.values():
                holders.pop((annotator, tab), None)
            return self._lease(item, annotator, tab)
        return None

    def progress(self, annotator: str) -> Progress:
        """Counts of this annotator, and their pace."""
        self._refresh()
        skipped = self._skipped[annotator]
        mine = self._judged[annotator]
        left = sum(1 for item in range(len(self.items)) if item not in mine and self._count[item] < self.overlap)
        rows = self._db.execute(
            "SELECT seconds FROM judgments WHERE annotator = ? AND withdrawn IS NULL ORDER BY id DESC LIMIT 20", (annotator,)
        )
        seconds = [s for (s,) in rows]
        return Progress(len(mine) - skipped, skipped, left, statistics.median(seconds) if seconds else 0.0)

    def judgments(self) -> list[Judgment]:
        """All judgments that stand, in the order in which they came. Skipped pairs are none."""
        rows = self._db.execute(
            "SELECT example, i, j, verdict, annotator, first, seconds, at, why, strength FROM judgments"
            " WHERE withdrawn IS NULL AND verdict != 'skip' ORDER BY id"
        )
        return [_judgment(row) for row in rows]

    # who is signed in

    def sign_in(self, digest: str, annotator: str, *, owner: bool) -> None:
        """Remembers a session by the digest of its secret, so that a restart of the server signs nobody out."""
        with _storage(self.file):
            self._db.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?)", (digest, annotator, int(owner), _utc()))

    def signed_in(self, digest: str) -> tuple[str, bool] | None:
        """The annotator of a session, and whether they own the file."""
        row = self._db.execute("SELECT annotator, owner FROM sessions WHERE digest = ?", (digest,)).fetchone()
        return (row[0], bool(row[1])) if row else None

    def use_token(self, digest: str) -> None:
        """Remembers the digest of a token that somebody chose. Another one than before signs everybody out."""
        row = self._db.execute("SELECT value FROM meta WHERE name = 'token'").fetchone()
        if row is None or row[0] != digest:
            with _storage(self.file):
                self._db.execute("DELETE FROM sessions")
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('token', ?)", (digest,))

    # what is known in memory

    def _refresh(self) -> None:
        """Reads the counts again where another process has written to the file."""
        ((version,),) = self._db.execute("PRAGMA data_version")
        if version == self._seen_version:
            return
        self._seen_version = version
        self._count = np.zeros(len(self.items), np.int64).tolist()
        self._judged: dict[str, set[int]] = defaultdict(set)
        self._skipped: dict[str, int] = defaultdict(int)
        strangers = []
        for example, i, j, content, annotator, verdict in self._db.execute(
            "SELECT example, i, j, content, annotator, verdict FROM judgments WHERE withdrawn IS NULL"
        ):
            item = self._number.get((example, i, j))
            if item is None or _content(self.examples[self.items[item][0]], i, j) != content:
                strangers.append(f"example {example!r}, responses {i} and {j}, by {annotator!r}")
                continue
            self._note(item, annotator, verdict, 1)
        if strangers:
            raise DataError(
                f"{self.file}: {len(strangers)} judgments are on answers that this data does not have, or has otherwise; "
                f"give the data that they were made on, or another --db:\n{listing(strangers)}"
            )

    def _note(self, item: int, annotator: str, verdict: str, by: int) -> None:
        if by > 0:
            self._judged[annotator].add(item)
        else:
            self._judged[annotator].discard(item)
        if verdict == "skip":
            self._skipped[annotator] += by
        else:
            self._count[item] += by


def _judgment(row: tuple[Any, ...]) -> Judgment:
    example, i, j, verdict, annotator, first, seconds, at, why, strength = row
    shown = (i, j) if first == i else (j, i)
    decided = strength if verdict in ("i", "j") else ""  # a tie is neither slight nor clear
    return Judgment(example, i, j, cast(Verdict, verdict), annotator, shown, seconds, at, why, strength=cast(Strength, decided))


def _content(example: Example, i: int, j: int) -> str:
    return content_id(example.prompt, example.responses[i], example.responses[j])


def _utc() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def _storage(file: Path) -> Iterator[None]:
    """What SQLite cannot do becomes a sentence. A broken constraint is the caller's to read."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        what = f"cannot be used as the file of judgments: {error}"
        raise StorageError(f"{file}: {what}; --db names a file that annotate made, or none that exists yet") from None
