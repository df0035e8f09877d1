from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from tokenizers_for_tests import CHATML, EMPTY_THOUGHT, FAMILIES, FORGETS, HEADERS, THINKS, byte_level, metaspace

from preftune.data import codec as module
from preftune.data.template import Renderer, build_trees
from preftune.data.tokens import Report
from preftune.data.types import Branch, Example, Message, Pair, Response, Tree
from preftune.errors import ConfigError, DataError, ModelError

QUESTION = (Message("user", "Where is the kettle?"),)
DIALOGUE = (
    Message("user", "Hello"),
    Message("assistant", "Hello. How can I help you today?"),
    Message("user", "My kettle arrived broken."),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(
    lambda t: not ("<" in t and ">" in t)
)  # no <|end|>
WITH_BOS = ("headers", "no_system", "inst", "inst_legacy", "inst_normalizer", "plain_metaspace")
TEXT_KEPT = ("chatml", "plain")  # byte-level, nothing trimmed: what is decoded is what was written, to the byte


def renderer_of(family: str, *, max_length: int = 4096) -> Renderer:
    return Renderer(FAMILIES[family](), template="plain" if family.startswith("plain") else None, max_length=max_length)


def tree_of(renderer: Renderer, prompt: str | tuple[Message, ...], *responses: Response) -> Tree:
    tree = renderer.tree(Example("id", prompt, responses, source="rows.jsonl:7"))
    assert tree is not None, renderer.report.dropped
    return tree


def plainly(renderer: Renderer, ids: Sequence[int] | np.ndarray) -> str:
    return str(renderer.tokenizer.decode(list(map(int, ids)), clean_up_tokenization_spaces=False))


def as_dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [m._asdict() for m in messages]


def scored_text(renderer: Renderer, branch: Branch) -> str:
    return plainly(renderer, branch.ids[branch.scored])


# What inference sees


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [QUESTION, DIALOGUE], ids=["one turn", "three turns"])
def test_the_prompt_is_what_inference_feeds(family: str, prompt: tuple[Message, ...]) -> None:
    renderer = renderer_of(family)
    expected = renderer.tokenizer.apply_chat_template(
        as_dicts(prompt), chat_template=renderer.chat_template, add_generation_prompt=True, return_dict=False
    )
    assert renderer.prompt_ids(prompt).tolist() == expected
    assert renderer.prompt_ids(prompt).dtype == np.int32
    assert tree_of(renderer, prompt, "On the table.").prompt.tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_prompt_is_what_the_tokenizer_makes_of_it(family: str) -> None:
    renderer = renderer_of(family)
    text = "Human: Where is it?\n\nAssistant:"
    assert renderer.prompt_ids(text).tolist() == renderer.tokenizer(text)["input_ids"]


@settings(max_examples=40)
@pytest.mark.parametrize("family", FAMILIES)
@given(user=TEXT, reply=TEXT)
def test_any_reply_completes_the_text_and_ends_once(family: str, user: str, reply: str) -> None:
    renderer = renderer_of(family)
    tree = tree_of(renderer, (Message("user", user),), reply)
    (branch,) = tree.branches
    messages = (Message("user", user), Message("assistant", reply))
    text = renderer.tokenizer.apply_chat_template(as_dicts(messages), chat_template=renderer.chat_template, tokenize=False)
    whole = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert plainly(renderer, [*tree.prompt, *branch.ids]).strip() == plainly(renderer, whole).strip()
    if family in TEXT_KEPT[:1]:
        assert plainly(renderer, branch.ids) == reply + "<|im_end|>"
    assert branch.scored.all() and len(branch.scored) == len(branch.ids)
    assert branch.ids[-1] == renderer.end_of_turn and (branch.ids == renderer.end_of_turn).sum() == 1
    n_bos = ([*tree.prompt, *branch.ids].count(renderer.tokenizer.bos_token_id)) if family in WITH_BOS else 1
    assert n_bos == 1


@settings(max_examples=40)
@pytest.mark.parametrize("family", FAMILIES)
@given(prompt=TEXT, replies=st.lists(TEXT, min_size=1, max_size=3))
def test_any_text_pair_completes_the_text(family: str, prompt: str, replies: list[str]) -> None:
    renderer = renderer_of(family)
    assume(prompt or family in WITH_BOS)
    tree = tree_of(renderer, prompt, *replies)
    for reply, branch in zip(replies, tree.branches, strict=True):
        whole = renderer.tokenizer(prompt + reply)["input_ids"]
        assert plainly(renderer, [*tree.prompt, *branch.ids[:-1]]) == plainly(renderer, whole)
        if family in TEXT_KEPT:
            assert plainly(renderer, [*tree.prompt, *branch.ids[:-1]]) == prompt + reply
        assert branch.ids[-1] == renderer.tokenizer.eos_token_id and branch.scored.all()


@pytest.mark.parametrize("family", WITH_BOS)
def test_a_text_that_has_bos_already_gets_no_second_one(family: str) -> None:
    renderer = renderer_of(family)
    bos = renderer.tokenizer.bos_token
    once = renderer.prompt_ids("Hello there")
    assert renderer.prompt_ids(bos + "Hello there").tolist().count(renderer.tokenizer.bos_token_id) == 1
    assert once.tolist().count(renderer.tokenizer.bos_token_id) == 1
    if family == "headers":
        assert renderer.prompt_ids(bos + "Hello there").tolist() == once.tolist()
        reply = tree_of(renderer, bos + "Hello there", " friend").branches[0]
        assert plainly(renderer, reply.ids) == " friend<|end|>"


def test_what_a_tokenizer_puts_behind_a_text_is_not_part_of_a_prompt() -> None:
    tokenizer = byte_level(special=("<s>", "<|end|>"), bos="<s>", adds_bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", 0), ("<|end|>", 1)]
    )
    assert tokenizer("Hello")["input_ids"][-1] == 1, "the tokenizer of this test must add EOS"
    renderer = Renderer(tokenizer, max_length=64)
    tree = tree_of(renderer, "Hello", " there")
    assert plainly(renderer, tree.prompt) == "<s>Hello"
    assert plainly(renderer, tree.branches[0].ids) == " there<|end|>"


def test_a_built_in_template_writes_bos_where_the_tokenizer_adds_it() -> None:
    with_bos = byte_level(special=("<s>", "<|end|>"), bos="<s>", adds_bos=True)
    unused = byte_level(special=("<s>", "<|end|>"), bos="<s>", adds_bos=False)
    assert Renderer(with_bos, template="plain", max_length=64).prompt_ids(QUESTION).tolist().count(0) == 1
    assert 0 not in Renderer(unused, template="plain", max_length=64).prompt_ids(QUESTION)


def test_a_template_without_bos_is_followed_and_said() -> None:
    renderer = Renderer(byte_level(special=("<s>", "<|end|>"), bos="<s>", adds_bos=True, template=FORGETS), max_length=64)
    assert 0 not in renderer.prompt_ids(QUESTION)
    assert any("messages have no BOS" in line for line in renderer.describe())


def test_text_prompts_beside_a_chat_template_are_counted() -> None:
    renderer = renderer_of("chatml")
    tree_of(renderer, QUESTION, "Blue.")
    assert renderer.report.text_prompts == 0
    tree_of(renderer, "2+2=", "4")
    assert any(line.startswith("1 examples have a text prompt") for line in renderer.report.lines())
    without = Renderer(byte_level(special=("<s>",), eos="<s>"), max_length=64)
    tree_of(without, "2+2=", "4")
    assert without.report.text_prompts == 0


# The boundary and the end


def test_a_reply_whose_first_token_would_merge_with_the_prompt_is_tokenized_alone() -> None:
    tokenizer = FAMILIES["chatml"]()
    assert len(tokenizer("\n\n")["input_ids"]) == 1, "the tokenizer of this test must merge two line breaks"
    renderer = Renderer(tokenizer, max_length=64)
    tree = tree_of(renderer, QUESTION, "\n\nOn the table.")
    assert tree.prompt.tolist() == renderer.prompt_ids(QUESTION).tolist()
    assert plainly(renderer, tree.branches[0].ids) == "\n\nOn the table.<|im_end|>"
    assert renderer.report.boundary_merges == 1
    assert "1 replies were tokenized apart" in "\n".join(renderer.report.lines())


@pytest.mark.parametrize("scheme", ["always", "first", "never", "normalizer"])
def test_a_reply_tokenized_alone_has_no_space_that_nobody_wrote(scheme: str) -> None:
    renderer = Renderer(metaspace(scheme=scheme), max_length=64)
    tree = tree_of(renderer, "Where? ", "Hello there", " Hello there")
    assert renderer.report.boundary_merges >= 1
    first, second = (plainly(renderer, [*tree.prompt, *b.ids]) for b in tree.branches)
    assert first.removeprefix("<s>").strip() == "Where? Hello there</s>"
    assert second.removeprefix("<s>").strip() == "Where?  Hello there</s>"


@pytest.mark.parametrize("written", ["Yes.<|im_end|>", "Yes.<|im_end|>\n", "Yes.<|im_end|><|im_end|>"])
@pytest.mark.parametrize("prompt", [QUESTION, "Is it?"], ids=["messages", "text"])
def test_an_end_of_turn_written_out_at_the_end_is_not_doubled(written: str, prompt: str | tuple[Message, ...]) -> None:
    renderer = renderer_of("chatml")
    ids = tree_of(renderer, prompt, written).branches[0].ids
    assert plainly(renderer, ids) == "Yes.<|im_end|>"
    assert renderer.report.special_in_text == 0


def test_eos_written_out_where_another_token_ends_the_turn() -> None:
    renderer = renderer_of("headers")
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn) == "<|eot|>"
    assert plainly(renderer, tree_of(renderer, QUESTION, "Yes.<|end|>").branches[0].ids) == "Yes.<|eot|>"
    assert renderer.stop_ids == {renderer.end_of_turn, renderer.tokenizer.eos_token_id}


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<|end|>"])
def test_the_pad_token_is_never_looked_at(pad: str | None) -> None:
    special = ("<|im_start|>", "<|im_end|>", "<|end|>")
    tokenizer = byte_level(special=special, eos="<|im_end|>", pad=pad, template=CHATML)
    tree = tree_of(Renderer(tokenizer, max_length=64), DIALOGUE, "Sorry.")
    usual = tree_of(renderer_of("chatml", max_length=64), DIALOGUE, "Sorry.")
    assert tree.prompt.tolist() == usual.prompt.tolist()
    assert tree.branches[0].ids.tolist() == usual.branches[0].ids.tolist()


def test_a_template_that_forgets_the_end_of_turn_gets_eos() -> None:
    renderer = Renderer(byte_level(template=FORGETS), max_length=64)
    ids = tree_of(renderer, QUESTION, "Yes.").branches[0].ids
    assert plainly(renderer, ids) == "Yes.<|end|>"
    assert renderer.end_of_turn == renderer.tokenizer.eos_token_id
    assert any("EOS is appended" in line for line in renderer.describe())


THINKING = ("<|u|>", "<|a|>", "<|eos|>", "<s>")


@pytest.mark.parametrize("reply", ["It fell.\n</think>\nOn the floor.", "<think>\nIt fell.\n</think>\nOn the floor."])
def test_a_prompt_that_opens_a_thought_is_continued_with_the_files_own_text(reply: str) -> None:
    renderer = Renderer(byte_level(special=THINKING, eos="<|eos|>", bos="<s>", template=THINKS), max_length=64)
    tree = tree_of(renderer, QUESTION, reply)
    assert plainly(renderer, tree.prompt) == "<s><|u|>Where is the kettle?<|a|><think>\n"
    assert plainly(renderer, tree.branches[0].ids) == "It fell.\n</think>\nOn the floor.<|eos|>"
    assert any("<think>" in line for line in renderer.describe())


def test_a_thought_that_the_template_would_leave_out_is_kept() -> None:
    silent = THINKS.replace("<think>\\n", "")
    renderer = Renderer(byte_level(special=THINKING, eos="<|eos|>", bos="<s>", template=silent), max_length=64)
    tree = tree_of(renderer, QUESTION, "<think>It fell.</think>On the floor.")
    assert plainly(renderer, tree.prompt).endswith("<|a|>")
    assert plainly(renderer, tree.branches[0].ids) == "<think>It fell.</think>On the floor.<|eos|>"


def test_a_template_that_trims_does_so_too_where_the_files_own_text_is_used() -> None:
    trims = (
        THINKS.replace(".lstrip()", " | trim")
        .replace("m['content'].split", "(m['content'].split")
        .replace("[-1] | trim", "[-1] | trim)")
    )
    renderer = Renderer(byte_level(special=THINKING, eos="<|eos|>", bos="<s>", template=trims), max_length=64)
    assert plainly(renderer, tree_of(renderer, QUESTION, "  On the floor. ").branches[0].ids) == "On the floor.<|eos|>"
    renderer = Renderer(byte_level(special=THINKING, eos="<|eos|>", bos="<s>", template=THINKS), max_length=64)
    assert plainly(renderer, tree_of(renderer, QUESTION, "On the floor. ").branches[0].ids) == "On the floor.<|eos|>"


def test_an_empty_thought_that_the_template_adds_is_part_of_the_reply() -> None:
    tokenizer = byte_level(special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>", template=EMPTY_THOUGHT)
    tree = tree_of(Renderer(tokenizer, max_length=64), DIALOGUE, "Sorry.")
    assert tokenizer.decode(tree.branches[0].ids.tolist()) == "<think>\n\n</think>\n\nSorry.<|im_end|>"


def test_special_tokens_written_in_a_text_are_counted() -> None:
    renderer = renderer_of("chatml")
    tree_of(renderer, (Message("user", "What does <|im_end|> mean?"),), "An end.")
    tree_of(renderer, QUESTION, "It ends with <|im_end|> and goes on.", "No.")
    tree_of(renderer, QUESTION, "On the table.")
    assert renderer.report.special_in_text == 2
    assert any("text of a special token" in line for line in renderer.report.lines())


# Multi-turn

REPLIES = ("Sorry about the kettle.", "A new one, soon.", "You keep it.")
TURNS = (
    Message("assistant", REPLIES[0]),
    Message("user", "What can you do about it?"),
    Message("assistant", REPLIES[1]),
    Message("user", "And the old one?"),
    Message("assistant", REPLIES[2]),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_assistant_turn_and_nothing_else_is_scored(family: str) -> None:
    renderer = renderer_of(family)
    tree = tree_of(renderer, QUESTION, TURNS)
    (branch,) = tree.branches
    end = renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn)
    turns = [t.strip() for t in scored_text(renderer, branch).split(end)]
    assert turns == [*REPLIES, ""]
    assert (branch.ids[branch.scored] == renderer.end_of_turn).sum() == 3 and branch.ids[-1] == renderer.end_of_turn
    given = plainly(renderer, branch.ids[~branch.scored])
    assert "What can you do" in given and "old one" in given and not any(reply in given for reply in REPLIES)
    whole = renderer.tokenizer.apply_chat_template(
        as_dicts(QUESTION + TURNS), chat_template=renderer.chat_template, tokenize=False
    )
    ids = renderer.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert plainly(renderer, ids).startswith(plainly(renderer, [*tree.prompt, *branch.ids]))
    if renderer.report.boundary_merges == 0:
        assert [*tree.prompt, *branch.ids] == ids[: len(tree.prompt) + len(branch.ids)]


@settings(max_examples=30)
@given(texts=st.lists(TEXT, min_size=5, max_size=5))
def test_scored_masks_of_any_text(texts: list[str]) -> None:
    turns = tuple(Message(t.role, text) for t, text in zip(TURNS, texts, strict=True))
    renderer = renderer_of("chatml")
    branch = tree_of(renderer, QUESTION, turns).branches[0]
    assert scored_text(renderer, branch) == "".join(text + "<|im_end|>" for text in texts[::2])


def test_user_turns_before_the_first_reply_belong_to_the_prompt_and_after_the_last_are_not_read() -> None:
    renderer = renderer_of("chatml")
    usual = tree_of(renderer, QUESTION, TURNS)
    moved = tree_of(renderer, (), (*QUESTION, *TURNS, Message("user", "Thanks.")))
    assert moved.prompt.tolist() == usual.prompt.tolist()
    assert moved.branches[0].ids.tolist() == usual.branches[0].ids.tolist()


def test_a_template_that_rewrites_history_drops_the_row_with_the_reason() -> None:
    tokenizer = byte_level(special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>", template=EMPTY_THOUGHT)
    renderer = Renderer(tokenizer, max_length=512)
    assert renderer.tree(Example("a", QUESTION, (TURNS,), source="d.jsonl:3")) is None
    ((source, reason),) = renderer.report.dropped
    assert source == "d.jsonl:3" and "differently once another follows" in reason


# The choice of a template


def test_messages_without_a_template_list_the_choices() -> None:
    renderer = Renderer(byte_level(), max_length=64)
    assert renderer.chat_template is None
    tree_of(renderer, "Hello", " there")
    with pytest.raises(ConfigError, match=r"no chat template: choose template=chatml, template=plain"):
        renderer.tree(Example("a", QUESTION, ("Yes",)))


def test_a_template_from_a_file_is_used_and_exposed(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(HEADERS.replace("{{ bos_token }}", ""))
    renderer = Renderer(byte_level(special=("<|eot|>", "<|end|>")), template=str(file), max_length=64)
    assert renderer.chat_template == file.read_text()
    assert renderer.end_of_turn == 0 and renderer.stop_ids == {0, 1}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{% for m in messages %}{{ m['content'] }}", "cannot render"),
        ("nothing of what was said", "writes a reply 0 times"),
        ("{% for m in messages %}{{ m['content'] ~ m['content'] }}{% endfor %}", "writes a reply 2 times"),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path: Path, source: str, expected: str) -> None:
    file = tmp_path / "bad.jinja"
    file.write_text(source)
    with pytest.raises(ModelError, match=expected) as error:
        Renderer(byte_level(), template=str(file), max_length=64)
    assert "bad.jinja" in str(error.value)


def test_a_template_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="'chatlm' is neither a built-in template nor a file"):
        Renderer(byte_level(), template="chatlm", max_length=64)


def test_several_templates_without_a_default() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(ModelError, match=r"several chat templates \(rag, tool_use\)"):
        Renderer(tokenizer, max_length=64)


def test_chatml_needs_its_tokens() -> None:
    with pytest.raises(ModelError, match="no <|im_start|> and no <|im_end|>"):
        Renderer(byte_level(), template="chatml", max_length=64)
    renderer = Renderer(byte_level(special=("<|end|>", "<|im_start|>", "<|im_end|>")), template="chatml", max_length=64)
    usual = renderer_of("chatml")
    assert plainly(renderer, renderer.prompt_ids(DIALOGUE)) == plainly(usual, usual.prompt_ids(DIALOGUE))
    assert renderer.end_of_turn == 2


def test_plain_writes_turns_as_text() -> None:
    renderer = renderer_of("plain")
    system = Message("system", "Answer shortly.")
    assert plainly(renderer, renderer.prompt_ids((system, *DIALOGUE))) == (
        "\n\nSystem: Answer shortly.\n\nHuman: Hello\n\nAssistant: Hello. How can I help you today?<|end|>"
        "\n\nHuman: My kettle arrived broken.\n\nAssistant:"
    )
    assert plainly(renderer, tree_of(renderer, DIALOGUE, "Sorry.").branches[0].ids) == " Sorry.<|end|>"


def test_a_tokenizer_without_eos() -> None:
    with pytest.raises(ModelError, match="no EOS token"):
        Renderer(byte_level(eos=None), max_length=64)
    with pytest.raises(ModelError, match="no EOS token and the template plain writes none"):
        Renderer(byte_level(eos=None), template="plain", max_length=64)
    ended_by_template = byte_level(special=("<|im_start|>", "<|im_end|>"), eos=None, template=CHATML)
    renderer = Renderer(ended_by_template, max_length=64, stop_ids=[7])
    assert renderer.stop_ids == {1, 7}
    assert tree_of(renderer, "Hello", " there").branches[0].ids[-1] == 1


def test_a_role_that_the_template_refuses_drops_the_row_and_says_so() -> None:
    renderer = renderer_of("no_system")
    refused = Example("a", (Message("system", "Be short."), *QUESTION), ("Yes.",), source="d.jsonl:1")
    trees = build_trees([refused, Example("b", QUESTION, ("Yes.",))], renderer)
    assert [t.id for t in trees] == ["b"]
    ((source, reason),) = renderer.report.dropped
    assert source == "d.jsonl:1" and "System role not supported" in reason and "(system, user)" in reason
    with pytest.raises(DataError, match=r"all 1 are dropped:\n  d.jsonl:1: .*System role not supported"):
        build_trees([refused], renderer)


def test_a_system_text_can_be_folded_by_the_template() -> None:
    renderer = renderer_of("inst")
    prompt = (Message("system", "Be short."), *QUESTION)
    assert "Be short.\n\nWhere is" in plainly(renderer, tree_of(renderer, prompt, "Here.").prompt)


# Truncation


def long_dialogue(n_pairs: int, words: int = 6, system: bool = True) -> tuple[Message, ...]:
    turns = [Message("system", "Be short.")] if system else []
    for i in range(n_pairs):
        turns += [
            Message("user", f"question {i} " + "kettle " * words),
            Message("assistant", f"answer {i} " + "ferry " * words),
        ]
    return (*turns, Message("user", "the last question is " + "about the harbour " * words + "END"))


@settings(max_examples=60)
@pytest.mark.parametrize("family", ["chatml", "headers", "inst_legacy", "plain"])
@given(n_pairs=st.integers(0, 4), max_length=st.integers(8, 220), sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_truncation_keeps_the_response_and_the_newest_text(
    family: str, n_pairs: int, max_length: int, sizes: tuple[int, int]
) -> None:
    tokenizer = renderer_of(family).tokenizer
    template = "plain" if family == "plain" else None
    free = Renderer(tokenizer, template=template, max_length=100_000)
    tight = Renderer(tokenizer, template=template, max_length=max_length)
    prompt, replies = long_dialogue(n_pairs), tuple("sorry " * n for n in sizes)
    whole = tree_of(free, prompt, *replies)
    minimal = free.prompt_ids((prompt[0], Message("user", "D")))
    longest = max(len(b.ids) for b in whole.branches)
    tree = tight.tree(Example("a", prompt, replies))
    assert tight.report.n_examples == tight.report.n_trees + len(tight.report.dropped)
    if tree is None:
        assert len(minimal) >= max_length
        return
    assert len(tree.prompt) + max(len(b.ids) for b in tree.branches) == tight.report.longest <= max_length
    assert tight.report.prompts_truncated == (tree.prompt.tolist() != whole.prompt.tolist())
    if len(whole.prompt) + longest <= max_length:
        assert tree.prompt.tolist() == whole.prompt.tolist()
    if len(minimal) + longest <= max_length:
        assert [b.ids.tolist() for b in tree.branches] == [b.ids.tolist() for b in whole.branches]
        assert tight.report.responses_truncated == 0
    else:
        assert tight.report.responses_truncated >= 1
        assert len(tree.prompt) <= max(max_length // 2, len(minimal)), "a response that is cut leaves the prompt its half"
        if len(whole.prompt) <= max_length // 2:
            assert tree.prompt.tolist() == whole.prompt.tolist()
        assert all(b.ids.tolist() == w.ids[: len(b.ids)].tolist() for b, w in zip(tree.branches, whole.branches, strict=True))
    text = plainly(free, tree.prompt)
    assert "Be short." in text and "D" in text
    kept = [i for i in range(n_pairs) if f"question {i}" in text]
    assert kept == list(range(n_pairs - len(kept), n_pairs)), "only the oldest turns go"
    if kept:
        assert text.count("the last question is") == 1 and all(f"answer {i}" in text for i in kept)


def test_a_turn_more_is_kept_when_it_just_fits() -> None:
    free = renderer_of("chatml")
    prompt = long_dialogue(3)
    shorter = (prompt[0], *prompt[3:])
    n = len(free.prompt_ids(shorter)) + len(tree_of(free, prompt, "Yes.").branches[0].ids)
    assert tree_of(renderer_of("chatml", max_length=n), prompt, "Yes.").prompt.tolist() == free.prompt_ids(shorter).tolist()
    even_shorter = (prompt[0], *prompt[5:])
    tight = tree_of(renderer_of("chatml", max_length=n - 1), prompt, "Yes.")
    assert tight.prompt.tolist() == free.prompt_ids(even_shorter).tolist()


def test_a_reply_that_takes_more_tokens_after_a_shorter_prompt_still_fits() -> None:
    replies_longer = "('ferry ' * (9 - loop.index0) if m['role'] == 'assistant' else '') + m['content'] +"
    tokenizer = byte_level(
        special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>", template=CHATML.replace("m['content'] +", replies_longer)
    )
    prompt, free = long_dialogue(3, system=False), Renderer(tokenizer, max_length=4096)
    longer = tree_of(free, prompt[2:], "Yes.")
    n_before = len(tree_of(free, prompt, "Yes.").branches[0].ids)
    assert n_before < len(longer.branches[0].ids)
    tight = Renderer(tokenizer, max_length=len(longer.prompt) + n_before)
    tree = tree_of(tight, prompt, "Yes.")
    assert tree.n_tokens <= tight.max_length and tree.prompt.tolist() == free.prompt_ids(prompt[4:]).tolist()
    assert tree.branches[0].ids[-1] == tight.end_of_turn and tight.report.responses_truncated == 0


def test_an_end_that_is_not_the_probes_is_still_cut_behind_the_end_of_turn() -> None:
    signed = CHATML.replace("+ '<|im_end|>'", "+ ' ' + (loop.index | string) + '<|im_end|>'")
    tokenizer = byte_level(special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>", template=signed)
    renderer = Renderer(tokenizer, max_length=256)
    assert plainly(renderer, tree_of(renderer, DIALOGUE, "Sorry.").branches[0].ids) == "Sorry. 4<|im_end|>"


def test_the_last_turn_loses_its_oldest_text_inside_the_scaffold() -> None:
    renderer = renderer_of("chatml", max_length=40)
    tree = tree_of(renderer, (Message("user", "old " * 500 + "and this is what I ask"),), "Yes.")
    text = plainly(renderer, tree.prompt)
    assert text.startswith("<|im_start|>user\n") and text.endswith("this is what I ask<|im_end|>\n<|im_start|>assistant\n")
    assert 38 <= tree.n_tokens <= 40
    assert renderer.report.prompts_truncated == 1 and "1 prompts lost" in "\n".join(renderer.report.lines())


@settings(max_examples=60)
@pytest.mark.parametrize("family", ["plain", "plain_metaspace", "headers"])
@given(n=st.integers(1, 60), m=st.integers(1, 60), max_length=st.integers(2, 100))
def test_a_text_prompt_is_cut_from_the_left_behind_its_bos(family: str, n: int, m: int, max_length: int) -> None:
    tokenizer = FAMILIES[family]()
    free, tight = Renderer(tokenizer, max_length=10_000), Renderer(tokenizer, max_length=max_length)
    prompt, reply = "x".join("abcdefgh"[i % 8] for i in range(n)), "z" * m
    whole = tree_of(free, prompt, reply)
    tree = tight.tree(Example("a", prompt, (reply,)))
    lead = 1 if family in WITH_BOS else 0
    if tree is None:
        assert max_length <= lead + 1
        return
    assert tree.n_tokens <= max_length
    assert tree.prompt[:lead].tolist() == whole.prompt[:lead].tolist()
    body = tree.prompt[lead:].tolist()
    assert body and body == whole.prompt.tolist()[-len(body) :]
    if len(whole.branches[0].ids) + lead + 1 <= max_length:
        assert tree.branches[0].ids.tolist() == whole.branches[0].ids.tolist()
        assert tree.n_tokens == min(max_length, whole.n_tokens)
    else:
        assert len(tree.prompt) == min(len(whole.prompt), max(max_length // 2, lead + 1))


def test_a_response_too_long_by_itself_loses_its_tail_and_no_end_is_made_up() -> None:
    renderer = renderer_of("chatml", max_length=30)
    tree = tree_of(renderer, QUESTION, "kettle " * 100, "No.")
    assert renderer.end_of_turn not in tree.branches[0].ids and tree.branches[0].scored.all()
    assert tree.branches[1].ids[-1] == renderer.end_of_turn
    assert renderer.report.responses_truncated == 1
    assert len(tree.prompt) + len(tree.branches[0].ids) == 30
    assert tree.prompt.tolist() == renderer.prompt_ids(QUESTION).tolist(), "the question is no longer than half of the limit"
    long_question = (Message("user", "old " * 50 + "is it so?"),)
    tree = tree_of(renderer, long_question, "kettle " * 100)
    assert 12 <= len(tree.prompt) <= 15 and plainly(renderer, tree.prompt).startswith("<|im_start|>user\n")
    assert len(tree.prompt) + len(tree.branches[0].ids) == 30


def test_an_example_that_would_lose_its_response_is_dropped_and_listed() -> None:
    renderer = renderer_of("chatml", max_length=8)
    example = Example("a", (Message("system", "kettle " * 30), *QUESTION), ("Yes.",), source="d.jsonl:9")
    assert renderer.tree(example) is None
    ((source, reason),) = renderer.report.dropped
    assert source == "d.jsonl:9" and "nothing of a response would be left" in reason and "is 8" in reason
    assert "1 examples dropped:\n  d.jsonl:9" in renderer.report.lines()[-1]


def test_responses_that_become_the_same_are_dropped() -> None:
    renderer = renderer_of("chatml", max_length=30)
    pair = Example("a", QUESTION, ("kettle " * 100 + "yes", "kettle " * 100 + "no"), pairs=(Pair(0, 1),))
    assert renderer.tree(pair) is None and "the same once they are cut" in renderer.report.dropped[0][1]


def test_a_multi_turn_response_is_cut_at_its_end() -> None:
    tree = tree_of(renderer_of("chatml", max_length=42), QUESTION, TURNS)
    assert len(tree.prompt) + len(tree.branches[0].ids) <= 42 and tree.branches[0].scored.any()


# Rows that cannot be


def test_rows_that_give_no_tree_say_why() -> None:
    renderer = renderer_of("chatml")
    rows = [
        Example("a", "", ("Yes.",), source="r:1"),
        Example("b", "text", (TURNS,), source="r:2"),
        Example("c", QUESTION, ("Yes.", (Message("user", "no"), Message("assistant", "yes"))), source="r:3"),
        Example("d", (), ("Yes.",), source="r:4"),
        Example("e", QUESTION, ("Yes.",), source="r:5"),
    ]
    assert [t is not None for t in renderer.trees(rows)] == [False] * 4 + [True]
    reasons = dict(renderer.report.dropped)
    assert "no token" in reasons["r:1"] and "prompt is text" in reasons["r:2"]
    assert "must begin with an assistant" in reasons["r:3"] and "no message at all" in reasons["r:4"]


def test_max_length_must_leave_room() -> None:
    with pytest.raises(ConfigError, match=r"batch\.max_length: 1 leaves no room"):
        Renderer(byte_level(), max_length=1)


# Many, and shown


def test_build_trees_keeps_order_counts_progress_and_tokenizes_a_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, told = Renderer(byte_level(), max_length=64), list[int]()
    calls: list[list[str]] = []
    original = module.token_ids
    monkeypatch.setattr(
        module, "token_ids", lambda tokenizer, texts: (calls.append(list(texts)), original(tokenizer, texts))[1]
    )
    examples = [
        Example(
            f"{i}",
            f"Question {i // 3}?",
            (f" yes {i}", f" no {i}"),
            pairs=(Pair(1, 0),),
            labels=(True, None),
            scores=(1.0, 2.0),
        )
        for i in range(600)
    ]
    trees = build_trees(examples, renderer, on_progress=told.append)
    assert [t.id for t in trees] == [e.id for e in examples] and told == [256, 512, 600]
    assert trees[0].pairs == (Pair(1, 0),) and trees[0].labels == (True, None) and trees[0].scores == (1.0, 2.0)
    assert len([c for c in calls if c]) == 3, "one call of the tokenizer for each chunk"
    assert all(len(set(c)) == len(c) for c in calls)
    single = [Renderer(byte_level(), max_length=64).tree(e) for e in examples[:5]]
    assert [t.branches[0].ids.tolist() for t in single if t] == [t.branches[0].ids.tolist() for t in trees[:5]]
    assert renderer.report == Report(n_examples=600, n_trees=600, longest=renderer.report.longest)
    assert build_trees([], renderer) == []


def test_show_marks_each_scored_token_and_render_says_why_a_row_is_dropped() -> None:
    renderer = renderer_of("chatml")
    shown = renderer.show(tree_of(renderer, QUESTION, "Ferry 🫖", TURNS))
    prompt, first, second = shown.split("\n\nresponse ")
    assert "⟦" not in prompt and "<|im_start|>user\nWhere is the kettle?" in prompt
    marked = first.split("scored:\n")[1]
    assert marked.replace("⟦", "").replace("⟧", "") == "Ferry 🫖<|im_end|>" and "⟦🫖⟧⟦<|im_end|>⟧" in marked
    assert "⟦<|im_end|>⟧\n<|im_start|>user\nWhat can you do about it?<|im_end|>" in second
    before = renderer.report.n_examples
    assert renderer.render(Example("a", QUESTION, ("Ferry 🫖", TURNS))) == shown
    assert renderer.render(Example("a", "", ("x",))).startswith("dropped: the prompt has no token")
    assert renderer.report.n_examples == before


@pytest.mark.parametrize("family", ["inst", "inst_legacy", "plain_metaspace"])
def test_show_keeps_the_spaces_of_a_sentencepiece_reply(family: str) -> None:
    renderer = renderer_of(family)
    marked = renderer.show(tree_of(renderer, QUESTION, "I am sorry")).split("scored:\n")[1]
    assert marked.replace("⟦", "").replace("⟧", "") == " I am sorry</s>"


def test_decode_leaves_control_tokens_out() -> None:
    renderer = renderer_of("headers")
    assert renderer.decode(tree_of(renderer, QUESTION, "On the table.").branches[0].ids) == "On the table."


# Real data


def test_real_dialogues_round_trip(shared_data: Path) -> None:
    with gzip.open(shared_data / "dpo_en_demo" / "dpo_en_demo.subset.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    renderer = renderer_of("chatml", max_length=1 << 20)
    examples = []
    for row in rows:
        prompt = tuple(Message(roles[m["from"]], m["value"]) for m in row["conversations"])  # type: ignore[arg-type]
        examples.append(Example("x", prompt, (row["chosen"]["value"], row["rejected"]["value"]), pairs=(Pair(0, 1),)))
    trees = build_trees(examples, renderer)
    assert len(trees) == len(rows) and not renderer.report.dropped
    for example, tree in zip(examples, trees, strict=True):
        for reply, branch in zip(example.responses, tree.branches, strict=True):
            assert plainly(renderer, branch.ids) == f"{reply}<|im_end|>"


def test_real_texts_are_cut_and_counted(shared_data: Path) -> None:
    with gzip.open(shared_data / "hh_rlhf" / "harmless-base.test.subset.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:300]
    examples = []
    for row in rows:
        prompt, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
        rejected = row["rejected"].rpartition("\n\nAssistant:")[2]
        examples.append(Example("x", prompt + "\n\nAssistant:", (chosen, rejected), pairs=(Pair(0, 1),)))
    renderer = renderer_of("plain", max_length=300)
    trees = build_trees(examples, renderer)
    report = renderer.report
    assert report.prompts_truncated > 0 and report.longest == 300
    assert report.n_examples == 300 == len(trees) + len(report.dropped)
    assert all(len(t.prompt) + max(len(b.ids) for b in t.branches) <= 300 for t in trees)
