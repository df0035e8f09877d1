"""Several responses to each prompt, written one prompt a line as they are whole; what the file holds is not asked again.

>>> plan = Plan((Way("base", 0.7), Way("base", 1.0)), n=4, seed=1)
>>> counts = collect(prompts, plan, open_asker, Path("responses.jsonl"), replies=replies, ledger=Ledger())

The file is read back as the data format `prompt_responses`; `origin` says of each response which model, temperature, seed and
instruction it came from. A response depends on its prompt, its way and its number alone: more prompts or another order change
none of them (on this machine; what a server does with a seed is its own affair).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from preftune.asking.records import Answer, Asker, Failed, Ledger, Request
from preftune.asking.replies import Replies, ask
from preftune.data.similarity import distinct, mean_similarity
from preftune.data.types import Message, Prompt
from preftune.data.write import plain
from preftune.errors import ConfigError, StorageError
from preftune.files import append_lines, read_jsonl
from preftune.sampling.prompts import Asked

OpenAsker = Callable[[str], Asker]
"""Gives whoever answers for a model's name; a local model is loaded then."""


class Way(NamedTuple):
    """One way to get a response."""

    model: str
    temperature: float = 1.0
    system: str = ""  # an instruction that is shown to the model, and is no part of the prompt that is kept
    name: str = ""  # how `origin` calls the instruction


@dataclass(frozen=True)
class Plan:
    """How the responses to a prompt are drawn: number k by way k modulo the number of ways.

    Everything else as in `generate.Sampling`; `stop` are texts that end a response. `paired`: the first response is the better
    one, by the instructions under which the two were written.
    """

    ways: tuple[Way, ...]
    n: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int = 0
    paired: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for values out of range."""
        if self.n < len(self.ways):
            raise ConfigError(f"-n {self.n}: fewer responses than the {len(self.ways)} models and temperatures in turn")
        expected = {
            "--top-p": (0 < self.top_p <= 1, self.top_p, "above 0 and at most 1"),
            "--min-p": (0 <= self.min_p <= 1, self.min_p, "from 0 to 1"),
            "--max-tokens": (self.max_tokens >= 1, self.max_tokens, "at least 1"),
            "--temperature": (all(w.temperature >= 0 for w in self.ways), [w.temperature for w in self.ways], "at least 0"),
        }
        for name, (good, value, range_) in expected.items():
            if not good:
                raise ConfigError(f"{name}: {value} given, expected {range_}")

    def request(self, prompt: Prompt, k: int, *, place: str) -> Request:
        """The request for response `k`. A server gets a seed of its own for each, a local model the number of the sample."""
        way = self.ways[k % len(self.ways)]
        asked = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        local = place.startswith("local:")
        return Request(
            way.model, _instructed(asked, way.system), temperature=way.temperature, top_p=self.top_p, min_p=self.min_p,
            max_tokens=self.max_tokens, seed=self.seed if local else _seed(self.seed, k), stop=self.stop,
            sample=k // len(self.ways),
        )  # fmt: skip

    def origin(self, k: int, finish: str) -> dict[str, Any]:
        """Where response `k` comes from."""
        way = self.ways[k % len(self.ways)]
        said = {"model": way.model, "temperature": way.temperature, "seed": self.seed, "sample": k, "finish": finish}
        return said | ({"instruction": way.name} if way.name else {})

    @property
    def digest(self) -> str:
        """Eight hex digits that name the plan."""
        return hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:8]


@dataclass
class Counts:
    """What became of the prompts: asked = n_written + n_before + n_missing."""

    n_prompts: int = 0
    n_before: int = 0  # were whole in the file already
    n_written: int = 0
    n_missing: int = 0  # without any response; a later run asks them again
    n_responses: int = 0
    n_cut: int = 0  # responses cut at max_tokens
    n_empty: int = 0  # replies without any text, which no format can hold
    n_identical_pairs: int = 0  # with `paired`: both texts the same, nothing to prefer
    reasons: Counter[str] = field(default_factory=Counter)  # why requests failed

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"reasons": dict(self.reasons.most_common(20))}

    def lines(self) -> list[str]:
        """For a terminal."""
        found = [f"{self.n_prompts} prompts: {self.n_written} answered now, {self.n_before} before, {self.n_missing} missing"]
        found.append(
            f"{self.n_responses} responses now, {self.n_cut} of them cut at --max-tokens, {self.n_empty} empty ones left out"
        )
        if self.n_identical_pairs:
            found.append(f"{self.n_identical_pairs} pairs are twice the same text, and no preference")
        return found + [f"  {n} × {reason}" for reason, n in self.reasons.most_common(5)]


def collect(
    prompts: Sequence[Asked],
    plan: Plan,
    open_asker: OpenAsker,
    out: Path,
    *,
    replies: Replies,
    ledger: Ledger,
    max_cost: float | None = None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Counts:
    """Adds the prompts that `out` lacks, each as soon as all its responses are there. Models answer one after the other.

    Raises ServerError, ModelError, ConfigError where `out` holds responses that were drawn otherwise.
    """
    written = _written(out, plan)
    todo = [one for one in prompts if one.id not in written]
    counts = Counts(len(prompts), len(prompts) - len(todo))
    found: dict[int, dict[int, Answer | Failed]] = defaultdict(dict)
    for model in dict.fromkeys(way.model for way in plan.ways):
        mine = [k for k in range(plan.n) if plan.ways[k % len(plan.ways)].model == model]
        places = [(p, k) for p in range(len(todo)) for k in mine]
        if not places:
            continue
        asker = open_asker(model)
        requests = [plan.request(todo[p].prompt, k, place=asker.place) for p, k in places]
        answers = ask(asker, requests, replies=replies, ledger=ledger, keep=_has_text, max_cost=max_cost)
        for n, (index, answer) in enumerate(answers, 1):
            p, k = places[index]
            found[p][k] = answer
            if len(found[p]) == plan.n:
                _write(todo[p], found.pop(p), plan, out, counts, text=not asker.has_template)
            on_progress(model, n, len(requests))
    return counts


def _has_text(index: int, answer: Answer) -> bool:
    """What is worth remembering: a server that replied with nothing may do better next time."""
    return bool(answer.text.strip())


def _write(asked: Asked, answers: dict[int, Answer | Failed], plan: Plan, out: Path, counts: Counts, *, text: bool) -> None:
    """One line of the file, unless something is missing that a later run can get."""
    failed = [a.reason for a in answers.values() if isinstance(a, Failed)]
    good = {k: a for k, a in sorted(answers.items()) if isinstance(a, Answer)}
    texts = {k: a for k, a in good.items() if a.text.strip()}
    counts.n_empty += len(good) - len(texts)
    if failed or not texts or plan.paired and len(texts) < 2:
        counts.reasons.update(failed or ["no text in the reply"])
        counts.n_missing += 1
        return
    responses = [a.text for a in texts.values()]
    counts.n_written += 1
    counts.n_responses += len(responses)
    counts.n_cut += sum(a.finish == "length" for a in texts.values())
    prompt = asked.prompt if text or not isinstance(asked.prompt, str) else (Message("user", asked.prompt),)
    if text and not isinstance(prompt, str) and len(prompt) == 1:
        prompt = prompt[0].content  # a model without a template continued the text
    row: dict[str, Any] = {"id": asked.id, "prompt": plain(prompt), "responses": responses}
    if plan.paired:
        same = responses[0] == responses[1]
        counts.n_identical_pairs += same
        row["pairs"] = [] if same else [[0, 1]]
    if asked.reference is not None:
        row["reference"] = plain(asked.reference)
    row |= {"origin": [plan.origin(k, a.finish) for k, a in texts.items()], "plan": plan.digest}
    append_lines(out, [row])


def _written(out: Path, plan: Plan) -> set[str]:
    """The ids that the file holds. Raises ConfigError where they were drawn by another plan."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return set()
    rows = read_jsonl(out)
    if any("plan" not in row or "id" not in row for row in rows):
        raise StorageError(f"{out}: holds other rows than sampled responses; choose another file")
    if other := next((row for row in rows if row["plan"] != plan.digest), None):
        raise ConfigError(
            f"{out}: holds responses that were drawn with other settings (models, temperatures, n, seed, …: "
            f"{other['origin'][0]}); give the same ones to go on, or choose another file"
        )
    return {row["id"] for row in rows}


class Diversity(NamedTuple):
    """How different the responses to one prompt are, as means over prompts with two or more; None where there are none."""

    distinct_1: float | None  # different words over words
    distinct_2: float | None  # different word pairs over word pairs
    identical: float | None  # share of responses that another one of the same prompt repeats
    similarity: float | None  # mean pairwise overlap of character 5-grams
    n_prompts: int

    def lines(self) -> list[str]:
        """For a terminal."""
        if self.distinct_1 is None or self.identical is None or self.similarity is None:
            return []
        second = "" if self.distinct_2 is None else f", distinct-2 {self.distinct_2:.2f}"
        return [
            f"responses to a prompt ({self.n_prompts} prompts): distinct-1 {self.distinct_1:.2f}{second}, "
            f"{self.identical:.1%} repeat another, mean similarity {self.similarity:.2f}"
        ]


def diversity(groups: Iterable[Sequence[str]]) -> Diversity:
    """The figures over the responses of each prompt."""
    several = [g for g in groups if len(g) > 1]
    identical = [1 - len(set(g)) / len(g) for g in several]
    return Diversity(
        _mean([distinct(g, 1) for g in several]),
        _mean([distinct(g, 2) for g in several]),
        _mean(identical),
        _mean([mean_similarity(g) for g in several]),
        len(several),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _instructed(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """The messages with an instruction, after the prompt's own system message where it has one."""
    if not system:
        return messages
    if messages[0].role == "system":
        return (Message("system", f"{messages[0].content}\n\n{system}"), *messages[1:])
    return (Message("system", system), *messages)


def _seed(seed: int, k: int) -> int:
    """31 bits for a server: different for each response to a prompt, the same again for the same seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{k}".encode(), digest_size=4).digest(), "big") >> 1
