"""In which form a judge is asked for its verdict: the first one that it can give, found out by a question of our own.

    >>> best_form(server, "judge-1", "pair", rubric="helpfulness", replies=replies, ledger=Ledger()).name
    'helpfulness-pair-letter'

A letter whose log-probs come with it is a probability, and short. Where a server gives no log-probs, reasons and a verdict are
asked for as JSON, with a schema where it takes one. Where no JSON comes back either, the letter is read from the text. The
question is a comparison that is easy to make; its reply is remembered whatever it says, so that another run takes the same form
and asks nothing for it.
"""

from __future__ import annotations

from preftune.asking.records import Answer, Asker, Failed, Ledger
from preftune.asking.replies import Replies, ask
from preftune.data.types import Example, Message
from preftune.errors import ServerError
from preftune.label.judge import Judge, code_of
from preftune.label.template import Kind, Templates, own_template
from preftune.label.verdict import Read, read_pair, read_score

_EASY = Example("easy", (Message("user", "How much is two and two?"),), ("Four.", "Nine."))


def best_form(
    asker: Asker,
    model: str,
    kind: Kind,
    *,
    rubric: str,
    replies: Replies,
    ledger: Ledger,
    max_tokens: int | None = None,
    max_cost: float | None = None,
    asks: bool = True,
) -> Templates:
    """Our template in the form that this model can give.

    asks:  False: what is not remembered is not asked, and a letter is supposed.

    Raises ConfigError for a rubric that does not exist, ServerError where no question is answered at all.
    """
    letter, json = (own_template(kind, rubric=rubric, reply=form) for form in ("letter", "json"))
    failed = ""
    for templates in (letter, json) if kind == "pair" else (json,):  # a score of two digits is not told by its first token
        judge = Judge(asker, model, templates, max_tokens=max_tokens)
        answer, read = _tried(judge, replies, ledger, max_cost if asks else -1.0)  # with no money at all nothing is sent
        if isinstance(answer, Failed):
            if not answer.asked:
                return letter
            failed = answer.reason if templates is letter else failed
        elif read.value is not None and (templates is json or read.sure):
            return templates
    if failed:
        raise ServerError(f"{asker.place}: {model} does not answer a first question of ours: {failed}")
    return letter


def _tried(judge: Judge, replies: Replies, ledger: Ledger, max_cost: float | None) -> tuple[Answer | Failed, Read]:
    """What the model replies to the easy question in this form, and what can be read from it."""
    template = judge.templates.of(_EASY)
    shown, read = ((0, 1), read_pair) if template.kind == "pair" else ((0,), read_score)
    code = code_of(_EASY, shown, replies.secret)
    [(_, answer)] = ask(
        judge.asker, [judge.request(_EASY, shown, code=code)], replies=replies, ledger=ledger, max_cost=max_cost
    )
    return answer, Read(None) if isinstance(answer, Failed) else read(answer, template.rule, code=code)
