"""Runs the annotation server until it is told to stop, on this machine alone unless the user says otherwise."""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from preftune.errors import ConfigError
from preftune.web.store import Store

_LOCAL = ("localhost", "127.0.0.1", "::1")


def serve(
    store: Store,
    *,
    host: str = "127.0.0.1",
    port: int = 8500,
    token: str | None = None,
    names: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Serves the page and returns on Ctrl-C or SIGTERM.

    token:  the secret that lets people in; None: a new one. A host that others can reach needs one that was chosen.
    names:  annotators, each with a link of their own; none: everybody with the token, under the name that they give.
    say:    told the links to open.

    Raises ConfigError where the address cannot be used or is open to others without a token.
    """
    try:
        import uvicorn

        from preftune.web.app import Door, build_app
    except ImportError as error:
        raise ConfigError(f"the page needs {error.name}: pip install 'preftune[web]', or judge with --terminal") from None
    if not _loopback(host) and token is None:
        raise ConfigError(f"--host {host}: others can reach this address; choose a --token that they need to know")
    if token is not None and len(token) < 8:
        raise ConfigError(f"--token: at least 8 characters, or it can be guessed; got {len(token)}")
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    if token is not None:
        store.use_token(hashlib.sha256(token.encode()).hexdigest())
    door = Door(token or secrets.token_urlsafe(16), tuple(names))
    hosts = (*_LOCAL, host, socket.gethostname())
    app = build_app(store, door, hosts=hosts, addresses=not _loopback(host))
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    for name, secret in [("you", door.token), *((n, door.personal(n)) for n in names)]:
        fragment = f"#token={quote(secret, safe='')}" + (f"&name={quote(name)}" if name in names else "")
        say(f"{name}: {address}{fragment}" if names else f"{address}{fragment}")
    each = f"{store.overlap} judgment{'s' * (store.overlap > 1)} each"
    say(f"{len(store.items):,} pairs, {each}, kept in {store.file}. Ctrl-C ends.")
    settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2)
    with suppress(KeyboardInterrupt):  # the way to end it
        uvicorn.Server(settings).run(sockets=[listening])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: a number from 0 (any free one) to 65535; got {port}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        hint = "; another --port, or 0 for any that is free" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}{hint}") from None


def token_of(token: str | None, file: Path | None) -> str | None:
    """The token as it was given, or from a file, where it stands in no list of processes."""
    if token is None or file is None:
        try:
            return file.read_text(encoding="utf-8").strip() if file else token
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {file}: cannot be read: {error}") from None
    raise ConfigError("--token and --token-file: give one of them")
