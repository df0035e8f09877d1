"""Whether alignment worked, in one sentence with its numbers.

What counts, in this order: a win rate by a judge; else the accuracy on held-out pairs, which says that the preferences were
learnt and not yet that answers are better. An interval that holds one half decides nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from preftune.evaluate.record import Evaluation, Preferences, Samples, Wins

_WEAK_KL = 0.05  # nats per response: below it the answers are those of the reference


class Verdict(NamedTuple):
    """One sentence, and what it comes to; None where what was measured does not say."""

    sentence: str
    worked: bool | None


def verdict(found: Evaluation) -> Verdict:
    """Of an evaluation whose parts are all there."""
    worked, said = _evidence(found)
    still = found.samples is not None and found.samples.kl_per_response is not None
    if worked is None and still and found.samples.kl_per_response.high < _WEAK_KL:  # type: ignore[union-attr]
        worked = False
    opening = {True: "Alignment worked", False: "Alignment did NOT work", None: "Not decided"}[worked]
    said += _moved(found.samples) + _kept(found)
    return Verdict(f"{opening}: {'; '.join(said)}." if said else "Not decided: nothing was measured that could say.", worked)


def _evidence(found: Evaluation) -> tuple[bool | None, list[str]]:
    said, worked = [], None
    judged = [wins for wins in found.wins if wins.n_total]
    if judged:
        wins = judged[0]
        worked = _against_half(wins.win_rate.low / 100, wins.win_rate.high / 100)
        said.append(_won(wins))
    elif found.wins:
        said.append(f"{found.wins[0].judge} gave no verdict on its answers")
    if found.held_out is not None and found.held_out.n_pairs:
        said.append(_accuracy(found.held_out, found.train))
        if not judged:
            worked = _against_half(found.held_out.accuracy.low, found.held_out.accuracy.high)
            if found.beta is not None and not found.wins:  # a reward model answers nothing
                said.append("whether its answers are better was not judged")
    return worked, said


def _against_half(low: float, high: float) -> bool | None:
    return True if low > 0.5 else False if high < 0.5 else None


def _won(wins: Wins) -> str:
    rate = wins.win_rate
    text = f"its answers beat those of {wins.against} in {rate.value:.1f} % [{rate.low:.1f}, {rate.high:.1f}] of {wins.n_total}"
    text += f" by {wins.judge}"
    if (one := wins.length_controlled) is not None:
        text += f", at equal lengths {one.value:.1f} % [{one.low:.1f}, {one.high:.1f}]"
    return text


def _accuracy(held_out: Preferences, train: Preferences | None) -> str:
    right = held_out.accuracy
    text = f"it prefers as people do in {right.value:.1%} [{right.low:.1%}, {right.high:.1%}] of {right.n} held-out pairs"
    text += f" (the longer one: {held_out.length_only.value:.1%}"
    return text + (f"; trained pairs: {train.accuracy.value:.1%})" if train is not None and train.n_pairs else ")")


def _moved(samples: Samples | None) -> list[str]:
    if samples is None or samples.kl_per_response is None or samples.kl_per_token is None:
        return []
    kl = samples.kl_per_response
    return [f"KL from the reference {kl.value:.2f} [{kl.low:.2f}, {kl.high:.2f}] nats a response, "
            f"{samples.kl_per_token.value:.3f} a token"]  # fmt: skip


def _kept(found: Evaluation) -> list[str]:
    return [
        f"perplexity of {one.name} went from {one.reference:.2f} to {one.policy:.2f}"
        for one in found.perplexity
        if one.reference is not None
    ]
