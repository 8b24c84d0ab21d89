"""Counts every request by application, route template, method and status class. ASGI, outermost."""

from __future__ import annotations

import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keyservice.telemetry import Metrics

from .jwks import JWKS_PATH

__all__ = ["Counting"]

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Counting:
    """``name`` is public or admin. What matches no route is counted as such, whatever its path."""

    def __init__(self, app: ASGIApp, metrics: Metrics, name: str) -> None:
        self._app = app
        self._metrics = metrics
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_mono = time.monotonic()
        status = 500

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observe)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(self._name, _route(scope), method, f"{status // 100}xx").inc()
            self._metrics.request_seconds.labels(self._name).observe(time.monotonic() - started_mono)


def _route(scope: Scope) -> str:
    if scope["path"] == JWKS_PATH:
        return JWKS_PATH
    return str(getattr(scope.get("route"), "path", "unmatched"))
