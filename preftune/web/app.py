"""The annotation page's server: sign in, get a pair, say which is better, take it back, look at the results.

    GET  /                 the page, or the door (401)       POST /api/enter    name and token
    GET  /results          agreement and disagreements       POST /api/next     the pair on this tab
    GET  /judgments.jsonl  all that was said                 POST /api/judge    a judgment; the next pair
    GET  /api/diff         both answers, differences marked  POST /api/undo     the last pair again

Handlers are plain functions of one thread: what they do is a few reads and one durable write, and nothing can come between.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from preftune.errors import PreftuneError
from preftune.web.guard import Guard
from preftune.web.results import jsonl, results
from preftune.web.show import differences, rendered, text_of, turns
from preftune.web.store import CHOICES, STRENGTHS, Given, Store, Task

_PAGES = Path(__file__).parent / "page"
_COOKIE = "preftune"
_MONTH = 30 * 24 * 3600
_LONGEST = {"name": 60, "why": 4_000, "key": 64, "tab": 64}


@dataclass(frozen=True)
class Door:
    """Who may come in. With `names` each of them has a token of their own, and only `token` itself opens the results."""

    token: str
    names: tuple[str, ...] = ()

    def personal(self, name: str) -> str:
        """The token of one annotator."""
        return hmac.new(self.token.encode(), f"annotator:{name}".encode(), hashlib.sha256).hexdigest()[:32]

    def opens(self, name: str, token: str) -> tuple[bool, bool]:
        """Whether `token` lets `name` in, and whether as the owner."""
        if hmac.compare_digest(token.encode(), self.token.encode()):
            return True, True
        known = name in self.names and hmac.compare_digest(token.encode(), self.personal(name).encode())
        return known, False


class Refused(Exception):
    """A request that cannot be answered, with the status and a sentence."""

    def __init__(self, status: int, why: str) -> None:
        """The status is one of HTTP's."""
        super().__init__(why)
        self.status, self.why = status, why


def build_app(store: Store, door: Door, *, hosts: tuple[str, ...], addresses: bool = False) -> Guard:
    """The server as an ASGI application, guarded. `hosts`, `addresses`: see Guard."""
    server = _Server(store, door)
    routes = [
        Route("/", server.page),
        Route("/results", server.results),
        Route("/judgments.jsonl", server.judgments),
        Route("/static/{name}", server.static),
        Route("/api/diff", _json(server.diff)),
        *(
            Route(f"/api/{f.__name__}", _json(f), methods=["POST"])
            for f in (server.enter, server.next, server.judge, server.undo)
        ),
    ]
    return Guard(Starlette(routes=routes), hosts=hosts, addresses=addresses)


def _json(handler: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
    """What a handler returns or raises, as JSON."""

    async def answer(request: Request) -> Response:
        try:
            given = await handler(request)
        except Refused as refused:
            return JSONResponse({"error": refused.why}, refused.status)
        except PreftuneError as error:
            return JSONResponse({"error": str(error)}, 500)
        return given if isinstance(given, Response) else JSONResponse(given)

    return answer


class _Server:
    def __init__(self, store: Store, door: Door) -> None:
        self.store, self.door = store, door
        self._pages = Environment(loader=FileSystemLoader(_PAGES), autoescape=select_autoescape(default=True))

    # pages

    async def page(self, request: Request) -> Response:
        try:
            name, owner = self._who(request)
        except Refused:
            return self._html("door.html.jinja", 401, names=self.door.names)
        return self._html("annotate.html.jinja", name=name, owner=owner)

    async def results(self, request: Request) -> Response:
        try:
            self._owner(request)
        except Refused as refused:
            return self._html("door.html.jinja", refused.status, names=(), why=refused.why)
        return self._html("results.html.jinja", results=results(self.store))

    async def judgments(self, request: Request) -> Response:
        try:
            self._owner(request)
        except Refused as refused:
            return JSONResponse({"error": refused.why}, refused.status)
        headers = {"content-disposition": 'attachment; filename="judgments.jsonl"'}
        return Response(jsonl(self.store.judgments()), media_type="application/jsonl", headers=headers)

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ("page.js", "door.js", "page.css"):
            return JSONResponse({"error": "no such file"}, 404)
        return FileResponse(_PAGES / name)

    def _html(self, template: str, status: int = 200, **values: Any) -> Response:
        return HTMLResponse(self._pages.get_template(template).render(**values), status)

    # the interface of the page

    async def enter(self, request: Request) -> Response:
        given = await _body(request)
        name, token = _text(given, "name").strip(), str(given.get("token", ""))
        if not name or not name.isprintable():
            raise Refused(400, "give a name, so that judgments can be told apart")
        known, owner = self.door.opens(name, token)
        if not known:
            await asyncio.sleep(0.5)  # guessing takes its time
            raise Refused(401, "this name and token do not fit together; the link that you were given has both")
        secret = secrets.token_urlsafe(32)
        self.store.sign_in(_digest(secret), name, owner=owner)
        response = JSONResponse({"name": name})
        response.set_cookie(_COOKIE, secret, max_age=_MONTH, httponly=True, samesite="strict", path="/")
        return response

    async def next(self, request: Request) -> Any:
        name, _ = self._who(request)
        return self._state(name, self.store.next(name, tab=_text(await _body(request), "tab")))

    async def judge(self, request: Request) -> Any:
        name, _ = self._who(request)
        body = await _body(request)
        saved = self.store.judge(name, self._given(body))
        return {"saved": saved, **self._state(name, self.store.next(name, tab=_text(body, "tab")))}

    async def undo(self, request: Request) -> Any:
        name, _ = self._who(request)
        tab = _text(await _body(request), "tab")
        task = self.store.undo(name, tab=tab)
        return {"undone": task is not None, **self._state(name, task or self.store.next(name, tab=tab))}

    async def diff(self, request: Request) -> Any:
        name, _ = self._who(request)
        task = self.store.task(self._item(request.query_params.get("item")), name)
        marked = differences(*(text_of(task.example.responses[k]) for k in (task.left, task.right)))
        if marked is None:
            raise Refused(400, "these answers are too long to compare word by word")
        return {"left": marked[0], "right": marked[1]}

    def _given(self, body: dict[str, Any]) -> Given:
        choice, strength, seconds = body.get("choice"), body.get("strength", "clear"), body.get("seconds", 0)
        if choice not in CHOICES:
            raise Refused(400, f"choice: expected one of {', '.join(CHOICES)}")
        if strength not in STRENGTHS:
            raise Refused(400, f"strength: expected one of {', '.join(STRENGTHS)}")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
            raise Refused(400, "seconds: expected a number that is not negative")
        if not (key := _text(body, "key")):
            raise Refused(400, "key: expected a text that names this judgment")
        return Given(key, self._item(body.get("item")), choice, strength, _text(body, "why").strip(), float(seconds))

    def _item(self, given: Any) -> int:
        item = int(given) if isinstance(given, str) and given.isdecimal() else given
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < len(self.store.items):
            raise Refused(400, "item: no such pair")
        return item

    def _state(self, name: str, task: Task | None) -> dict[str, Any]:
        return {"progress": self.store.progress(name)._asdict(), "task": _shown(task) if task else None}

    # who asks

    def _who(self, request: Request) -> tuple[str, bool]:
        secret = request.cookies.get(_COOKIE, "")
        found = self.store.signed_in(_digest(secret)) if secret else None
        if found is None:
            raise Refused(401, "sign in first, with your name and the token")
        return found

    def _owner(self, request: Request) -> None:
        if not self._who(request)[1]:
            raise Refused(403, "results are for whoever started the server: others' verdicts would sway yours")


def _shown(task: Task) -> dict[str, Any]:
    """What the page gets of a pair: texts alone. No id, no source, no name of a model, and not which came first in the file."""
    answers = {side: text_of(task.example.responses[k]) for side, k in (("left", task.left), ("right", task.right))}
    return {
        "item": task.item,
        "prompt": [turn._asdict() for turn in turns(task.example.prompt)],
        **{side: {"html": rendered(text), "text": text} for side, text in answers.items()},
    }


async def _body(request: Request) -> dict[str, Any]:
    try:
        given = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(given, dict):
        raise Refused(400, "expected a JSON object")
    return given


def _text(body: dict[str, Any], name: str) -> str:
    given = body.get(name, "")
    if not isinstance(given, str) or len(given) > _LONGEST[name]:
        raise Refused(400, f"{name}: expected a text of at most {_LONGEST[name]} characters")
    return given


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
