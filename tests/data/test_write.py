from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from preftune.data.read import read_examples
from preftune.data.types import Example, Message, Pair
from preftune.data.write import write_examples
from preftune.errors import DataError

EXAMPLES = [
    Example("a", "say it:", ("yes", "no", "well"), pairs=(Pair(0, 1), Pair(2, 1, 0.75))),
    Example("b", (Message("system", "be brief"), Message("user", "“why?”")), ("because", "no idea"), pairs=(Pair(1, 0),)),
    Example("c", "rate:", ("good", "bad"), scores=(2.0, -1.0), pairs=(Pair(0, 1, margin=3.0),)),
]


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    assert write_examples(file, EXAMPLES) == 3
    back = [replace(e, source="") for e in read_examples(file).examples]
    assert back[:2] == EXAMPLES[:2]
    assert back[2] == replace(EXAMPLES[2], pairs=(Pair(0, 1),)), "stated pairs count, and have no margin"


def test_labels_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels cannot be written"):
        write_examples(tmp_path / "out.jsonl", [EXAMPLES[0], Example("d", "p", ("r",), labels=(True,))])
    assert not (tmp_path / "out.jsonl").exists()
