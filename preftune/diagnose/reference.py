"""How likely a model finds a data set, beside what it says itself: the numbers behind the check `distance`."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

from preftune.data.template import Renderer
from preftune.diagnose.corpus import Corpus, Scored
from preftune.generate import Sampling, sample
from preftune.model.device import pick_device, precision_of
from preftune.model.load import load_model, resolve
from preftune.scoring import score

N_SCORED, N_SAMPLED, MAX_TOKENS = 256, 64, 128


def scored_by(
    model: str | Path, corpus: Corpus, renderer: Renderer, *, template: str | None = None, device: str = "auto"
) -> Scored:
    """Scores up to N_SCORED examples drawn by a fixed seed, and samples a reply at temperature 1 to N_SAMPLED prompts."""
    drawn = sorted(random.Random(0).sample(range(len(corpus.examples)), min(N_SCORED, len(corpus.examples))))
    place = {corpus.examples[at].id: at for at in drawn}
    means: dict[int, list[float]] = defaultdict(list)
    examples = [corpus.examples[at] for at in drawn]
    for row in score(model, examples, template=template, max_length=renderer.max_length, device=device):
        means[place[row["id"]]].append(row["logp_sum"] / row["n_tokens"])
    where = pick_device(device)
    net = load_model(resolve(model), dtype=precision_of("auto", where).weights).to(where)
    room = renderer.max_length - 2
    prompts = [ids for e in examples if len(ids := renderer.prompt_ids(e.prompt)) <= room][:N_SAMPLED]
    replies = sample(net, prompts, Sampling(max_tokens=MAX_TOKENS), stop_ids=renderer.stop_ids)
    return Scored(list(means.items()), [[float(reply.logp.mean())] for (reply,) in replies])
