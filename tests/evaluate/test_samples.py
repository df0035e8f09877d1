"""What answers look like, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from worlds import World

from preftune.data.types import Example
from preftune.errors import DataError
from preftune.evaluate.kl import TokenKL, summed
from preftune.evaluate.samples import Drawn, looks, record, rows
from preftune.evaluate.wins import counted
from preftune.generate import Reply, Sampling
from preftune.model.load import open_renderer


def reply(ids: list[int], ended: bool = True) -> Reply:
    return Reply(np.array(ids, np.int32), np.zeros(len(ids), np.float32), ended)


DRAWN = Drawn(
    [np.array([1], np.int32), np.array([2], np.int32)],
    [[reply([1, 2, 3, 4, 1, 2, 3, 4]), reply([5])], [reply([6, 7], False), reply([6, 7], False)]],
    [["a b c d a b c d", "e"], ["f g", "f g"]],
)


def test_length_endings_repetition_and_variety() -> None:
    found = looks(DRAWN)
    assert found.tokens.value == pytest.approx(((8 + 1) / 2 + 2) / 2) and found.tokens.n == 2
    assert found.characters.value == pytest.approx(((15 + 1) / 2 + 3) / 2)
    assert found.repetition.value == pytest.approx((1 / 5 + 0) / 2 / 2)  # of five runs of four tokens one is said again
    assert found.distinct_1 == pytest.approx(7 / 13) and found.unique == pytest.approx(3 / 4)
    assert found.ended.value == 0.5 and 0 < found.ended.low < 0.5 < found.ended.high < 1


def test_where_all_or_none_end_there_is_an_interval_still() -> None:
    ended = looks(Drawn(DRAWN.prompts, [[reply([1])], [reply([2])]], [["a"], ["b"]])).ended
    assert (ended.value, ended.high) == (1.0, 1.0) and ended.low < 0.5


def test_implicit_reward_is_beta_times_the_log_ratios() -> None:
    def tokens(*ratios: float) -> TokenKL:
        return TokenKL(np.full(len(ratios), 0.5), np.array(ratios))

    kl = summed([[tokens(1.0, 2.0), tokens(-1.0)], [tokens(0.5, 0.5), tokens(0.0, 0.0)]])
    found = record(DRAWN, None, kl, Sampling(n=2), beta=0.2)
    assert found.implicit_reward is not None and found.implicit_reward.value == pytest.approx(
        0.2 * ((3 - 1) / 2 + (1 + 0) / 2) / 2
    )
    assert kl.per_response.value == pytest.approx((0.75 + 1.0) / 2) and kl.per_token.value == pytest.approx(0.5)


def test_no_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="no answer"):
        looks(Drawn([], [], []))


@pytest.mark.parametrize("text", ["I am sorry. 🙂 ærlig 日本", "", "plain"])
def test_pieces_are_the_answer_one_a_token(world: World, text: str) -> None:
    """Tokens of a byte-level tokenizer that only begin a character add nothing yet, and their character comes whole."""
    renderer = open_renderer(world.base)
    prompt = renderer.prompt_ids("hello")
    ids = [*renderer.tokenizer(text, add_special_tokens=False)["input_ids"], renderer.end_of_text]
    drawn = Drawn([prompt], [[reply(ids)]], [[text]])
    (row,) = rows([Example("x", "hello", ())], renderer, drawn, None, None)
    pieces = row["policy"][0]["pieces"]
    assert len(pieces) == len(ids) and "".join(pieces[:-1]) == text and pieces[-1] == renderer.tokenizer.eos_token
    assert row["reference"] == [] and row["preference"] is None and row["policy"][0]["log_ratios"] == []


def test_a_win_rate_is_percent_with_a_bootstrap_interval() -> None:
    found = counted([1.0, 0.75, 0.0, None, 0.5], judge="j", against="b", tokens=3.0)
    assert (found.n_total, found.n_wins, found.n_wins_base, found.n_draws, found.n_unscored) == (4, 2, 1, 1, 1)
    assert found.win_rate.value == pytest.approx(56.25) and found.win_rate.low < 56.25 < found.win_rate.high
    assert found.standard_error == pytest.approx(100 * np.std([1, 0.75, 0, 0.5], ddof=1) / 2)
