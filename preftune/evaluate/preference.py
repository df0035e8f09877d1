"""How a policy stands to pairs: accuracy, margins, calibration, each pair once.

    scored = score_pairs(policy, material, goal, store)     # rewards as the objective itself gives them, log-ratios, loss
    preferences(scored, kinds).accuracy                     # 0.71 [0.66, 0.75]

Rewards are those that the objective compares, so that accuracy and loss never disagree about who wins. All sums are over pairs,
whatever batch or rank they were scored in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from preftune.data.store import Store
from preftune.data.types import Tree
from preftune.engine.policy import Policy
from preftune.engine.reference import logps_of
from preftune.engine.score import by_length
from preftune.evaluate.estimate import Estimate, mean, wilson
from preftune.evaluate.record import Bin, Histogram, Preferences
from preftune.losses.objective import Objective
from preftune.losses.records import Labels, PairLoss, ResponseLoss, SequentialKL
from preftune.training.assemble import Scored as ScoredBatch
from preftune.training.dist import ONE, Ranks
from preftune.training.loop import to_host
from preftune.training.material import Material
from preftune.training.metrics import Sums, add, measure_losses
from preftune.training.step import Judged, Micro, judged

NEAR = 0.1
"""Two responses are of about the same length where the shorter lacks at most this share of the longer."""
_N_BINS = 10  # of confidence, from one half to one
_N_BARS = 30

Floats = NDArray[np.float64]


class Scores(NamedTuple):
    """Pairs [P] in the order of their trees. Log-ratios are NaN without a reference, rewards where the objective has none."""

    tree: NDArray[np.int64]  # index of the tree
    chosen_reward: Floats
    rejected_reward: Floats
    chosen_log_ratio: Floats  # log π − log π_ref of the whole response, nats
    rejected_log_ratio: Floats
    chosen_tokens: Floats
    rejected_tokens: Floats


class Scored(NamedTuple):
    """What was scored: the pairs, and the objectives' loss over all of their own units."""

    pairs: Scores
    loss: float


class _Kept(NamedTuple):
    """Of a micro-batch's responses."""

    pairs: torch.Tensor  # [P, 2]
    labelled: torch.Tensor
    ranked: torch.Tensor
    n_tokens: torch.Tensor  # [R]
    log_ratio: torch.Tensor  # [R] NaN without a reference


def score_pairs(
    policy: Policy,
    data: Material,
    goal: Sequence[Objective],
    store: Store | None,
    *,
    reference: Callable[[], Policy] | None = None,
    ranks: Ranks = ONE,
    budget: int = 8192,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """Rewards, log-ratios and lengths of every pair, and the loss of the objectives over all of their units.

    store:      log-probs of the reference for all of `data`; None: there is no reference.
    reference:  gives the reference itself, for objectives that need more of it than log-probs.
    budget:     tokens in one forward pass.
    """
    n = len(data.trees)
    lengths = [policy.tokens_read(t) for t in data.trees]
    groups = list(by_length(range(ranks.rank, n, ranks.world), lengths, budget))
    sums: Sums = {}
    rows: list[torch.Tensor] = []
    micros = _micros(policy, data, goal, store, reference, groups, on_progress)
    for group, one in zip(groups or [[]], judged(policy, micros, goal, _keep, ranks=ranks), strict=True):
        add(sums, measure_losses(goal, one.outcomes), one.weight)
        if group:
            rows.append(_rows(one, goal, [data.trees[i] for i in group], group))
    device = next(policy.parameters()).device
    table = torch.cat(rows) if rows else torch.zeros(0, 8, dtype=torch.float64, device=device)
    whole = torch.cat(ranks.gather(table.flatten())).reshape(-1, 8).cpu().numpy()
    whole = whole[np.lexsort((whole[:, 1], whole[:, 0]))]
    metrics, _ = to_host(goal, sums, ranks)
    return Scored(Scores(whole[:, 0].astype(np.int64), *whole[:, 2:].T), metrics["loss"])


def _micros(
    policy: Policy,
    data: Material,
    goal: Sequence[Objective],
    store: Store | None,
    reference: Callable[[], Policy] | None,
    groups: list[list[int]],
    on_progress: Callable[[int, int], None],
) -> Iterator[Micro]:
    """The micro-batches of this rank; one that counts for nothing where it has none, so that ranks stay in step."""
    whole = any(SequentialKL in o.units | o.given for o in goal)
    done, total = 0, sum(map(len, groups))

    for group in groups or [[]]:
        members = group or [0]
        batch = policy.pack([data.trees[i] for i in members])
        ref_logps = None if store is None else logps_of(store, [data.trees[i] for i in members], batch)
        mismatched = None
        if data.mismatched is not None and store is not None:
            others = [data.mismatched[i] for i in members]
            other = policy.pack(others)
            mismatched = other, logps_of(store, others, other)
        frozen = None
        if whole:
            assert reference is not None, "the objective needs the reference itself"
            frozen = reference().predictions(reference().pack([data.trees[i] for i in members])).detach()
        yield Micro(batch, ref_logps, float(bool(group)), mismatched, frozen)
        done += len(group)
        on_progress(done, total)


def _keep(scored: ScoredBatch) -> _Kept:
    units, n_tokens = scored.units, scored.batch.n_scored.double()
    if scored.has_reference:
        log_ratio = scored.logp_sum.double() - scored.ref_logp_sum.double()
    else:
        log_ratio = torch.full_like(n_tokens, torch.nan)
    return _Kept(units.pairs, units.labelled, units.ranked, n_tokens, log_ratio)


def _rows(one: Judged[_Kept], goal: Sequence[Objective], trees: Sequence[Tree], index: Sequence[int]) -> torch.Tensor:
    """[P, 8]: the tree and the number of the pair in it, then what `Scores` holds of it."""
    winner, loser = one.kept.pairs.unbind(1)
    places = [(i, k) for i, tree in zip(index, trees, strict=True) for k in range(len(tree.pairs))]
    place = torch.tensor(places, dtype=torch.float64, device=winner.device).reshape(-1, 2)
    chosen, rejected = _rewards(one, goal, len(one.kept.n_tokens))
    columns = [chosen, rejected]
    for values in (one.kept.log_ratio, one.kept.n_tokens):
        columns += [values[winner], values[loser]]
    return torch.cat([place, torch.stack(columns, 1)], 1)


def _rewards(one: Judged[_Kept], goal: Sequence[Objective], n_responses: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of chosen and rejected by the first objective that has rewards; NaN where none has."""
    kept = one.kept
    winner, loser = kept.pairs.unbind(1)
    by_response = torch.full((n_responses,), torch.nan, dtype=torch.float64, device=winner.device)
    for objective, (outcome, _) in zip(goal, one.outcomes, strict=True):
        if isinstance(outcome, PairLoss):
            return outcome.chosen_reward.double(), outcome.rejected_reward.double()
        if isinstance(outcome, ResponseLoss):
            at = kept.labelled if objective.record is Labels else kept.ranked
            by_response[at] = outcome.reward.double()
            break
    return by_response[winner], by_response[loser]


def has_rewards(goal: Sequence[Objective]) -> bool:
    """Whether an objective compares responses by a reward of its own."""
    return any(o.returns in (PairLoss, ResponseLoss) for o in goal)


def preferences(
    scores: Scores, trees: Sequence[Tree], kinds: Mapping[str, Mapping[str, str]], *, loss: float | None
) -> Preferences:
    """The record of scored pairs.

    kinds: by what is broken down ("category", "source") -> id of a tree -> its name there; "" is none.
    """
    known = np.isfinite(scores.chosen_reward) & np.isfinite(scores.rejected_reward)
    scores = Scores(scores.tree[known], *(column[known] for column in scores[1:]))
    margin = scores.chosen_reward - scores.rejected_reward
    right = np.where(margin > 0, 1.0, np.where(margin < 0, 0.0, 0.5))
    longer = np.sign(scores.chosen_tokens - scores.rejected_tokens)
    near = np.abs(scores.chosen_tokens - scores.rejected_tokens) <= NEAR * np.maximum(
        scores.chosen_tokens, scores.rejected_tokens
    )
    keys: dict[bytes, int] = {}
    prompt = np.array([keys.setdefault(trees[i].prompt.tobytes(), len(keys)) for i in scores.tree], np.int64)
    bins, error = calibration(margin)
    names = [trees[i].id for i in scores.tree]
    by = {what: _by([of.get(name, "") for name in names], right) for what, of in kinds.items()}
    side = np.where(near, "about as long", np.where(longer > 0, "chosen longer", "chosen shorter"))
    by["length"] = _by(side.tolist(), right)

    def per_prompt(values: Floats) -> Estimate | None:
        return None if np.isnan(values).all() else clustered(values, prompt)

    return Preferences(
        n_pairs=len(margin),
        n_ties=int((margin == 0).sum()),
        accuracy=_share(right),
        length_only=_share((longer + 1) / 2),
        length_matched=_share(right[near]) if near.any() else None,
        loss=loss,
        margin=clustered(margin, prompt),
        chosen_reward=clustered(scores.chosen_reward, prompt),
        rejected_reward=clustered(scores.rejected_reward, prompt),
        chosen_log_ratio=per_prompt(scores.chosen_log_ratio),
        rejected_log_ratio=per_prompt(scores.rejected_log_ratio),
        chosen_log_ratio_per_token=per_prompt(scores.chosen_log_ratio / np.maximum(scores.chosen_tokens, 1)),
        rejected_log_ratio_per_token=per_prompt(scores.rejected_log_ratio / np.maximum(scores.rejected_tokens, 1)),
        calibration=bins,
        calibration_error=error,
        margins=histogram(margin),
        by={what: found for what, found in by.items() if len(found) > 1},
    )


def calibration(margin: Floats) -> tuple[tuple[Bin, ...], float | None]:
    """The reliability curve of σ(margin), and its expected error (Guo et al. 2017, arXiv 1706.04599, equation 5).

    The policy states σ(|margin|) for the response that it prefers; people preferred it too where the margin is above 0.
    """
    if not len(margin):
        return (), None
    stated = 1 / (1 + np.exp(-np.abs(margin)))
    right = np.where(margin > 0, 1.0, np.where(margin < 0, 0.0, 0.5))
    edges = np.linspace(0.5, 1.0, _N_BINS + 1)
    place = np.minimum(np.searchsorted(edges, stated, side="right") - 1, _N_BINS - 1)
    bins = tuple(
        Bin(float(edges[k]), float(edges[k + 1]), float(stated[place == k].mean()), _share(right[place == k]))
        for k in range(_N_BINS)
        if (place == k).any()
    )
    return bins, sum(b.observed.n * abs(b.observed.value - b.predicted) for b in bins) / len(margin)


def histogram(values: Floats) -> Histogram | None:
    """How values are spread, between the smallest and the largest; None where there are none."""
    if not len(values):
        return None
    counts, edges = np.histogram(values, bins=_N_BARS)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def clustered(values: Floats, prompt: NDArray[np.int64]) -> Estimate:
    """The mean over prompts of each prompt's pairs."""
    groups: dict[int, list[float]] = defaultdict(list)
    for key, value in zip(prompt.tolist(), values.tolist(), strict=True):
        groups[key].append(value)
    return mean(list(groups.values()))


def _share(right: Floats) -> Estimate:
    return wilson(float(right.sum()), len(right))


def _by(names: Sequence[str], right: Floats) -> dict[str, Estimate]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, one in zip(names, right.tolist(), strict=True):
        groups[name].append(one)
    largest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name or "(none)": _share(np.array(found)) for name, found in largest}
