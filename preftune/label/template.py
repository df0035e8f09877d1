r"""Templates: a conversation and answers in, the messages for a judge out, and how its reply is to be read.

A template is a text file of messages, as AlpacaEval and LLMBar write them; ours and a user's are read alike:

    ---
    labels: [first, second]                      how the reply is read: optional where it is one of the known ways
    pattern: 'Better: {label}'
    ---
    <|im_start|>user
    {instruction}  one: {output_1}  two: {output_2}
    <|im_end|>

or MT-Bench's `judge_prompts.jsonl`, where a name picks a family (`pair-v2`, `single-v1`): its variants for two turns and for
reference answers are found by what an example has.

The roles are read before any text is inserted, and what was inserted is not read again: an answer that contains
`<|im_start|>` or `{output_2}` changes nothing. Our own templates carry a code that nobody who wrote an answer can know, and
control tokens in the texts are broken up; into other projects' templates the texts go as they are, since their recorded
figures rest on exact prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from preftune.data.types import Example, Message, Prompt, Response, Role, content_id
from preftune.errors import ConfigError, DataError, nearest
from preftune.label.verdict import Rule

Kind = Literal["pair", "score"]
RUBRICS = ("helpfulness", "honesty", "instructions", "safety")
"""Names of our own rubrics."""

_MESSAGE = re.compile(r"<\|im_start\|>\s*(\w+)[ \t]*\n(.*?)<\|im_end\|>", re.DOTALL)
_FRONT = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
_SIDES = (("output_1", "answer_a"), ("output_2", "answer_b"))
_PLACE = re.compile(r"\{(\w+)\}")
_TURNS = re.compile(r"question_\d+|answer_(a_|b_)?\d+|ref_answer_\d+")
_KNOWN = {"conversation", "instruction", "input", "question", "prompt", "rubric", "code", "ask", "reference",
          "answer", "output", "output_1", "output_2", "answer_a", "answer_b"}  # fmt: skip
_CONTROL = re.compile(
    r"<[|｜](?=\w)|(?<=\w)[|｜]>|<(?=/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn)>)|\[(?=/?INST\])", re.IGNORECASE
)
_SETTINGS = ("kind", "labels", "pattern", "fallback", "json", "top", "max_tokens", "reply", "ask")


@dataclass(frozen=True, slots=True)
class Template:
    """Messages with places for texts, and how the reply is read.

    name:        how the annotator is called after the judge's name.
    messages:    role and text with {places}.
    rule:        how the reply is read.
    max_tokens:  longest reply.
    texts:       values for {rubric} and {ask}.
    own:         True for ours: a code in every call, control tokens broken up.
    strip:       white space around each message is cut once it is filled.
    """

    name: str
    kind: Kind
    messages: tuple[tuple[Role, str], ...]
    rule: Rule
    max_tokens: int
    texts: tuple[tuple[str, str], ...] = ()
    own: bool = False
    strip: bool = True

    @property
    def places(self) -> set[str]:
        """Names of the texts that are inserted."""
        names = {name for _, text in self.messages for name in _PLACE.findall(text)}
        return {name for name in names if name in _KNOWN or _TURNS.fullmatch(name)}

    def fill(self, example: Example, responses: Sequence[Response], *, code: str) -> tuple[Message, ...]:
        """The messages that show `responses` (one, or two in the order given). Raises DataError for a text that is missing."""
        values = _values(example, responses, code if self.own else None) | {"code": code}
        for name, text in self.texts:
            values[name] = text.replace("{code}", code)
        if missing := sorted(self.places - values.keys()):
            where = f"{example.source}: " if example.source else ""
            raise DataError(
                f"{where}template {self.name} wants {{{missing[0]}}}, which example {example.id!r} does not have (it has "
                f"{', '.join(sorted(values))})"
            )
        places = self.places

        def insert(found: re.Match[str]) -> str:
            return values[found[1]] if found[1] in places else found[0]

        filled = [(role, _PLACE.sub(insert, text)) for role, text in self.messages]
        return tuple(Message(role, text.strip() if self.strip else text) for role, text in filled)


@dataclass(frozen=True, slots=True)
class Templates:
    """The variants of a template; which one an example gets follows from what it has.

    variants: (two or more turns are judged, there is a reference answer) -> template.
    """

    name: str
    kind: Kind
    variants: Mapping[tuple[bool, bool], Template]

    def of(self, example: Example) -> Template:
        """The template for this example: the nearest variant where its own does not exist."""
        turns = any(not isinstance(r, str) and sum(m.role == "assistant" for m in r) > 1 for r in example.responses)
        wanted = (turns, example.reference is not None)
        order = [wanted, (turns, False), (False, wanted[1]), (False, False)]
        return next(self.variants[v] for v in order if v in self.variants)

    @property
    def digest(self) -> str:
        """Six hex digits that name the content: another wording is another judge."""
        return content_id(*(repr(v) for v in sorted(self.variants.items())))[:6]


def own_template(kind: Kind, *, rubric: str = "helpfulness", reply: str = "letter") -> Templates:
    """Our template with one of our rubrics, or with a file of the user's own words. Raises ConfigError."""
    folder = resources.files("preftune.label")
    text = (folder / "templates" / f"{kind}.txt").read_text(encoding="utf-8")
    settings, messages = _parsed(text, f"{kind}.txt")
    if reply not in settings["reply"]:
        raise ConfigError(f"--reply: {reply!r} does not exist; {nearest(reply, settings['reply'])}")
    settings |= settings.pop("reply")[reply]
    if rubric in RUBRICS:
        words = (folder / "rubrics" / f"{rubric}.txt").read_text(encoding="utf-8")
    elif Path(rubric).expanduser().is_file():
        words = _text_of(Path(rubric).expanduser())
    else:
        raise ConfigError(f"--rubric: {rubric!r} is neither a rubric of ours nor a file; {nearest(rubric, RUBRICS)}")
    name = f"{Path(rubric).stem}-{kind}-{reply}"
    texts = (("rubric", words.strip()), ("ask", settings["ask"]))
    made = Template(name, kind, messages, _rule(settings, name), settings["max_tokens"], texts, own=True)
    return Templates(name, kind, {(False, False): made})


def open_template(file: str | Path, *, name: str | None = None, labels: Sequence[str] = ()) -> Templates:
    """A user's template file. `name` picks one of a judge_prompts.jsonl; `labels` say what a verdict looks like.

    Raises ConfigError: no messages in it, nothing to judge, no way to read the reply.
    """
    path = Path(file).expanduser()
    text = _text_of(path)
    if path.suffix == ".jsonl":
        return _mt_bench(text, path, name)
    if name is not None:
        raise ConfigError(f"--template-name: {path} holds one template; names are for judge_prompts.jsonl")
    settings, messages = _parsed(text, str(path))
    if unknown := [key for key in settings if key not in _SETTINGS]:
        raise ConfigError(f"{path}: {unknown[0]}: no such setting of a template; {nearest(unknown[0], _SETTINGS)}")
    if labels:
        settings["labels"] = list(labels)
    if "labels" not in settings and "pattern" not in settings and "json" not in settings:
        settings |= _recognised("\n".join(text for _, text in messages), str(path))
    rule = _rule(settings, str(path))
    kind: Kind = "pair" if rule.labels else "score"
    longest = max((len(label) for label in rule.labels), default=0)
    most = settings.get("max_tokens") or (longest if rule.top else 1024)
    made = Template(path.stem, kind, messages, rule, most)
    _check_places(made, path)
    return Templates(made.name, kind, {(False, False): made})


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _parsed(text: str, place: str) -> tuple[dict[str, Any], tuple[tuple[Role, str], ...]]:
    """The settings at the top and the messages of a template file."""
    settings: dict[str, Any] = {}
    if front := _FRONT.match(text):
        try:
            read = yaml.safe_load(front[1])
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{place}: the settings between the --- lines are not YAML: {' '.join(str(error).split())}"
            ) from None
        if not isinstance(read, dict):
            raise ConfigError(f"{place}: between the --- lines stand settings, such as labels: [A, B]")
        settings, text = read, text[front.end() :]
    messages = [(role, content) for role, content in _MESSAGE.findall(text)]
    if not messages:
        raise ConfigError(f"{place}: no message in it; expected <|im_start|>user … <|im_end|>")
    if wrong := [role for role, _ in messages if role not in get_args(Role)]:
        raise ConfigError(f"{place}: role {wrong[0]!r} does not exist; {nearest(wrong[0], get_args(Role))}")
    return settings, tuple(messages)


def _recognised(text: str, place: str) -> dict[str, Any]:
    """How replies are read, by the words of the template: the ways of MT-Bench, LLMBar and AlpacaEval."""
    if all(f"[[{label}]]" in text for label in "AB"):
        return {"labels": [label for label in "ABC" if f"[[{label}]]" in text], "pattern": r"\[\[{label}\]\]"}
    if "[[rating]]" in text.lower():
        return {"pattern": r"\[\[(\d+\.?\d*)\]\]", "fallback": r"\[(\d+\.?\d*)\]"}
    if "Output (a)" in text and "Output (b)" in text:
        return {"labels": ["Output (a)", "Output (b)"], "pattern": r"(?:^|\n) ?{label}", "max_tokens": 64}
    first, second = text.find("{output_1}"), text.find("{output_2}")
    names = [(m.start(), m[1]) for m in re.finditer(r"""model_identifier["']?\s*:\s*["']([^"'\n]+)["']""", text)]
    above = [name for at, name in names if at < first], [name for at, name in names if first < at < second]
    if above[0] and above[1]:
        return {"labels": [above[0][-1], above[1][-1]], "top": 5}
    raise ConfigError(
        f"{place}: nothing says what a verdict looks like; give --labels FIRST,SECOND or a `labels:` line between --- lines at "
        "the top of the file"
    )


def _rule(settings: Mapping[str, Any], place: str) -> Rule:
    labels = settings.get("labels", [])
    if not isinstance(labels, list) or len(labels) not in (0, 2, 3) or len(set(map(str, labels))) < len(labels):
        raise ConfigError(f"{place}: labels is {labels!r}, expected [first, second] or [first, second, tie], all different")
    labels = tuple(map(str, labels))
    pattern = settings.get("pattern", "")
    if (
        labels and not pattern and not settings.get("json")
    ):  # the label as a word; its first token decides where there are log-probs
        pattern = r"(?<!\w){label}(?!\w)"
    for each in (pattern, settings.get("fallback", "")):
        try:
            groups = re.compile(each.replace("{label}", "x").replace("{code}", "x")).groups
        except (re.error, AttributeError) as error:
            raise ConfigError(f"{place}: pattern {each!r} is no regular expression: {error}") from None
        if each and (("{label}" not in each) if labels else groups != 1):
            what = "must hold {label}" if labels else "must have one (group), which is the score"
            raise ConfigError(f"{place}: pattern {each!r} {what}")
    top = settings.get("top", 5 if labels and "pattern" not in settings and not settings.get("json") else 0)
    return Rule(labels, pattern, settings.get("fallback", ""), settings.get("json", ""), top)


def _check_places(template: Template, path: Path) -> None:
    two = [{"output_1", "output_2"}, {"answer_a", "answer_b"}]
    places = template.places
    turns = any(name.startswith("answer_") for name in places)
    if template.kind == "pair" and not any(p <= places for p in two) and not turns:
        raise ConfigError(f"{path}: two answers are judged, so {{output_1}} and {{output_2}} must stand in it")
    if template.kind == "score" and not places & {"answer", "output"} and not turns:
        raise ConfigError(f"{path}: an answer is judged, so {{answer}} must stand in it")


def _mt_bench(text: str, path: Path, name: str | None) -> Templates:
    """A family of judge_prompts.jsonl: `pair-v2` with `pair-v2-multi-turn`, `pair-math-v1`, `pair-math-v1-multi-turn`."""
    rows: dict[str, dict[str, Any]] = {}
    for at, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["name"]] = {key: str(row[key]) for key in ("type", "system_prompt", "prompt_template", "output_format")}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{at}: no judge prompt ({error})") from None
    families = [n for n in rows if "math" not in n and "multi-turn" not in n]
    if name not in families:
        raise ConfigError(f"--template-name: {path} holds {', '.join(families)}; say which (found: {name!r})")
    base, _, version = name.rpartition("-")
    names = {(False, False): name, (True, False): f"{name}-multi-turn"}
    for old in (version, "v1"):  # the maths prompts were not renumbered with the others
        if f"{base}-math-{old}" in rows:
            names |= {(False, True): f"{base}-math-{old}", (True, True): f"{base}-math-{old}-multi-turn"}
            break
    variants = {}
    for variant, each in names.items():
        if each in rows:
            row = rows[each]
            messages: tuple[tuple[Role, str], ...] = (("system", row["system_prompt"]), ("user", row["prompt_template"]))
            found = _recognised(row["system_prompt"] + row["prompt_template"], f"{path}: {each}")
            rule = _rule(found, f"{path}: {each}")
            variants[variant] = Template(each, "pair" if rule.labels else "score", messages, rule, 2048, strip=False)
    return Templates(name, variants[False, False].kind, variants)


def _values(example: Example, responses: Sequence[Response], code: str | None) -> dict[str, str]:
    """Every text that a template may ask for; `code` is that of our own templates, None for others."""

    def clean(text: str) -> str:
        return text if code is None else neutral(text)

    values = {"conversation": clean(transcript(example.prompt))} | ({} if code is None else {"reference": ""})
    values |= dict.fromkeys(("instruction", "input", "question", "prompt"), clean(instruction(example.prompt)))
    shown = [clean(r if isinstance(r, str) else transcript(r)) for r in responses]
    if len(shown) == 1:
        values |= {"answer": shown[0], "output": shown[0]} | _turns(example.prompt, responses[0], "answer", clean)
    else:
        for names, side, text, response in zip(_SIDES, "ab", shown, responses, strict=True):
            values |= dict.fromkeys(names, text) | _turns(example.prompt, response, f"answer_{side}", clean)
    if example.reference is not None:
        known = example.reference
        text = clean(known if isinstance(known, str) else transcript(known))
        marked = f"\n[a correct answer, to compare with {code}]\n{text}\n[end of the correct answer {code}]\n"
        values["reference"] = text if code is None else marked
        answers = [known] if isinstance(known, str) else [m.content for m in known if m.role == "assistant"]
        values |= {f"ref_answer_{k}": clean(a) for k, a in enumerate(answers, 1)}
    return values


def _turns(prompt: Prompt, response: Response, name: str, clean: Any) -> dict[str, str]:
    """question_1, answer_1, question_2, … of the whole dialogue."""
    before = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    after = (Message("assistant", response),) if isinstance(response, str) else response
    asked = [m.content for m in (*before, *after) if m.role == "user"]
    answered = [m.content for m in (*before, *after) if m.role == "assistant"]
    found = {f"question_{k}": clean(text) for k, text in enumerate(asked, 1)}
    return found | {f"{name}_{k}": clean(text) for k, text in enumerate(answered, 1)}


def instruction(prompt: Prompt) -> str:
    """A prompt as one text: the message of a single user turn as it is, else the transcript."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0].content if len(prompt) == 1 and prompt[0].role == "user" else transcript(prompt)


def transcript(content: str | Sequence[Message]) -> str:
    """Messages as a text with the speakers' names; text as it is."""
    if isinstance(content, str):
        return content
    names = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
    return "\n\n".join(f"{names[m.role]}: {m.content}" for m in content)


def neutral(text: str) -> str:
    """The text with chat control tokens broken up by a space, so that no tokenizer reads them as such."""
    return _CONTROL.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
