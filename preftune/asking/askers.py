"""Who answers for a model's name: a server that has them all, or models on this machine.

with Askers("http://127.0.0.1:8000/v1") as askers:
    askers.of("judge-1")
"""

from __future__ import annotations

from types import TracebackType

from preftune.asking.records import Asker
from preftune.asking.server import Server


class Askers:
    """Whoever answers for a model's name: one server for all, or a local model each, loaded when it is asked for."""

    def __init__(
        self,
        base_url: str | None,
        *,
        concurrency: int = 8,
        retries: int = 6,
        timeout: float = 120.0,
        template: str | None = None,
        device: str = "auto",
    ) -> None:
        """`base_url` None: models on this machine. Raises ConfigError for an address that cannot be used.

        concurrency, retries, timeout: of the server (`Server`). template, device: of local models.
        """
        self._server: Server | None = None
        if base_url is not None:
            self._server = Server(base_url, concurrency=concurrency, retries=retries, timeout=timeout)
        self._template, self._device = template, device

    def __enter__(self) -> Askers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._server is not None:
            self._server.close()

    def of(self, model: str) -> Asker:
        """Who answers for this model."""
        if self._server is not None:
            return self._server
        from preftune.asking.local import Local  # torch, which a server does without

        return Local(model, template=self._template, device=self._device)
