"""A model on this machine that answers requests: batches of them, prompts read once, the same reply whatever the batch.

    >>> local = Local("runs/first")
    >>> for request, answer in local.answers(lambda: requests.pop() if requests else None): ...

Where a request names its `choices`, nothing is sampled: each choice's first token is scored after the prompt, so that a verdict
costs one forward pass and is a probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from preftune.asking.records import CHOSEN, Answer, Failed, Request, Take
from preftune.data.types import Example, Message, Prompt, Tree
from preftune.engine.policy import Policy
from preftune.engine.score import logps_of_all
from preftune.errors import PreftuneError
from preftune.files import default_cache
from preftune.generate import Sampling, sample
from preftune.model.device import pick_device, precision_of
from preftune.model.identity import identity
from preftune.model.load import check_vocabulary, context_length, load_model, open_renderer, quiet_transformers, resolve

_AT_ONCE = 256
_BUDGET = 8192  # tokens in one forward pass, where choices are scored

Found = list[tuple[Request, Answer | Failed]]


class Local:
    """Answers requests by the model of a run, a folder or a hub id; `Request.model` is its name and nothing else.

    place:         the identity of its weights.
    has_template:  without one a prompt is a text that is continued.
    """

    def __init__(self, model: str, *, template: str | None = None, device: str = "auto", precision: str = "auto") -> None:
        """Loads the model. Raises ModelError, ConfigError."""
        quiet_transformers()
        folder, where = resolve(model), pick_device(device)
        kind = precision_of(precision, where)
        self._context = context_length(folder)
        self._renderer = open_renderer(model, template=template, max_length=self._context)
        self._model: Any = load_model(folder, dtype=kind.autocast or kind.weights).to(where).eval()
        check_vocabulary(self._model, self._renderer.tokenizer, folder)
        self.has_template = self._renderer.chat_template is not None
        self.place = f"local:{identity(folder, str(kind), cache=default_cache())}:{self._renderer.chat_template or ''}"

    def answers(self, take: Take) -> Iterator[tuple[Request, Answer | Failed]]:
        """Each request with its answer. Raises ModelError where the model's log-probs are not finite."""
        while batch := self._taken(take):
            groups: dict[Request, list[Request]] = {}
            for request in batch:  # those that differ in nothing but the question and the number of the sample go together
                groups.setdefault(replace(request, messages=(), sample=0), []).append(request)
            for group in groups.values():
                yield from self._chosen(group) if group[0].choices else self._sampled(group)

    def _taken(self, take: Take) -> list[Request]:
        batch: list[Request] = []
        while len(batch) < _AT_ONCE and (request := take()) is not None:
            batch.append(request)
        return batch

    def _sampled(self, group: list[Request]) -> Found:
        """Replies by sampling. A prompt's samples are drawn together, up to the highest one asked for."""
        found: Found = []
        prompts: dict[tuple[Message, ...], Any] = {}
        for messages in dict.fromkeys(request.messages for request in group):
            prompt, problem = self._prompt(messages)
            if prompt is None:
                found += [(r, Failed(problem)) for r in group if r.messages == messages]
            else:
                prompts[messages] = prompt
        first = group[0]
        drawn = sample(
            self._model,
            list(prompts.values()),
            Sampling(
                n=max(request.sample for request in group) + 1,
                temperature=first.temperature,
                top_p=first.top_p,
                min_p=first.min_p,
                max_tokens=first.max_tokens,
                seed=first.seed or 0,
            ),
            stop_ids=self._renderer.stop_ids,
        )
        replies = dict(zip(prompts, drawn, strict=True))
        for request in group:
            if request.messages in replies:
                reply = replies[request.messages][request.sample]
                n_in, n_out = len(prompts[request.messages]), len(reply.ids)
                ids = reply.ids[:-1] if reply.ended else reply.ids
                text, cut = _until(self._renderer.decode(ids), request.stop)
                finish = "stop" if reply.ended or cut else "length"
                found.append((request, Answer(text, finish, None, n_in, n_out)))
        return found

    def _chosen(self, group: list[Request]) -> Found:
        """The log-prob of each choice's first token; where two choices begin with the same one, of the whole choices."""
        found: Found = []
        trees: list[tuple[Request, Tree]] = []
        for request in group:
            prompt, problem = self._prompt(request.messages)
            tree = None if prompt is None else self._renderer.tree(Example("", self._asked(request.messages), request.choices))
            if prompt is None or tree is None or len(tree.prompt) != len(prompt):
                found.append((request, Failed(problem or "the prompt does not fit the model's context")))
            else:
                trees.append((request, tree))
        if not trees:
            return found
        forest = [tree for _, tree in trees]
        policy = Policy.choose(self._model, forest)
        for (request, tree), logps in zip(trees, logps_of_all(policy, forest, _BUDGET), strict=True):
            apart = len({int(branch.ids[0]) for branch in tree.branches}) == len(tree.branches)
            likely = {c: float(lp[0] if apart else lp[:-1].sum()) for c, lp in zip(request.choices, logps, strict=True)}
            best = max(likely, key=lambda choice: likely[choice])
            found.append((request, Answer(best, CHOSEN, likely, len(tree.prompt), 1)))
        return found

    def _asked(self, messages: Sequence[Message]) -> Prompt:
        """Messages as they are; for a model without a chat template a single one as the text that it continues."""
        return messages[0].content if not self.has_template and len(messages) == 1 else tuple(messages)

    def _prompt(self, messages: Sequence[Message]) -> tuple[Any, str]:
        """The prompt's ids, or None and why not."""
        try:
            prompt = self._renderer.prompt_ids(self._asked(messages))
        except PreftuneError as error:
            return None, str(error)
        if self._context is not None and len(prompt) >= self._context:
            return None, f"the prompt has {len(prompt)} tokens, and the model's context holds {self._context}"
        return prompt, ""


def _until(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop strings, and whether there was one."""
    ends = [at for each in stop if (at := text.find(each)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
