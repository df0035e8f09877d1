"""What stands between the network and the pages: which requests are answered at all, and what every answer says to a browser.

421  the Host is none of ours          a name that was made to point here (DNS rebinding) gets nothing
403  a request sent by another site    (Origin, Sec-Fetch-Site)
415  a change that is not JSON         forms of other sites cannot send it
413  a body larger than a judgment is
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 64 * 1024  # bytes

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application around another one. `hosts`: names by which this server may be called, without the port."""

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], addresses: bool = False) -> None:
        """`addresses`: any IP address is a name of ours too. No name can be made to point at one by others."""
        self.app, self.hosts, self.addresses = app, {h.lower() for h in hosts}, addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers or passes on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        status, why = self._refusal(scope["method"], headers)
        body = b""
        if not status:
            body, too_large = await _read(receive)
            if too_large:
                status, why = 413, f"at most {LARGEST_BODY:,} bytes are read"
        if status:
            await _answer(send, status, why)
            return

        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_encoded(_HEADERS)]
            await send(message)

        await self.app(scope, again, guarded)

    def _refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str]:
        host = headers.get("host", "")
        if not self._ours(host):
            return 421, "this server is not called so; use the address that it printed when it started"
        if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")) > LARGEST_BODY:
            return 413, f"at most {LARGEST_BODY:,} bytes are read"
        if method in ("GET", "HEAD"):
            return 0, ""
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return 403, "the request was sent by another site"
        if headers.get("origin", f"http://{host}").removeprefix("https://").removeprefix("http://") != host:
            return 403, "the request was sent by another site"
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "expected application/json"
        return 0, ""

    def _ours(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower()
        return name in self.hosts or self.addresses and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _read(receive: Receive) -> tuple[bytes, bool]:
    """The body, and whether it is larger than allowed."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            return b"", True
        if not message.get("more_body", False):
            return body, False


async def _answer(send: Send, status: int, why: str) -> None:
    content = json.dumps({"error": why}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **_HEADERS}
    await send({"type": "http.response.start", "status": status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": content})


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
