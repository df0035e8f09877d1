"""Asking a server: everything that can go wrong on the way is tried again, or said; the key stays where it belongs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tape_server import TapeServer, serving

from preftune.asking.records import Answer, Failed, Ledger, Request
from preftune.asking.replies import Replies, ask
from preftune.asking.server import Server
from preftune.data.types import Message
from preftune.errors import ConfigError, ServerError, StorageError

Connect = Callable[..., Server]
CANARY = "sk-canary-0123456789abcdef"


def requests(n: int, **settings: Any) -> list[Request]:
    return [Request("m", (Message("user", f"question {k}"),), **settings) for k in range(n)]


def answers(server: Server, asked: list[Request]) -> dict[str, Answer | Failed]:
    left = asked[::-1]
    return {r.messages[0].content: a for r, a in server.answers(lambda: left.pop() if left else None)}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Servers that do not wait long between tries, closed at the end."""
    monkeypatch.setattr("preftune.asking.server._FIRST_PAUSE", 0.02)
    opened: list[Server] = []

    def connect(url: str, **settings: Any) -> Server:
        opened.append(Server(url, **settings))
        return opened[-1]

    yield connect
    for server in opened:
        server.close()


@pytest.mark.parametrize("fault", ["429", "429-date", "500", "503", "drop", "cut", "empty", "garbage", "408"])
def test_what_may_pass_is_tried_again(fault: str, quick: Connect) -> None:
    with serving(TapeServer(reply=lambda m: m[0]["content"].upper(), faults={0: fault})) as state:
        server = quick(state.url)
        found = answers(server, requests(1))
    assert found["question 0"].text == "QUESTION 0"  # type: ignore[union-attr]
    assert (state.n_requests, server.n_tried_again) == (2, 1)


def test_a_slow_server_is_given_its_time_and_then_asked_again(quick: Connect) -> None:
    with serving(TapeServer(reply=lambda m: "late", faults={0: "slow"})) as state:
        assert answers(quick(state.url, timeout=0.3), requests(1))["question 0"].text == "late"  # type: ignore[union-attr]
    assert state.n_requests == 2


def test_retry_after_is_honoured_by_everybody(quick: Connect) -> None:
    with serving(TapeServer(reply=lambda m: "yes", faults={0: "429"})) as state:
        server = quick(state.url, concurrency=1)
        answers(server, requests(2))
    assert state.times[1] - state.times[0] >= 0.29, "the server asked for 0.3 s"


def test_a_wait_beyond_the_bound_is_a_failure_with_its_reason(quick: Connect) -> None:
    with serving(TapeServer(reply=lambda m: "yes", faults={0: "429-date"})) as state:
        found = answers(quick(state.url, longest_wait=0.01), requests(1))
    assert isinstance(found["question 0"], Failed)
    assert "longer than 0.01 s" in found["question 0"].reason
    assert state.n_requests == 1


def test_tries_are_bounded_and_the_others_go_on(quick: Connect) -> None:
    with serving(TapeServer(reply=lambda m: "yes", faults={0: "500", 1: "500"})) as state:
        found = answers(quick(state.url, retries=1, concurrency=1), requests(2))
    assert found["question 0"] == Failed("HTTP 500, 2 times")
    assert found["question 1"].text == "yes"  # type: ignore[union-attr]


def test_a_refused_request_is_not_repeated(quick: Connect) -> None:
    with serving(TapeServer()) as state:
        found = answers(quick(state.url), requests(1))
    assert isinstance(found["question 0"], Failed) and "HTTP 400" in found["question 0"].reason
    assert state.n_requests == 1


def test_what_a_server_does_not_take_is_left_out_from_then_on(quick: Connect) -> None:
    refuses = {
        "response_format": "response_format is not supported by this model",
        "top_logprobs": "Unsupported parameter: 'logprobs'",
        "max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
    }
    with serving(TapeServer(reply=lambda m: "yes", refuses=refuses)) as state:
        server = quick(state.url, concurrency=1)
        found = answers(server, requests(3, top_logprobs=5, schema='{"type": "object"}'))
    assert [a.text for a in found.values()] == ["yes"] * 3  # type: ignore[union-attr]
    assert state.n_requests == 3 + len(refuses)
    assert state.bodies[-1].keys() == {"model", "messages", "temperature", "max_completion_tokens"}


@pytest.mark.parametrize(("status", "words"), [("401", "the key was refused"), ("404", "no such address or model")])
def test_what_no_repetition_mends_ends_everything(status: str, words: str, quick: Connect) -> None:
    with (
        serving(TapeServer(faults=dict.fromkeys(range(9), status))) as state,
        pytest.raises(ServerError, match=words) as error,
    ):
        answers(quick(state.url, concurrency=1), requests(3))
    assert state.n_requests == 1
    assert "\x1b" not in str(error.value), "what a server says carries no control characters"


def test_a_server_that_is_gone_is_not_asked_for_every_row(quick: Connect) -> None:
    with pytest.raises(ServerError, match="does not answer"):
        answers(quick("http://127.0.0.1:9/v1", retries=0, concurrency=1), requests(50))


def test_so_many_at_once_and_no_more(quick: Connect) -> None:
    with serving(TapeServer(reply=lambda m: "yes", delay=0.05)) as state:
        assert len(answers(quick(state.url, concurrency=4), requests(12))) == 12
    assert 2 <= state.most_at_once <= 4


def test_what_is_sent_is_what_was_asked(quick: Connect) -> None:
    with serving(TapeServer(reply=lambda m: "yes")) as state:
        answers(quick(state.url), requests(1))
        answers(quick(state.url), requests(1, temperature=0.5, top_p=0.9, seed=3, stop=("x",), top_logprobs=5, min_p=0.1))
    plain, full = state.bodies
    assert plain == {
        "model": "m",
        "messages": [{"role": "user", "content": "question 0"}],
        "temperature": 0.0,
        "max_tokens": 512,
    }
    assert full | {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "top_logprobs": 5, "min_p": 0.1} == full
    assert full["logprobs"] is True and "sample" not in full


def test_the_key_reaches_the_server_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    quick: Connect,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with (
        caplog.at_level(logging.DEBUG),
        serving(TapeServer(reply=lambda m: f"your key is {CANARY}", faults={1: "401"})) as state,
        Replies(tmp_path / "replies.sqlite") as replies,
    ):
        found = list(ask(quick(state.url), requests(1), replies=replies, ledger=Ledger()))
        with pytest.raises(ServerError) as error:
            answers(quick(state.url), requests(1))
    assert state.headers[0]["authorization"] == f"Bearer {CANARY}"
    out = capfd.readouterr()
    said = [
        repr(found),
        str(error.value),
        caplog.text,
        out.out,
        out.err,
        *(f.read_bytes().decode("latin1") for f in tmp_path.iterdir()),
    ]
    assert not [text for text in said if CANARY in text]
    assert "your key is [key]" in repr(found) and "[key]" in str(error.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://[", ""])
def test_an_address_is_checked(url: str) -> None:
    with pytest.raises(ConfigError, match="base-url"):
        Server(url)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="OPENAI_API_KEY alone") as error:
        Server("http://me:secretword@127.0.0.1/v1")
    assert "secretword" not in str(error.value)


# ---- what is remembered, and what it costs ----------------------------------------------------------------------------


def priced(content: str, tokens_in: int = 10, tokens_out: int = 4) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
    return {"choice": {"message": message, "finish_reason": "stop"}, "usage": usage}


def test_a_second_run_asks_nothing(tmp_path: Path, quick: Connect) -> None:
    ledger, again = Ledger(price_in=2e6, price_out=1e6), Ledger(price_in=2e6, price_out=1e6)
    with serving(TapeServer(reply=lambda m: priced(m[0]["content"]))) as state:
        for book in (ledger, again):
            with Replies(tmp_path / "r.sqlite") as replies:
                found = dict(ask(quick(state.url), requests(5), replies=replies, ledger=book))
            assert [found[k].text for k in range(5)] == [f"question {k}" for k in range(5)]  # type: ignore[union-attr]
    assert state.n_requests == 5
    assert (ledger.n_requests, ledger.tokens_in, ledger.tokens_out, ledger.cost) == (5, 50, 20, 120.0)
    assert (again.n_requests, again.n_remembered, again.cost, again.as_dict()["cost_of_all_answers"]) == (0, 5, 0.0, 120.0)


def test_equal_requests_are_asked_once_and_other_samples_again(tmp_path: Path, quick: Connect) -> None:
    asked = requests(1) * 3 + requests(1, sample=1) + requests(1, temperature=0.5)
    with serving(TapeServer(reply=lambda m: "yes")) as state, Replies(tmp_path / "r.sqlite") as replies:
        found = dict(ask(quick(state.url), asked, replies=replies, ledger=Ledger()))
    assert len(found) == 5 and state.n_requests == 3


def test_what_could_not_be_read_is_not_remembered(tmp_path: Path, quick: Connect) -> None:
    with serving(TapeServer(reply=lambda m: "what?")) as state, Replies(tmp_path / "r.sqlite") as replies:
        for _ in range(2):
            list(ask(quick(state.url), requests(1), replies=replies, ledger=Ledger(), keep=lambda index, answer: False))
    assert state.n_requests == 2


def test_another_server_is_another_question(tmp_path: Path, quick: Connect) -> None:
    with Replies(tmp_path / "r.sqlite") as replies:
        for _ in range(2):
            with serving(TapeServer(reply=lambda m: "yes")) as state:
                list(ask(quick(state.url), requests(1), replies=replies, ledger=Ledger()))
            assert state.n_requests == 1


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_money_is_never_exceeded(tmp_path: Path, concurrency: int, quick: Connect) -> None:
    asked = requests(30, max_tokens=4)
    most = Ledger(price_in=1e6, price_out=1e6).price(*asked[-1].most_tokens)
    ledger, limit = Ledger(price_in=1e6, price_out=1e6), most * 2.5
    with serving(TapeServer(reply=lambda m: priced("yes"))) as state, Replies(tmp_path / "r.sqlite") as replies:
        found = dict(ask(quick(state.url, concurrency=concurrency), asked, replies=replies, ledger=ledger, max_cost=limit))
    refused = [a for a in found.values() if isinstance(a, Failed) and not a.asked]
    assert len(found) == 30 and len(refused) == 30 - state.n_requests > 0
    assert limit - most < ledger.cost <= limit, "as much as fits, and not more"


def test_tokens_that_nobody_counted_are_booked_at_the_most(tmp_path: Path, quick: Connect) -> None:
    ledger = Ledger(price_in=1e6, price_out=1e6)
    with serving(TapeServer(reply=lambda m: "four")) as state, Replies(tmp_path / "r.sqlite") as replies:
        list(ask(quick(state.url), requests(1), replies=replies, ledger=ledger))
    assert ledger.n_uncounted == 1
    assert ledger.tokens_in >= len("question 0") and ledger.tokens_out == 5


def test_a_file_that_is_none_of_ours_is_said(tmp_path: Path) -> None:
    (tmp_path / "r.sqlite").write_text("not a database, and long enough to be looked at " * 40)
    with pytest.raises(StorageError, match="--cache"):
        Replies(tmp_path / "r.sqlite")


def test_interrupted_in_the_middle_keeps_what_came(tmp_path: Path, quick: Connect) -> None:
    with serving(TapeServer(reply=lambda m: "yes", delay=0.02)) as state:
        with Replies(tmp_path / "r.sqlite") as replies:
            going = ask(quick(state.url, concurrency=2), requests(20), replies=replies, ledger=Ledger())
            for _ in range(6):
                next(going)
            began = time.monotonic()
            going.close()
            assert time.monotonic() - began < 0.5, "nobody waits for what is under way"
        time.sleep(0.1)
        before = state.n_requests
        with Replies(tmp_path / "r.sqlite") as replies:
            assert len(list(ask(quick(state.url), requests(20), replies=replies, ledger=Ledger()))) == 20
    assert state.n_requests - before == 14
