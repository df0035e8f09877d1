"""Best of n of the reference, on the prompts and by the judge that the runs of a sweep are evaluated with.

Every trained policy should beat it at equal KL: it costs no training, only n answers in the place of one.
"""

from __future__ import annotations

from dataclasses import replace

from preftune.errors import ConfigError
from preftune.evaluate.best_of import BestOf, best_of
from preftune.evaluate.job import Settings, read_sides
from preftune.evaluate.models import Models
from preftune.evaluate.own_answers import prompts_of
from preftune.evaluate.samples import draw
from preftune.generate import Sampling
from preftune.model.load import load_model, resolve
from preftune.run import Run
from preftune.sweeping.evaluation import How, Progress, scored

_ANSWERS = 2  # times the largest n: with as many, the KL that is seen is at most 0.02 nats too low where scores do not tie


def measure_best_of(run: Run, how: How, *, device: str, precision: str, on_progress: Progress) -> list[BestOf]:
    """Best of each n that `how` asks for, by answers of the reference to the prompts that the run was evaluated on.

    Raises ConfigError where there is no reference.
    """
    models = Models.open(str(run.path), against=how.against, device=device, precision=precision)
    if models.against is None:
        raise ConfigError("--best-of: the objective has no reference to draw answers from; name one with --against")
    notes: list[str] = []
    prompts, ids = prompts_of(models, read_sides(models, Settings()).held_out, how.prompts, how.seed, notes)
    sampling = Sampling(
        n=_ANSWERS * max(how.best_of), max_tokens=how.max_tokens, seed=how.seed + 1
    )  # not the answers of the runs
    model = load_model(resolve(models.against), dtype=models.precision.weights).to(models.device)
    drawn = draw(model, models.renderer, ids, sampling, on_progress=lambda done, total: on_progress("best of n", done, total))
    examples = [replace(e, responses=tuple(texts)) for e, texts in zip(prompts, drawn.texts, strict=True)]
    scores: dict[str, dict[int, float]] = {e.id: {} for e in examples}
    for one in scored(how, examples, device, on_progress):
        if one.score is not None:  # too long for a reward model
            scores[one.example][one.response] = one.score
    table = [list(scores[e.id].values()) for e in examples]
    return [best_of([row for row in table if len(row) > n], n) for n in how.best_of]
