"""Data formats: each a function from one row of a file to one Example, and the columns by which it is recognised.

    >>> prompt_chosen_rejected({"prompt": "2+2=", "chosen": "4", "rejected": "5"}).pairs
    (Pair(winner=0, loser=1, confidence=1.0, margin=0.0),)

A new format is one function here, decorated with its columns, and one line in `preftune.registry.FORMATS`. A row that cannot be
used raises BadRow with the reason. Every format also reads the columns `id`, `category` and
`source` (where a row comes from), if their values are text or whole numbers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preftune.data.rows import (
    BadRow,
    cell,
    check_prompt,
    check_response,
    kind,
    label_of,
    labels_of,
    messages_of,
    number_of,
    numbers_of,
    optional,
    pairs_of,
    prompt_of,
    response_of,
    text_of,
    text_or_messages,
)
from preftune.data.types import Example, Message, Pair, Prompt, Response, content_id

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A data format: call it with a row to get its Example.

    read:      the function that was decorated.
    required:  columns without which a row is not of this format.
    optional:  columns that it also uses.
    when:      a condition on the row's values, for formats that share their columns.
    """

    read: Callable[[Row], Example]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    when: Callable[[Row], bool]

    def __call__(self, row: Row) -> Example:
        """The Example of one row. Raises BadRow."""
        return self.read(row)

    def fits(self, row: Row) -> bool:
        """True where the row has the columns, whatever stands in them, and meets the condition."""
        return all(c in row for c in self.required) and self.when(row)


def columns(
    *required: str, optional: tuple[str, ...] = (), when: Callable[[Row], bool] = lambda row: True
) -> Callable[[Callable[[Row], Example]], Format]:
    """Makes a function a Format that is recognised by its columns."""
    return lambda read: Format(read, required, (*optional, "id", "category", "source"), when)


STRENGTH = ("confidence", "margin", "score_chosen", "score_rejected")


@columns("instruction", "output_1", "output_2", "preference")
def alpaca_eval(row: Row) -> Example:
    """AlpacaEval annotations: `preference` runs from 1 (output_1 is better) to 2 (output_2 is better).

    It is a probability, kept as scores (2 - preference, preference - 1) and as the pair's confidence. 1.5 is a tie, and so is 0
    in old files: the scores are equal and there is no pair, as everywhere. Null is no verdict (the judge failed): a bad row.
    """
    if cell(row, "preference") == "":
        raise BadRow("preference is empty")
    preference = number_of(row["preference"], "preference")
    preference = 1.5 if preference == 0 else preference
    if not 1 <= preference <= 2:
        raise BadRow(f"preference is {preference:g}, expected a number from 1 to 2 (or 0 for a tie)")
    asked = text_of(cell(row, "instruction"), "instruction")
    prompt = check_prompt((Message("user", asked),), "instruction")
    outputs = [response_of(cell(row, name), name) for name in ("output_1", "output_2")]
    second = preference - 1  # probability that output_2 is better
    pairs = (Pair(1, 0, second),) if second > 0.5 else (Pair(0, 1, 1 - second),) if second < 0.5 else ()
    if pairs and outputs[0] == outputs[1]:
        raise BadRow("output_1 and output_2 are identical, so neither can be better; expected a preference of 1.5")
    return _example(row, prompt, tuple(outputs), pairs=pairs, scores=(1 - second, second))


@columns(
    "output_1",
    "output_2",
    optional=("instruction", "input", "label", "reference"),
    when=lambda row: "instruction" in row or "input" in row,
)
def two_outputs(row: Row) -> Example:
    """An instruction (`instruction`, else `input`) with two outputs, to be judged.

    LLMBar's `label` says which is better, 1 or 2; 0 is a tie: no pair, and the scores are equal.
    """
    asked = text_of(cell(row, "instruction" if optional(row, "instruction") is not None else "input"), "instruction")
    prompt = check_prompt((Message("user", asked),), "instruction")
    outputs = tuple(response_of(cell(row, name), name) for name in ("output_1", "output_2"))
    label = optional(row, "label")
    reference = _reference(row)
    if label is None:
        return _example(row, prompt, outputs, reference=reference)
    better = number_of(label, "label")
    if better not in (0, 1, 2):
        raise BadRow(f"label is {better:g}, expected 1 or 2 for the better output, or 0 for a tie")
    if better and outputs[0] == outputs[1]:
        raise BadRow("output_1 and output_2 are identical, so neither can be better; expected a label of 0")
    pairs = {0: (), 1: (Pair(0, 1),), 2: (Pair(1, 0),)}[int(better)]
    return _example(row, prompt, outputs, pairs=pairs, scores=() if pairs else (0.5, 0.5), reference=reference)


@columns("conversations", "chosen", "rejected", optional=("system", *STRENGTH))
def sharegpt(row: Row) -> Example:
    """ShareGPT as LLaMA-Factory has it: `conversations` is the prompt, `chosen` and `rejected` the message that follows."""
    prompt = messages_of(cell(row, "conversations"), "conversations")
    system = text_of(optional(row, "system") or "", "system")
    if system.strip():
        prompt = (Message("system", system), *prompt)
    check_prompt(prompt, "conversations")
    return _preference(row, prompt, *(response_of(cell(row, name), name) for name in ("chosen", "rejected")))


@columns("prompt", "chosen", "rejected", optional=STRENGTH)
def prompt_chosen_rejected(row: Row) -> Example:
    """`prompt`, `chosen`, `rejected` as text or messages. The two may be whole dialogues that open with the prompt."""
    prompt = prompt_of(cell(row, "prompt"), "prompt")
    sides = [text_or_messages(cell(row, name), name) for name in ("chosen", "rejected")]
    if any(not isinstance(s, str) for s in sides) and isinstance(prompt, str):
        asked: Prompt = (Message("user", prompt),)
    else:
        asked = prompt
    dialogues = [s for s in sides if not isinstance(s, str) and s[0].role != "assistant"]
    if len(dialogues) == 2:
        shared, chosen, rejected = _split_dialogues(*dialogues)
        if not (prompt == shared or isinstance(prompt, str) and any(m == Message("user", prompt) for m in shared)):
            raise BadRow("the prompt column is not what the dialogues in chosen and rejected open with")
        return _preference(row, shared, chosen, rejected)
    return _preference(row, asked, *(check_response(s, n) for s, n in zip(sides, ("chosen", "rejected"), strict=True)))


_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def _is_hh(row: Row) -> bool:
    return any(isinstance(row[c], str) and len(_TURN.findall(row[c])) > 1 for c in ("chosen", "rejected"))


@columns("chosen", "rejected", optional=STRENGTH, when=_is_hh)
def hh(row: Row) -> Example:
    r"""Whole dialogues as text, turns marked `\n\nHuman:` and `\n\nAssistant:`; the last assistant turn is the response.

    White space around a turn belongs to the markers and is cut.
    """
    (asked, chosen), (other, rejected) = (_hh_dialogue(cell(row, name), name) for name in ("chosen", "rejected"))
    if asked != other:
        at = next((i for i, (a, b) in enumerate(zip(asked, other, strict=False)) if a != b), min(len(asked), len(other)))
        raise BadRow(f"the prompts of chosen and rejected differ from turn {at + 1} on; they may differ in the last reply only")
    return _preference(row, check_prompt(asked, "the dialogue's prompt"), chosen, rejected)


def _hh_dialogue(value: object, name: str) -> tuple[tuple[Message, ...], Response]:
    before, *turns = _TURN.split(text_of(value, name))
    if before.strip() or not turns:
        raise BadRow(f"{name} does not begin with 'Human:'")
    spoken = zip(turns[::2], turns[1::2], strict=True)
    dialogue = tuple(Message("user" if speaker == "Human" else "assistant", text.strip()) for speaker, text in spoken)
    return dialogue[:-1], check_response(dialogue[-1:], name)


@columns("chosen", "rejected", optional=STRENGTH)
def chosen_rejected(row: Row) -> Example:
    """`chosen` and `rejected` are whole dialogues as messages; what they share at the start is the prompt."""
    sides = [text_or_messages(cell(row, name), name) for name in ("chosen", "rejected")]
    if any(isinstance(s, str) for s in sides):
        raise BadRow(
            "chosen and rejected are plain text, and nothing says where the prompt ends: add a prompt column "
            "(or fields.prompt=COLUMN), or mark the turns with 'Human:' and 'Assistant:'"
        )
    return _preference(row, *_split_dialogues(*(s for s in sides if not isinstance(s, str))))


@columns("prompt", "completion", "label")
def prompt_completion_label(row: Row) -> Example:
    """Unpaired: `label` says whether the completion is good (true, 1) or bad (false, 0)."""
    label = label_of(cell(row, "label"), "label")
    prompt, completion = _prompt_and_completion(row)
    return _example(row, prompt, (completion,), labels=(label,))


@columns("prompt", "responses", optional=("scores", "ranks", "pairs", "labels", "reference"))
def prompt_responses(row: Row) -> Example:
    """`responses` is a list; `scores` (higher is better) or `ranks` (1 is best) make pairs of all that differ.

    A pair's margin is the difference of the scores. Ranks are kept as scores with the sign turned, so that higher is better.
    `pairs` states the preferences instead, each [winner, loser], with confidence and margin behind if they are known: this is
    what `write_examples` writes. `labels` says of each response whether it is good (null: unknown).
    `reference` is an answer that is known to be right, which a judge may be shown.
    """
    listed = cell(row, "responses")
    if not isinstance(listed, (list, tuple)) or not listed:
        raise BadRow(f"responses is {'an empty list' if listed in ([], ()) else kind(listed)}, expected a list of one or more")
    responses = tuple(response_of(r, f"responses[{i}]") for i, r in enumerate(listed))
    scores, ranks = optional(row, "scores"), optional(row, "ranks")
    if scores is not None and ranks is not None:
        raise BadRow("both scores and ranks are given; fields.ranks=- leaves the ranks out")
    values: tuple[float, ...] = ()
    if scores is not None:
        values = numbers_of(scores, "scores", len(responses))
    elif ranks is not None:
        values = tuple(-r for r in numbers_of(ranks, "ranks", len(responses)))
    prompt, stated, labels = prompt_of(cell(row, "prompt"), "prompt"), optional(row, "pairs"), optional(row, "labels")
    pairs = _pairs_by_score(responses, values) if stated is None else pairs_of(stated, responses)
    good = () if labels is None else labels_of(labels, len(responses))
    return _example(row, prompt, responses, pairs=pairs, labels=good, scores=values, reference=_reference(row))


def _pairs_by_score(responses: tuple[Response, ...], values: tuple[float, ...]) -> tuple[Pair, ...]:
    """A pair of every two responses whose values differ, with the difference as margin; () where there are no values."""
    found = []
    for i, j in itertools.permutations(range(len(values)), 2):
        if values[i] > values[j]:
            if responses[i] == responses[j]:
                raise BadRow(f"responses[{i}] and responses[{j}] are identical but do not have the same score")
            found.append(Pair(i, j, margin=values[i] - values[j]))
    return tuple(found)


@columns("instruction", "completions", optional=("aspects",))
def ultrafeedback(row: Row) -> Example:
    """UltraFeedback's own rows: `completions` is a list of {response, annotations: {aspect: {Rating}}}, four answers a prompt.

    A response's score is the mean of its ratings, or of those that `aspects` names (which may also be overall_score or
    fine-grained_score). A rating that is no number (N/A) is left out; a response without any is a bad row.
    """
    listed = cell(row, "completions")
    if not isinstance(listed, (list, tuple)) or not listed:
        raise BadRow(f"completions is {kind(listed)}, expected a list of one or more")
    responses, values = [], []
    for i, one in enumerate(listed):
        if not isinstance(one, Mapping):
            raise BadRow(f"completions[{i}] is {kind(one)}, expected an object with response and annotations")
        responses.append(response_of(cell(one, "response"), f"completions[{i}].response"))
        stated = one.get("annotations")
        ratings = (
            {a: v.get("Rating") for a, v in stated.items() if isinstance(v, Mapping)} if isinstance(stated, Mapping) else {}
        )
        whole = {a: one[a] for a in ("overall_score", "fine-grained_score") if a in one}
        values.append(_rated(ratings, whole, _aspects(row), f"completions[{i}]"))
    prompt = check_prompt((Message("user", text_of(cell(row, "instruction"), "instruction")),), "instruction")
    given = tuple(responses)
    return _example(row, prompt, given, pairs=_pairs_by_score(given, tuple(values)), scores=tuple(values))


@columns("prompt", "response_1", "response_2", "preference_strength")
def preference_strength(row: Row) -> Example:
    """HelpSteer-2's preferences: -3 (response_1 is much better) to 3 (response_2 is). 0 is a tie; the size is the margin."""
    strength = number_of(cell(row, "preference_strength"), "preference_strength")
    prompt = prompt_of(cell(row, "prompt"), "prompt")
    responses = tuple(response_of(cell(row, name), name) for name in ("response_1", "response_2"))
    return _example(row, prompt, responses, pairs=_pairs_by_score(responses, (-strength / 2, strength / 2)))


HELPSTEER_ASPECTS = ("helpfulness", "correctness", "coherence")


@columns("prompt", "response", "helpfulness", optional=("correctness", "coherence", "complexity", "verbosity", "aspects"))
def helpsteer(row: Row) -> Example:
    """HelpSteer's ratings, one response a row; `preftune import` brings the rows of a prompt together.

    The score is the mean of helpfulness, correctness and coherence, or of those that `aspects` names: complexity and verbosity
    describe an answer, and do not say that it is better.
    """
    known = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    ratings = {a: row[a] for a in known if row.get(a) is not None}
    score = _rated(ratings, {}, _aspects(row) or tuple(a for a in HELPSTEER_ASPECTS if a in ratings), "the row")
    return _example(
        row, prompt_of(cell(row, "prompt"), "prompt"), (response_of(cell(row, "response"), "response"),), scores=(score,)
    )


def _aspects(row: Row) -> tuple[str, ...]:
    """The names of the ratings that count; () where the format is to choose."""
    names = optional(row, "aspects") or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise BadRow(f"aspects is {kind(names)}, expected a list of names")
    return tuple(names)


def _rated(ratings: Mapping[str, Any], whole: Mapping[str, Any], aspects: Sequence[str], name: str) -> float:
    """The mean of the ratings that are wanted: all of `ratings`, or those of either that `aspects` names."""
    every = {**whole, **ratings}
    if missing := [a for a in aspects if a not in every]:
        raise BadRow(f"{name} has no rating of {', '.join(missing)}; it has {', '.join(every) or 'none'}")
    given = [every[a] for a in aspects or ratings]
    values = [number_of(v, f"{name}: a rating") for v in given if not (isinstance(v, str) and v.strip().upper() in ("N/A", ""))]
    if not values:
        raise BadRow(f"{name} has no rating that is a number")
    return number_of(sum(values) / len(values), f"{name}: the mean of its ratings")


@columns("prompt", "completion")
def prompt_completion(row: Row) -> Example:
    """SFT: `prompt` and `completion`, text or messages."""
    prompt, completion = _prompt_and_completion(row)
    return _example(row, prompt, (completion,))


@columns("messages")
def messages(row: Row) -> Example:
    """SFT dialogues: the response is everything from the first assistant turn on."""
    return _dialogue(row, "messages")


@columns("conversations", optional=("system",))
def conversations(row: Row) -> Example:
    """SFT dialogues in ShareGPT's spelling."""
    return _dialogue(row, "conversations")


def _dialogue(row: Row, name: str) -> Example:
    turns = messages_of(cell(row, name), name)
    system = text_of(optional(row, "system") or "", "system") if name == "conversations" else ""
    if system.strip():
        turns = (Message("system", system), *turns)
    first = next((i for i, m in enumerate(turns) if m.role == "assistant"), None)
    if first is None:
        raise BadRow(f"{name} has no assistant turn, so there is nothing to learn")
    prompt = check_prompt(turns[:first], f"the part of {name} before the first reply")
    return _example(row, prompt, (check_response(turns[first:], name),))


def _reference(row: Row) -> Response | None:
    known = optional(row, "reference")
    return None if known is None else response_of(known, "reference")


def _prompt_and_completion(row: Row) -> tuple[Prompt, Response]:
    prompt = prompt_of(cell(row, "prompt"), "prompt")
    written = cell(row, "completion")
    if isinstance(prompt, str) and not isinstance(written, str):
        prompt = (Message("user", prompt),)
    return prompt, response_of(written, "completion")


def _split_dialogues(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], Response, Response]:
    """The shared prompt of two dialogues, and how each goes on."""
    if chosen == rejected:
        raise BadRow("chosen and rejected are identical")
    at = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    for m in (chosen[at : at + 1], rejected[at : at + 1]):
        if m and m[0].role != "assistant":
            raise BadRow(f"the prompts of chosen and rejected differ at message {at + 1}, which is by the {m[0].role}")
    sides = check_response(chosen[at:], "chosen"), check_response(rejected[at:], "rejected")
    check_prompt(chosen[:at], "what chosen and rejected share")
    return chosen[:at], *sides


def _preference(row: Row, prompt: Prompt, chosen: Response, rejected: Response) -> Example:
    """An Example of two responses, the first preferred as strongly as the row says."""
    if chosen == rejected:
        raise BadRow("chosen and rejected are identical: there is nothing to prefer")
    return _example(row, prompt, (chosen, rejected), pairs=(_strength(row),))


def _strength(row: Row) -> Pair:
    """How sure the row is that chosen is better, and by how much."""
    confidence, margin = optional(row, "confidence"), optional(row, "margin")
    scores = [optional(row, f"score_{side}") for side in ("chosen", "rejected")]
    sure = 1.0 if confidence is None else number_of(confidence, "confidence")
    if not 0.5 <= sure <= 1:
        raise BadRow(f"confidence is {sure:g}, expected a probability that chosen is better, from 0.5 (a tie) to 1")
    if margin is None and None not in scores:
        margin = number_of(scores[0], "score_chosen") - number_of(scores[1], "score_rejected")
    return Pair(0, 1, sure, 0.0 if margin is None else number_of(margin, "margin"))


def _example(
    row: Row,
    prompt: Prompt,
    responses: tuple[Response, ...],
    *,
    pairs: tuple[Pair, ...] = (),
    labels: tuple[bool | None, ...] = (),
    scores: tuple[float, ...] = (),
    reference: Response | None = None,
) -> Example:
    """The Example with the row's own id, or else the hash of prompt and responses (verdicts about them do not rename them)."""
    own = row.get("id")
    named = isinstance(own, int) and not isinstance(own, bool) or isinstance(own, str) and own.strip() != ""
    name = text_of(str(own), "id") if named else content_id(prompt, responses)
    return Example(
        name, prompt, responses, pairs=pairs, labels=labels, scores=scores, reference=reference,
        category=_kind_of(row, "category"), origin=_kind_of(row, "source"),
    )  # fmt: skip


def _kind_of(row: Row, name: str) -> str:
    """What the row says that it belongs to; "" where it says nothing, or what is no name."""
    said = row.get(name)
    named = isinstance(said, int) and not isinstance(said, bool) or isinstance(said, str)
    return text_of(str(said), name).strip() if named else ""
