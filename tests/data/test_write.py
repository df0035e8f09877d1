from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from preftune.data.read import read_examples
from preftune.data.types import Example, Message, Pair
from preftune.data.write import write_examples

EXAMPLES = [
    Example("a", "say it:", ("yes", "no", "well"), pairs=(Pair(0, 1), Pair(2, 1, 0.75))),
    Example("b", (Message("system", "be brief"), Message("user", "“why?”")), ("because", "no idea"), pairs=(Pair(1, 0),)),
    Example("c", "rate:", ("good", "bad"), scores=(2.0, -1.0), pairs=(Pair(0, 1, margin=3.0),)),
    Example("d", "label:", ("good", "bad", "new"), labels=(True, False, None)),
    Example("e", "both:", ("good", "bad"), labels=(True, False), pairs=(Pair(0, 1, 0.5, -2.5),)),
]


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    assert write_examples(file, EXAMPLES) == len(EXAMPLES)
    assert [replace(e, source="") for e in read_examples(file).examples] == EXAMPLES
