"""Parts of an evaluation that are finished: kept as they come, so that nothing is measured twice.

A part is named, and kept under a key of all that it depends on: other weights, data or settings have another key, and are
measured anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from preftune.data.types import content_digest
from preftune.errors import StorageError
from preftune.evaluate.record import plain, revived
from preftune.run import Run
from preftune.training.dist import Ranks

Part = TypeVar("Part")


class Parts:
    """What evaluation-parts.json of a folder holds. All ranks know the same; rank 0 writes.

    notes: what a user should know of the parts so far, of those too that were measured before.
    """

    def __init__(self, folder: Run, ranks: Ranks) -> None:
        """Reads what is there; a file that cannot be read is as good as none."""
        self._folder, self._ranks = folder, ranks
        self._known: dict[str, Any] = json.loads(ranks.first(self._read))
        self.notes: list[str] = []

    def _read(self) -> str:
        try:
            found = self._folder.read_json(self._folder.evaluation_parts_file)
        except StorageError:
            found = None
        return json.dumps(found if isinstance(found, dict) else {})

    def part(
        self, name: str, key: Any, kind: Any, make: Callable[[list[str]], Part], *, whole: Callable[[], bool] = lambda: True
    ) -> Part:
        """The part as it was measured before, or as `make` measures it now.

        key:    whatever JSON can hold.
        kind:   the part's type.
        make:   measures; it adds its notes to the list.
        whole:  whether what the part left beside its record is still there.
        """
        digest = content_digest(plain(key), size=16).hex()
        known = self._known.get(name)
        if isinstance(known, dict) and known.get("key") == digest and self._ranks.first(lambda: "yes" if whole() else ""):
            self.notes += known["notes"]
            found: Part = revived(kind, known["value"], f"{self._folder.evaluation_parts_file}: {name}")
            return found
        said: list[str] = []
        made = make(said)
        self.notes += said
        self._known[name] = {"key": digest, "notes": said, "value": plain(made)}
        if self._ranks.main:
            self._folder.write_json(self._folder.evaluation_parts_file, self._known)
        return made
