"""Templates: what is inserted stays text, other projects' prompts come out byte for byte, and what cannot be used is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tape_server import key_of, tape

from preftune.data.types import Example, Message
from preftune.errors import ConfigError, DataError
from preftune.evaluate.mtbench import dialogues, read_answers, read_questions
from preftune.label.template import RUBRICS, Template, neutral, open_template, own_template

SIMPLE = "<|im_start|>system\nBe fair.\n<|im_end|>\n<|im_start|>user\n{instruction}\nA: {output_1}\nB: {output_2}\n<|im_end|>"


def example(prompt: str = "Why?", *responses: str, reference: str | None = None) -> Example:
    return Example("e", (Message("user", prompt),), responses or ("one", "two"), source="f:1", reference=reference)


def written(folder: Path, text: str, name: str = "mine.txt") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_roles_come_from_the_template_and_texts_from_the_example(tmp_path: Path) -> None:
    one = open_template(written(tmp_path, SIMPLE), labels=["A", "B"]).of(example())
    assert one.fill(example(), ["one", "two"], code="") == (
        Message("system", "Be fair."),
        Message("user", "Why?\nA: one\nB: two"),
    )


HOSTILE = st.lists(
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "system", "\n", "{output_2}", "{instruction}", "{code}", "{", "}", "A", "\\1"]
    )
    | st.text(max_size=4),
    max_size=8,
).map("".join)


@given(prompt=HOSTILE, first=HOSTILE, second=HOSTILE)
def test_whatever_an_answer_holds_it_is_inserted_and_never_read(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, first: str, second: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.txt"
    path.write_text(SIMPLE, encoding="utf-8")
    one = open_template(path, labels=["A", "B"]).of(example())
    system, user = one.fill(example(prompt), [first, second], code="")
    assert (system.role, system.content, user.role) == ("system", "Be fair.", "user")
    assert user.content == f"{prompt}\nA: {first}\nB: {second}".strip()


@given(answer=HOSTILE, code=st.text("0123456789abcdef", min_size=8, max_size=8))
def test_our_own_templates_break_up_control_tokens_and_keep_their_marks(answer: str, code: str) -> None:
    for kind, responses in (("pair", [answer, "two"]), ("score", [answer])):
        messages = own_template(kind).of(example()).fill(example("Why?", answer, "two"), responses, code=code)  # type: ignore[arg-type]
        assert [m.role for m in messages] == ["system", "user"]
        assert "<|im_start|>" not in messages[1].content and "<|im_end|>" not in messages[1].content
        assert neutral(answer) in messages[1].content
        assert f"[end of conversation {code}]" in messages[1].content


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|im_start|>system", "< |im_start| >system"),
        ("</s><s>[INST] x [/INST]", "< /s>< s>[ INST] x [ /INST]"),
        ("<start_of_turn>", "< start_of_turn>"),
        ("a < b | c > d, x |> f(y), <b>bold</b>, [1]", "a < b | c > d, x |> f(y), <b>bold</b>, [1]"),
    ],
)
def test_only_control_tokens_are_changed(text: str, expected: str) -> None:
    assert neutral(text) == expected


def test_the_rubric_and_a_reference_are_shown() -> None:
    for rubric in RUBRICS:
        system, user = own_template("pair", rubric=rubric).of(example()).fill(example(), ["one", "two"], code="c0de")
        assert len(system.content) > 500 and "{" not in system.content + user.content
        assert "correct answer" not in user.content
    known = example(reference="because")
    shown = own_template("pair").of(known).fill(known, ["one", "two"], code="c0de")[1].content
    assert "because" in shown and "end of the correct answer c0de" in shown


def test_a_rubric_can_be_a_file(tmp_path: Path) -> None:
    made = own_template("score", rubric=str(written(tmp_path, "Only rhymes count.")), reply="json")
    [system, user] = made.of(example()).fill(example(), ["one"], code="c0de")
    assert "Only rhymes count." in system.content and '"code": "c0de"' in user.content
    assert made.name == "mine-score-json"
    with pytest.raises(ConfigError, match="did you mean honesty"):
        own_template("score", rubric="honest")


def test_another_wording_is_another_judge(tmp_path: Path) -> None:
    first = open_template(written(tmp_path, SIMPLE), labels=["A", "B"]).digest
    assert first == open_template(written(tmp_path, SIMPLE), labels=["A", "B"]).digest
    assert first != open_template(written(tmp_path, SIMPLE.replace("fair", "unfair")), labels=["A", "B"]).digest
    assert first != open_template(written(tmp_path, SIMPLE), labels=["B", "A"]).digest


def test_a_template_brings_its_own_rule(tmp_path: Path) -> None:
    front = "---\nlabels: [uno, due, pari]\npattern: 'VERDICT={label}'\nmax_tokens: 7\n---\n"
    one = open_template(written(tmp_path, front + SIMPLE)).of(example())
    assert (one.rule.labels, one.rule.pattern, one.rule.top, one.max_tokens) == (
        ("uno", "due", "pari"),
        "VERDICT={label}",
        0,
        7,
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no message", "no message in it"),
        ("<|im_start|>judge\n{output_1}{output_2}<|im_end|>", "role 'judge' does not exist"),
        (SIMPLE, "nothing says what a verdict looks like"),
        ("---\nlabels: [A]\n---\n" + SIMPLE, "expected .first, second."),
        ("---\nlabels: [A, A]\n---\n" + SIMPLE, "all different"),
        ("---\nlabels: [A, B]\npattern: '('\n---\n" + SIMPLE, "no regular expression"),
        ("---\nlabels: [A, B]\npattern: 'x'\n---\n" + SIMPLE, "must hold {label}"),
        ("---\npattern: 'x'\n---\n<|im_start|>user\n{answer}<|im_end|>", "one .group."),
        ("---\nlabel: [A, B]\n---\n" + SIMPLE, "label: no such setting of a template; did you mean labels"),
        ("---\n[: \n---\n" + SIMPLE, "not YAML"),
        ("---\nlabels: [A, B]\n---\n<|im_start|>user\n{instruction}<|im_end|>", "output_1. and .output_2. must stand in it"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        open_template(written(tmp_path, text))


def test_a_text_that_an_example_lacks_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, SIMPLE.replace("{instruction}", "{instruction} {ref_answer_1}"))
    one: Template = open_template(path, labels=["A", "B"]).of(example())
    with pytest.raises(DataError, match=r"f:1: template mine wants \{ref_answer_1\}, which example 'e' does not have"):
        one.fill(example(), ["one", "two"], code="")
    assert "because" in one.fill(example(reference="because"), ["one", "two"], code="")[1].content


# ---- other projects' prompts, byte for byte ---------------------------------------------------------------------------


def test_llmbar_and_alpaca_eval_prompts_are_those_of_the_tapes(shared_data: Path) -> None:
    with gzip.open(shared_data / "llmbar/Natural/dataset.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    one = open_template(shared_data / "llmbar/prompts/comparison_Vanilla.txt").of(example())
    known = tape(shared_data / "llmbar/tapes/Natural.GPT-4.Vanilla.tape.jsonl.gz")
    for row in rows:
        shown = example(row["input"], row["output_1"], row["output_2"])
        for order in (shown.responses, shown.responses[::-1]):
            assert key_of([m._asdict() for m in one.fill(shown, order, code="")]) in known
    rule = open_template(shared_data / "alpaca_eval/judge_template_alpaca_eval_clf.txt").of(example())
    assert (rule.rule.labels, rule.rule.top, rule.max_tokens) == (("m", "M"), 5, 1)


def test_mt_bench_prompts_are_those_of_the_tapes(shared_data: Path) -> None:
    folder = shared_data / "mt_bench"
    questions, references = read_questions(folder / "question.jsonl"), read_answers(folder / "reference_answer_gpt-4.jsonl")
    mine = read_answers(folder / "Stefanstud_FastChat/model_answer/phi-3-dpo.jsonl.gz")
    known = tape(folder / "tapes/phi-3-dpo.single.tape.jsonl.gz")
    made = open_template(folder / "judge_prompts.jsonl", name="single-v1")
    keys = {
        key_of([m._asdict() for m in made.of(e).fill(e, e.responses, code="")])
        for e in dialogues(questions, {"phi-3-dpo": mine}, references)
    }
    assert keys == set(known)
    with pytest.raises(ConfigError, match="pair-v2, single-v1"):
        open_template(folder / "judge_prompts.jsonl")
