"""The server over real HTTP: who gets in, what is refused, what every answer says, that nothing is lost and that it is fast."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from annotation_for_tests import TOKEN, Annotation, write_pairs
from worlds import cli

from preftune.data.judgments import read_judgments


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Annotation]:
    folder = tmp_path_factory.mktemp("server")
    with Annotation(write_pairs(folder / "pairs.jsonl", 40), folder / "work.db", "--overlap", "9") as running:
        yield running


def test_nobody_gets_in_without_the_token(server: Annotation) -> None:
    stranger = server.stranger()
    for method, path in (("GET", "/"), ("GET", "/results"), ("GET", "/judgments.jsonl"), ("GET", "/api/diff?item=0")):
        status, body, _ = stranger.ask(method, path)
        assert status == 401 and "question" not in str(body)
    for path in ("/api/next", "/api/judge", "/api/undo"):
        assert stranger.ask("POST", path, {"tab": "1"})[0] == 401
    status, body, headers = stranger.ask("POST", "/api/enter", {"name": "eve", "token": "guess"})
    assert status == 401 and "set-cookie" not in headers and "do not fit" in body["error"]
    stranger.cookie = "preftune=made-up"
    assert stranger.ask("POST", "/api/next", {"tab": "1"})[0] == 401


def test_the_cookie_is_for_this_site_and_no_script(server: Annotation) -> None:
    _, _, headers = server.stranger().ask("POST", "/api/enter", {"name": "ada", "token": TOKEN})
    cookie = headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie


@pytest.mark.parametrize("path", ["/", "/results", "/static/page.js", "/nothing"])
def test_what_every_answer_says(server: Annotation, path: str) -> None:
    """A policy without exceptions, no sharing with other sites, no copies kept."""
    _, _, headers = server.person("ada").ask("GET", path)
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:80"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({}, 200),
        ({"Content-Type": "application/json; charset=utf-8", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_requests_of_other_sites(server: Annotation, headers: dict[str, str], status: int) -> None:
    ada = server.person("ada")
    given = {name.replace("-", "_"): value for name, value in headers.items()}
    assert ada.ask("POST", "/api/next", {"tab": "1"}, **given)[0] == status


def test_a_host_of_ours_with_the_origin_of_it(server: Annotation) -> None:
    ada = server.person("ada")
    host = f"localhost:{server.port}"
    assert ada.ask("POST", "/api/next", {"tab": "1"}, Host=host, Origin=f"http://{host}")[0] == 200
    assert ada.ask("POST", "/api/next", {"tab": "1"}, Host=host, Origin="http://localhost:1")[0] == 403


def test_large_and_broken_bodies(server: Annotation) -> None:
    ada = server.person("ada")
    assert ada.ask("POST", "/api/judge", raw=b'{"why": "' + b"x" * 70_000 + b'"}')[0] == 413
    ada = server.person("ada")

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 8_000

    ada.connection.request(
        "POST", "/api/judge", chunks(), {"Content-Type": "application/json", "Cookie": ada.cookie}, encode_chunked=True
    )
    assert ada.connection.getresponse().status == 413
    ada = server.person("ada")
    for raw in (b"", b"{", b"[]", b"[" * 30_000, b"\xff\xfe", b'"text"'):
        status, body, _ = ada.ask("POST", "/api/judge", raw=raw)
        assert status == 400 and body["error"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({"item": item}, "no such pair") for item in (40, -1, None, True)),
        *(({"choice": choice}, "expected one of left, right") for choice in ("best", None)),
        *(({"seconds": seconds}, "not negative") for seconds in (-1, "1", True)),
        ({"strength": "very"}, "slight, clear"),
        ({"why": "x" * 4001}, "at most 4000"),
        ({"why": 3}, "expected a text"),
        ({"key": ""}, "names this judgment"),
    ],
)
def test_a_judgment_that_makes_no_sense_is_refused(server: Annotation, change: dict[str, object], said: str) -> None:
    given = {"item": 0, "choice": "left", "key": "k", "tab": "1", "seconds": 1.0} | change
    status, body, _ = server.person("mallory").ask("POST", "/api/judge", given)
    assert status == 400 and said in body["error"]


def test_model_names_ids_and_sources_never_reach_the_page(tmp_path: Path) -> None:
    rows = [{"id": "secret-id", "prompt": "q", "responses": ["one", "two"], "models": ["model-a", "model-b"]}]
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(rows[0]) + "\n")
    with Annotation(data, tmp_path / "a.db", "--format", "prompt_responses") as running:
        sent = json.dumps(running.person("ada").next())
    assert "one" in sent and not any(word in sent for word in ("secret-id", "model-a", "pairs.jsonl", "chosen", "rejected"))


def test_links_of_their_own(tmp_path: Path) -> None:
    """With names, each has a token that opens for that name alone, and results stay with whoever has the first token."""
    words = ("--annotator", "ada", "--annotator", "bob")
    with Annotation(write_pairs(tmp_path / "p.jsonl", 2), tmp_path / "a.db", *words) as running:
        links = dict(line.split(": ", 1) for line in running.said.splitlines() if "#token" in line)
        tokens = {name: link.split("token=")[1].split("&")[0].strip() for name, link in links.items()}
        assert set(tokens) == {"you", "ada", "bob"} and len(set(tokens.values())) == 3
        ada = running.person("ada", tokens["ada"])
        assert ada.next()["task"] and ada.ask("GET", "/results")[0] == 403 and ada.ask("GET", "/judgments.jsonl")[0] == 403
        for name, token in (("bob", tokens["ada"]), ("eve", tokens["ada"]), ("eve", tokens["bob"])):
            assert running.stranger().ask("POST", "/api/enter", {"name": name, "token": token})[0] == 401
        assert running.person("boss", tokens["you"]).ask("GET", "/results")[0] == 200


def test_killed_in_the_middle_nothing_that_was_saved_is_lost(tmp_path: Path) -> None:
    """Whatever the server said it has saved is there after kill -9; sessions go on, and the order too."""
    data = write_pairs(tmp_path / "pairs.jsonl", 60)
    with Annotation(data, tmp_path / "a.db") as running:
        ada = running.person("ada")
        task, saved = ada.next()["task"], []
        threading.Timer(0.4, running.kill).start()
        try:
            while task:
                answer = ada.judge(task["item"], "left", f"k{len(saved)}")
                assert answer["saved"]
                saved.append(task["item"])
                task = answer["task"]
        except (OSError, http.client.HTTPException):  # the connection broke, in whatever way
            pass
        running.process.join()
        running.start()
        again = running.stranger(ada.cookie)
        task = again.next()["task"]
        assert again.judge(saved[-1], "left", f"k{len(saved) - 1}")["saved"], "it is there"
        while task:
            task = again.judge(task["item"], "right", f"again{task['item']}")["task"]
        assert running.stop() == 0
    done = cli("annotate", data, "--db", tmp_path / "a.db", "--export", tmp_path / "j.jsonl")
    assert done.code == 0 and done.out.startswith("60 judgments in")
    assert len({j.example for j in read_judgments(tmp_path / "j.jsonl")}) == 60


def test_eight_annotators_and_ten_thousand_pairs(tmp_path: Path) -> None:
    """Everything that was said is there, each pair as often as asked, and 95 of 100 answers come within 50 ms."""
    n = 20  # judgments of each
    with Annotation(write_pairs(tmp_path / "pairs.jsonl", 10_000), tmp_path / "a.db") as running:
        waits: list[float] = []
        said: list[tuple[str, int]] = []

        def work(name: str) -> None:
            someone = running.person(name)
            task = someone.next()["task"]
            for turn in range(n):
                time.sleep(0.15)  # nobody reads faster
                start = time.perf_counter()
                answer = someone.judge(task["item"], "left", f"{name}{turn}")
                waits.append(time.perf_counter() - start)
                assert answer["saved"]
                said.append((name, task["item"]))
                task = answer["task"]

        people = [threading.Thread(target=work, args=(f"p{i}",)) for i in range(8)]
        for thread in people:
            thread.start()
        for thread in people:
            thread.join()
        _, text, _ = running.person("boss").ask("GET", "/judgments.jsonl")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == len(said) == 8 * n and len({item for _, item in said}) == 8 * n
    assert statistics.quantiles(waits, n=20)[-1] < 0.05


def test_wider_than_this_machine_only_with_a_token(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "p.jsonl", 2)
    for words, said in (
        (["--host", "0.0.0.0"], "choose a --token"),
        (["--token", "short"], "at least 8 characters"),
        (["--port", "70000"], "from 0"),
        (["--token", TOKEN, "--token-file", "x"], "give one of them"),
        (["--token-file", str(tmp_path / "none")], "cannot be read"),
    ):
        done = cli("annotate", data, "--db", tmp_path / "a.db", *words)
        assert done.code == 2 and said in done.err and "Traceback" not in done.err, done.err


def test_a_port_that_is_taken(server: Annotation, tmp_path: Path) -> None:
    done = cli("annotate", server.data, "--db", tmp_path / "a.db", "--port", server.port)
    assert done.code == 2 and "another --port, or 0" in done.err


def test_another_token_signs_everybody_out(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "p.jsonl", 2)
    with Annotation(data, tmp_path / "a.db") as running:
        cookie = running.person("ada").cookie
    with Annotation(data, tmp_path / "a.db") as running:
        assert running.stranger(cookie).ask("POST", "/api/next", {"tab": "1"})[0] == 200, "a restart signs nobody out"
    with Annotation(data, tmp_path / "a.db", "--token", "another-token") as running:
        assert running.stranger(cookie).ask("POST", "/api/next", {"tab": "1"})[0] == 401


def test_the_token_is_in_no_output(tmp_path: Path) -> None:
    """It stands in the link that is printed at the start, and nowhere else: not in the file, not in a log."""
    with Annotation(write_pairs(tmp_path / "p.jsonl", 2), tmp_path / "a.db") as running:
        ada = running.person("ada")
        ada.judge(ada.next()["task"]["item"], "left", "k")
        running.stranger().ask("GET", f"/?token={TOKEN}")
        running.process.terminate()
        running.process.join()
        link, rest = running.said.split("\n", 1)
        assert TOKEN in link and TOKEN not in rest
    for file in tmp_path.glob("a.db*"):
        assert TOKEN.encode() not in file.read_bytes()
