"""The part of an evaluation that has the models write: answers, their KL, and what a judge says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.data.read import read_examples
from preftune.data.types import Branch, Example, Tree
from preftune.data.write import judged_file, plain, write_examples
from preftune.errors import DataError
from preftune.evaluate import samples
from preftune.evaluate.kl import KL, TokenKL, compare_all, summed, trees_of
from preftune.evaluate.models import Models, Progress
from preftune.evaluate.parts import Parts
from preftune.evaluate.record import Samples, Wins, short
from preftune.evaluate.samples import Drawn
from preftune.evaluate.wins import Judged, comparisons
from preftune.files import json_line, read_jsonl, write_atomic
from preftune.generate import Reply, Sampling
from preftune.label.template import transcript
from preftune.run import Run
from preftune.training.plan import epoch_order

Ids = NDArray[np.int32]
Judge = Callable[[Sequence[Example], Path], list[str]]
"""Judges what it is given, adds its judgments to the file, and says under which names."""

_PROBE_TOKENS = 8


class Answered(NamedTuple):
    """Prompts that were answered, the record of the answers, and the rows of answers.jsonl."""

    prompts: list[Example]
    samples: Samples
    rows: list[dict[str, Any]]


def answer(
    models: Models, examples: Sequence[Example], sampling: Sampling, most: int, parts: Parts, folder: Run, on_progress: Progress
) -> Answered:
    """Answers of the policy and the reference to the prompts of `examples`, each prompt once; writes answers.jsonl."""
    prompts, ids = prompts_of(models, examples, most, sampling.seed, parts.notes)

    def make(notes: list[str]) -> Samples:
        ours, theirs, kl = _written(models, ids, sampling, on_progress)
        if models.ranks.main:
            write_rows(folder, list(samples.rows(prompts, models.renderer, ours, theirs, kl)))
        return samples.record(ours, theirs, kl, sampling, beta=models.beta if models.against else None)

    def whole() -> bool:
        return [row.get("id") for row in read_jsonl(folder.answers_file)] == [e.id for e in prompts]

    asked = [[e.id, plain(e.prompt), tokens.tolist()] for e, tokens in zip(prompts, ids, strict=True)]  # as a template has it
    key = [models.identity(), models.beta, asdict(sampling), asked]
    found = parts.part("samples", key, Samples, make, whole=whole)
    models.ranks.barrier()
    return Answered(prompts, found, read_jsonl(folder.answers_file))


def write_rows(folder: Run, rows: Sequence[dict[str, Any]]) -> None:
    """answers.jsonl, whole."""
    write_atomic(folder.answers_file, "".join(json_line(row) for row in rows))


def prompts_of(
    models: Models, examples: Sequence[Example], most: int, seed: int, notes: list[str]
) -> tuple[list[Example], list[Ids]]:
    """At most so many different prompts, drawn once and in the order of the data, and their ids."""
    different = list({e.prompt_key: e for e in examples}.values())
    chosen = sorted(epoch_order(len(different), seed, 0)[:most].tolist())
    prompts, ids, too_long = [], [], 0
    for example in (different[i] for i in chosen):
        tokens = models.renderer.prompt_ids(example.prompt)
        if len(tokens) < models.renderer.max_length:
            prompts.append(example)
            ids.append(tokens)
        else:
            too_long += 1
    if too_long:
        notes.append(
            f"{too_long} of {len(chosen)} prompts are not answered: they fill the {models.renderer.max_length} tokens that "
            "the model reads"
        )
    if not prompts:
        raise DataError(
            f"no prompt leaves room for an answer within {models.renderer.max_length} tokens; --n-prompts 0 asks for none"
        )
    return prompts, ids


def _written(
    models: Models, ids: Sequence[Ids], sampling: Sampling, on_progress: Progress
) -> tuple[Drawn, Drawn | None, KL | None]:
    """What both models answer, and how far apart they are; each rank its share."""
    ranks = models.ranks
    mine = range(ranks.rank, len(ids), ranks.world)
    probe = [Tree("", p, (Branch(p[:_PROBE_TOKENS], np.ones(len(p[:_PROBE_TOKENS]), np.bool_)),)) for p in ids]

    def drawn(which: str) -> Drawn:
        scorer = models.policy(probe) if which == "policy" else models.reference(probe)

        def progress(done: int, total: int) -> None:
            on_progress(f"answers of the {which}", done, total)

        own = samples.draw(scorer.model, models.renderer, [ids[i] for i in mine], sampling, on_progress=progress)
        return own

    ours = drawn("policy")
    theirs = drawn("reference") if models.against is not None else None
    tokens: list[list[TokenKL]] | None = None
    if models.against is not None:
        trees = trees_of(ours.prompts, ours.replies)
        tokens = compare_all(
            models.policy(probe), models.reference(probe), trees, budget=models.budget,
            on_progress=lambda done: on_progress("KL", done, len(trees)),
        )  # fmt: skip
    whole = _together(models, ids, list(mine), ours)
    other = None if theirs is None else _together(models, ids, list(mine), theirs)
    if tokens is None:
        return whole, other, None
    everyone = sorted(ranks.gather_items(list(zip(mine, tokens, strict=True))), key=lambda item: item[0])
    return whole, other, summed([found for _, found in everyone])


def _together(models: Models, ids: Sequence[Ids], mine: Sequence[int], drawn: Drawn) -> Drawn:
    """The answers of all ranks, in the order of the prompts."""
    rows: list[tuple[int, list[Reply], list[str]]] = list(zip(mine, drawn.replies, drawn.texts, strict=True))
    everyone = sorted(models.ranks.gather_items(rows), key=lambda row: row[0])
    return Drawn(list(ids), [replies for _, replies, _ in everyone], [texts for _, _, texts in everyone])


def compare(
    models: Models, answered: Answered, judge: Judge, folder: Run, answers: str | None, notes: list[str], *, seed: int
) -> tuple[Wins, ...]:
    """Has the policy's first answers judged against the reference's first, or against stored ones; one record a judge."""
    ours = [row["policy"][0] for row in answered.rows]
    if answers is not None:
        against, theirs = Path(answers).stem, _stored(models, answered.prompts, answers)
    else:
        assert models.against is not None, "a judge compares with other answers"
        against, theirs = short(models.against), [row["reference"][0] for row in answered.rows]
    at = [i for i, other in enumerate(theirs) if other is not None]
    if len(at) < len(ours):
        notes.append(f"{len(ours) - len(at)} of {len(ours)} prompts have no answer in {answers}, and are not judged")
    if not at:
        raise DataError(f"--answers {answers}: none of the {len(ours)} prompts is in it; answers are found by their prompt")
    kept = [(answered.prompts[i], ours[i], theirs[i] or {}) for i in at]
    examples = comparisons([e for e, _, _ in kept], [a["text"] for _, a, _ in kept], [b["text"] for _, _, b in kept])

    def ask() -> str:
        _remember(judged_file(folder.judgments_file), examples)
        return json.dumps(judge(examples, folder.judgments_file))

    names = json.loads(models.ranks.first(ask))
    judged = Judged(folder.judgments_file, examples)
    lengths = [(a["n_tokens"], b["n_tokens"]) for _, a, b in kept]
    found = []
    for annotator in names:
        if (n_open := len(examples) - len(judged.by[annotator])) > 0:
            notes.append(f"{n_open} of {len(examples)} comparisons were not judged by {annotator} (--max-cost)")
        if not judged.by[annotator]:
            continue
        wins, more = judged.wins(annotator, against=against, n_tokens=lengths, seed=seed)
        notes += more
        found.append(wins)
    if found and models.ranks.main:
        said = judged.preferences(found[0].judge)
        by_row = {i: said.get(example.id) for i, example in zip(at, examples, strict=True)}
        write_rows(folder, [row | {"preference": by_row.get(i)} for i, row in enumerate(answered.rows)])
    return tuple(found)


def _stored(models: Models, prompts: Sequence[Example], file: str) -> list[dict[str, Any] | None]:
    """[prompt] the first stored answer to it; None where there is none."""
    known: dict[str, str] = {}
    for example in read_examples(file).examples:
        known.setdefault(example.prompt_key, transcript(example.responses[0]))
    texts = [known.get(e.prompt_key) for e in prompts]
    count = models.renderer.tokenizer
    return [
        None if text is None else {"text": text, "n_tokens": len(count(text, add_special_tokens=False)["input_ids"])}
        for text in texts
    ]


def _remember(file: Path, examples: Sequence[Example]) -> None:
    """Adds to the examples that a file of judgments speaks of."""
    known = {e.id: e for e in read_examples(str(file)).examples} if file.is_file() else {}
    write_examples(file, (known | {e.id: e for e in examples}).values())
