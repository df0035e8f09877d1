"""Conversations: what the model sees of them, and what it said."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import World

import preftune
from preftune.chat import Conversation
from preftune.data.types import Message
from preftune.errors import DataError, ModelError
from preftune.generate import Sampling

GREEDY = Sampling(temperature=0.0, max_tokens=10)


def test_the_answer_comes_in_pieces_and_joins_the_conversation(world: World) -> None:
    conversation = Conversation.open(world.base, GREEDY)
    pieces = list(conversation.answer("Hello"))
    assert len(pieces) > 1
    assert conversation.messages == [Message("user", "Hello"), Message("assistant", "".join(pieces))]
    list(conversation.answer("And now?"))
    assert [m.role for m in conversation.messages] == ["user", "assistant"] * 2
    conversation.restart()
    assert conversation.messages == []
    assert list(conversation.answer("Hello")) == pieces


def test_it_answers_as_sampling_does(world: World) -> None:
    """The prompt is exactly the one that training and sampling see."""
    from preftune.generate import sample

    conversation = Conversation.open(world.base, GREEDY)
    prompt = conversation.renderer.prompt_ids((Message("user", "Hello"),))
    replies = sample(
        conversation.model, [prompt], GREEDY, stop_ids=conversation.renderer.stop_ids,
        pad_id=conversation.renderer.end_of_turn,
    )  # fmt: skip
    expected = conversation.renderer.decode(replies[0][0].ids)
    assert "".join(conversation.answer("Hello")) == expected


def test_a_system_message_comes_first_and_stays(world: World) -> None:
    conversation = Conversation.open(world.base, GREEDY, system="You answer in short sentences.")
    plain = "".join(Conversation.open(world.base, GREEDY).answer("Hello"))
    assert "".join(conversation.answer("Hello")) != plain
    conversation.restart()
    assert conversation.messages == [Message("system", "You answer in short sentences.")]


def test_a_run_and_its_adapter_can_be_talked_to(world: World, tmp_path: Path) -> None:
    run = preftune.train(world.settings(tmp_path / "run", lora__r=2, lora__merge=True, optim__lr=0.05), quiet=True)
    answers = ["".join(Conversation.open(path, GREEDY).answer("Hello")) for path in (run.path, run.merged, world.base)]
    assert answers[0] == answers[1] != answers[2]


def test_the_template_of_the_run_is_the_one_that_is_talked_with(world: World, tmp_path: Path) -> None:
    run = preftune.train(world.settings(tmp_path / "run", data=str(world.file("chat")), template="plain", steps=1), quiet=True)
    theirs = Conversation.open(run.path, GREEDY)
    assert theirs.renderer.chat_template == Conversation.open(world.base, GREEDY, template="plain").renderer.chat_template


def test_a_model_without_a_template_continues_text(world: World, tmp_path: Path) -> None:
    import shutil

    base = shutil.copytree(world.base, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    conversation = Conversation.open(base, GREEDY)
    assert list(conversation.answer("My kettle is"))


def test_an_answer_that_is_broken_off_leaves_the_conversation_as_it_was(world: World) -> None:
    conversation = Conversation.open(world.base, GREEDY)
    pieces = conversation.answer("Hello")
    next(pieces)
    pieces.close()  # Ctrl-C
    assert conversation.messages == []


def test_mistakes(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        list(Conversation.open(world.base, GREEDY).answer("   "))
    with pytest.raises(ModelError, match="this run has no model yet"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("{}")
        Conversation.open(tmp_path / "run", GREEDY)
