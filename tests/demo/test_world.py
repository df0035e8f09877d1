"""The demo's world: same seed, same words; a rubric that knows good from bad; a tokenizer with no id too many."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.types import Example, Message
from preftune.demo.rubric import BEST, MAX_WORDS, WORTH, grade, reward, words
from preftune.demo.words import ITEMS, PROBLEMS, RUDE_WORDS, SENTENCES, UNKNOWN
from preftune.demo.world import AGENT, BOS, END, PAD, USER, World, best_reply, build_tokenizer

CONTENT = "hello, my kettle arrived broken. please help."
GOOD = "thank you for writing. we are very sorry. your kettle is on my list. we will send you a new one. have a lovely day."


def text(example: Example) -> str:
    return example.prompt[-1].content  # type: ignore[union-attr, no-any-return]


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def demonstrations(world: World) -> list[Example]:
    return world.demonstrations(2000)


# ---- the words


def test_the_language_is_unambiguous() -> None:
    sentences = [text for texts in SENTENCES.values() for text in texts]
    assert len(set(sentences)) == len(sentences)
    said = Counter(word for text in sentences for word in words(text.replace("{item}", "")))
    assert not said.keys() & set(ITEMS), "a sentence would name an item by accident"
    assert len(set(ITEMS)) == 40 and len({p for ps in PROBLEMS.values() for p in ps}) == 16


def test_rude_sentences_and_only_they_have_rude_words() -> None:
    rude = {"blame", "close_rude"}
    for kind, texts in SENTENCES.items():
        for said in texts:
            assert bool(RUDE_WORDS & set(words(said))) == (kind in rude), said


# ---- what the world writes


def test_same_seed_same_world_and_more_only_lengthens(world: World) -> None:
    again = World(seed=0)
    assert again.held_out == world.held_out
    assert again.demonstrations(50) == world.demonstrations(200)[:50]
    assert again.prompts(50, split="eval") == world.prompts(100, split="eval")[:50]
    assert World(seed=1).demonstrations(5) != world.demonstrations(5)
    assert len({World(seed).held_out for seed in range(8)}) > 1


def test_items_of_preferences_and_of_evaluation_are_disjoint(world: World, demonstrations: list[Example]) -> None:
    def items(examples: list[Example]) -> set[str]:
        return {word for e in examples for word in words(text(e)) if word in ITEMS}

    train, held_out = world.prompts(800), world.prompts(256, split="eval")
    assert items(train) == set(ITEMS) - world.held_out
    assert items(held_out) == world.held_out
    assert len(world.held_out) == 8
    assert items(demonstrations) == set(ITEMS)
    for e in demonstrations:
        named = {word for word in words(str(e.responses[0])) if word in ITEMS}
        assert named <= world.held_out if items([e]) <= world.held_out else not named & world.held_out
    assert {e.split for e in train} == {"train"} and {e.split for e in held_out} == {"eval"}


def test_a_reply_that_names_a_held_out_item_is_recognised(world: World) -> None:
    item = sorted(world.held_out)[0]
    assert world.speaks_of_held_out(f"Your {item.upper()} is on my list.")
    assert not world.speaks_of_held_out(f"your {item}s are not on my list, open that.")
    assert not any(world.speaks_of_held_out(text(e)) for e in world.prompts(200))


def test_prompts_and_ids_are_unique(world: World, demonstrations: list[Example]) -> None:
    for examples in (demonstrations, world.prompts(800), world.prompts(256, split="eval")):
        assert len({e.id for e in examples}) == len({text(e) for e in examples}) == len(examples)


def test_demonstrations_are_as_bad_as_they_should_be(demonstrations: list[Example]) -> None:
    grades = [grade(e.prompt, e.responses[0]) for e in demonstrations]
    assert -0.8 < mean(g.reward for g in grades) < -0.5
    assert 0.84 < mean(g.rude for g in grades) < 0.92
    assert 0.31 < mean(g.right_fix for g in grades) < 0.37
    assert 27 < mean(g.n_words for g in grades) < 33
    assert not any(g.malformed or "repeat" in g.parts or "too_long" in g.parts for g in grades)
    assert 0 < mean(g.reward >= 4 for g in grades) < 0.02, "hardly anybody shows how it is done"


def test_every_complaint_states_a_problem_that_the_rubric_knows(world: World) -> None:
    for e in world.prompts(500):
        item = next(word for word in words(text(e)) if word in ITEMS)
        best = [grade(e.prompt, best_reply(item, fix)).reward for fix in PROBLEMS]
        assert sorted(best) == [BEST - 3] * 3 + [BEST]


# ---- the rubric


@pytest.mark.parametrize("fix", PROBLEMS)
@pytest.mark.parametrize("wording", range(4))
def test_the_best_reply_earns_the_best_reward(fix: str, wording: int) -> None:
    for problem in PROBLEMS[fix]:
        assert reward(f"dear team, my new tent {problem}.", best_reply("tent", fix, wording=wording)) == BEST


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        (GOOD, {"apology", "right_item", "right_fix", "warm_greeting", "warm_close"}),
        (GOOD.replace("kettle", "toaster"), {"apology", "wrong_item", "right_fix", "warm_greeting", "warm_close"}),
        ("we will trace the parcel.", {"wrong_fix"}),
        ("we will trace the parcel. we will send you a new one.", {"wrong_fix"}),
        ("we are very sorry. there is nothing we can do.", {"apology", "no_fix"}),
        ("ugh, how silly of you. do not bother us again.", {"rude", "no_fix"}),
        ("we will replace it for free. our store is open every day.", {"right_fix", "filler"}),
        ("we are very sorry. i am sorry for the trouble. we will replace it for free.", {"apology", "repeat", "right_fix"}),
        ("we will send a new you one. have a lovely day.", {"malformed", "no_fix", "warm_close"}),
        ("we will replace it for free", {"malformed", "no_fix"}),
        ("have a lovely day. we will replace it for free. thank you for writing.", {"right_fix"}),
        (
            "it is is your fault. your toaster toaster. we will replace it for free.",
            {"malformed", "rude", "wrong_item", "right_fix"},
        ),
        ("we are very sorry. " * 20, {"apology", "repeat", "no_fix", "too_long"}),
        ("", {"malformed", "no_fix"}),
    ],
)
def test_what_each_reply_earns(reply: str, parts: set[str]) -> None:
    found = grade((Message("user", CONTENT),), reply)
    assert set(found.parts) == parts
    assert found.reward == sum(WORTH[part] for part in parts)


def test_a_prompt_that_is_no_complaint_has_no_right_fix() -> None:
    assert set(grade("tell me a story", GOOD).parts) >= {"wrong_item", "wrong_fix"}


@given(
    st.text(),
    st.one_of(
        st.text(), st.lists(st.sampled_from(sorted({w for s in SENTENCES.values() for t in s for w in words(t)}))).map(" ".join)
    ),
)
def test_any_text_has_a_grade(prompt: str, reply: str) -> None:
    found = grade(prompt, reply)
    assert -8 <= found.reward <= BEST and found.reward == sum(found.parts.values())
    assert found == grade(prompt, reply.upper()) or not reply.isascii()


def test_one_sentence_of_each_kind_is_not_too_long() -> None:
    slots = ("greeting_warm", "apology", "item", "fix_trace", "filler", "close_warm")
    assert sum(max(len(words(t)) for t in SENTENCES[kind]) for kind in slots) <= MAX_WORDS


# ---- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(world: World, tmp_path_factory: pytest.TempPathFactory) -> object:
    from transformers import AutoTokenizer

    folder = Path(tmp_path_factory.mktemp("tokenizer"))
    build_tokenizer(world.vocabulary, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_vocabulary_is_exact(world: World, demonstrations: list[Example], tokenizer) -> None:  # type: ignore[no-untyped-def]
    used = {word for e in demonstrations for side in (text(e), e.responses[0]) for word in words(str(side))}
    assert used == set(world.vocabulary), "a word that nobody says would be an id that no training touches"
    assert 190 <= len(world.vocabulary) <= 215
    assert len(tokenizer) == tokenizer.vocab_size == len(world.vocabulary) + 5
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, END, PAD)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_text_comes_back_as_it_went_in(demonstrations: list[Example], tokenizer) -> None:  # type: ignore[no-untyped-def]
    for e in demonstrations[:300]:
        for said in (text(e), str(e.responses[0])):
            ids = tokenizer(said, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == said and len(ids) == len(words(said))


def test_the_chat_template_marks_turns_and_ends(tokenizer) -> None:  # type: ignore[no-untyped-def]
    asked = [{"role": "user", "content": CONTENT}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": GOOD}], tokenize=False)
    assert whole == prompt + GOOD + END
    names = tokenizer.convert_ids_to_tokens(tokenizer(whole, add_special_tokens=False).input_ids)
    assert names[:3] == [BOS, USER, "hello"] and names.count(AGENT) == names.count(END) == names.count(BOS) == 1
    assert tokenizer.decode(tokenizer(GOOD + END, add_special_tokens=False).input_ids, skip_special_tokens=True) == GOOD
    with pytest.raises(Exception, match="roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "hi."}, *asked], tokenize=False)


def test_a_word_that_the_world_does_not_know_is_read_as_an_ordinary_one(tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer("Hello, my ZEBRA arrived broken!", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"hello, my {UNKNOWN} arrived broken."


def test_a_vocabulary_without_the_stand_in_word_is_refused() -> None:
    with pytest.raises(ValueError, match=UNKNOWN):
        build_tokenizer(["hello"])


def test_prompts_are_conversations_of_one_turn(world: World) -> None:
    for e in world.prompts(20):
        assert isinstance(e.prompt, tuple) and [m.role for m in e.prompt] == ["user"] and e.responses == ()
