"""What a judge's reply says: first or second, or a score; or nothing that can be read.

    >>> read_pair(Answer("A 3f9c", first_token={"A": -0.1, "B": -2.4}), rule, code="3f9c")
    Read(value=0.908..., why='')

A verdict is read from the log-probs of the first token where there are any, else from the JSON object that was asked for, else
by a regular expression, of whose matches the last one counts; `label.forms` finds out which of them a judge can give. A reply
that was cut off, that holds no verdict or, where the template carries a code, does not repeat the code beside it, says nothing:
it is neither a tie nor a loss.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from preftune.asking.records import CHOSEN, Answer


@dataclass(frozen=True, slots=True)
class Rule:
    """How a template wants its replies read.

    labels:      what stands for the first answer, the second, and (if there is a third) a tie; () where a score is asked for.
    pattern:     regular expression; `{label}` in it is each label, `{code}` the call's code. A score is its first group. Where
                 JSON is asked for: what counts in a reply that is no valid JSON.
    fallback:    a second pattern, tried where the first one matches nowhere.
    json_field:  the field of a JSON object that holds the verdict; "" where plain text is asked for.
    top:         log-probs of that many first tokens are asked for; 0: none, since the verdict is not the first token.
    low, high:   the scores that count.
    """

    labels: tuple[str, ...] = ()
    pattern: str = ""
    fallback: str = ""
    json_field: str = ""
    top: int = 0
    low: float = 1.0
    high: float = 10.0

    @property
    def schema(self) -> str:
        """JSON schema of the reply, as text; "" where it is no JSON."""
        if not self.json_field:
            return ""
        value: dict[str, Any] = {"type": "string", "enum": list(self.labels)} if self.labels else {"type": "integer"}
        fields = {"reason": {"type": "string"}, self.json_field: value, "code": {"type": "string"}}
        return json.dumps({"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False})


class Read(NamedTuple):
    """What was read. For a pair `value` is the probability that the first shown is better, else a score; None: unscored."""

    value: float | None
    why: str = ""  # the judge's reason, or why nothing could be read
    label: str = ""  # the label that was given; "" for a score
    sure: bool = False  # True where `value` is a probability by log-probs


_UNREADABLE = "no verdict in the reply"


def read_pair(answer: Answer, rule: Rule, *, code: str) -> Read:
    """Which of the two shown is better; `code` is "" for a template that carries none."""
    if answer.finish == "content_filter":
        return Read(None, "the server's filter withheld the reply")
    if rule.top and answer.first_token is not None:
        found = _by_logprobs(answer.first_token, rule.labels)
        wrote = answer.finish != CHOSEN  # who wrote nothing can have repeated nothing that an answer says
        if found.value is not None and code and wrote and not _found(answer.text, rule, code):
            return Read(None, "the reply does not carry the code of this call")
        return found
    label, why = _said(answer, rule, code)
    if label is None:
        return Read(None, why)
    return Read((1.0, 0.0, 0.5)[rule.labels.index(label)], why, label)


def read_score(answer: Answer, rule: Rule, *, code: str) -> Read:
    """The score that was given."""
    said, why = _said(answer, rule, code)
    if said is None:
        return Read(None, why)
    try:
        score = float(said)
    except ValueError:
        return Read(None, f"{said[:40]!r} is no number")
    if not rule.low <= score <= rule.high:
        return Read(None, f"the score {score:g} is not between {rule.low:g} and {rule.high:g}")
    return Read(score, why)


def _by_logprobs(first: Mapping[str, float], labels: tuple[str, ...]) -> Read:
    """P(first label) / P(any label), a tie's share halved; a label that is not among the tokens counts 0."""
    named = first if any(label in first for label in labels) else {}
    if not named:  # tokens that carry a space in front
        for token, logp in first.items():
            named = {**named, token.strip(" ▁Ġ"): max(logp, named.get(token.strip(" ▁Ġ"), -math.inf))}
    shares = [math.exp(named[label]) if label in named else 0.0 for label in labels]
    total = sum(shares)
    if not total > 0:
        return Read(None, "none of the labels is among the likeliest first tokens")
    shares = [share / total for share in shares] + [0.0] * (3 - len(labels))
    likeliest = max(range(len(labels)), key=lambda k: shares[k])
    return Read(shares[0] + shares[2] / 2, "", labels[likeliest], sure=True)


def _said(answer: Answer, rule: Rule, code: str) -> tuple[str | None, str]:
    """The label or score as it was written, and the reason given with it; (None, why not)."""
    if rule.json_field:
        return _in_json(answer, rule, code)
    if answer.finish == "length" and not rule.top:  # where the first token decides, one token is all that was asked for
        return None, "the reply was cut off"
    found = _found(answer.text, rule, code)
    return (None, _UNREADABLE) if found is None else (found, answer.text.strip() if not rule.top else "")


def _found(text: str, rule: Rule, code: str) -> str | None:
    """The last match in the text, as a label or a score."""
    for pattern in filter(None, (rule.pattern, rule.fallback)):
        whole = pattern.replace("{code}", re.escape(code))
        if rule.labels:
            ends = {
                label: [m.end() for m in re.finditer(whole.replace("{label}", re.escape(label)), text)] for label in rule.labels
            }
            last = max((max(e), label) for label, e in ends.items() if e) if any(ends.values()) else None
            if last:
                return last[1]
        elif matches := re.findall(whole, text):
            return str(matches[-1])
    return None


def _in_json(answer: Answer, rule: Rule, code: str) -> tuple[str | None, str]:
    """The verdict of the last JSON object in the reply that carries the code."""
    if answer.finish == "length":
        return None, "the reply was cut off"
    carried = False
    for row in reversed(_objects(answer.text)):
        said = row.get(rule.json_field)
        if code and row.get("code") != code:
            carried = True
            continue
        if rule.labels and said not in rule.labels or isinstance(said, bool) or not isinstance(said, (str, int, float)):
            return None, f"{rule.json_field} is {str(said)[:40]!r}"
        return str(said), str(row.get("reason", ""))
    if (found := _found(answer.text, rule, code)) is not None:  # such as a quotation mark in the reason that is not escaped
        return found, answer.text.strip()
    return None, "the reply does not carry the code of this call" if carried else _UNREADABLE


def _objects(text: str) -> list[dict[str, Any]]:
    """Every JSON object in the text, in order."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := text.find("{", at)) >= 0:
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
