"""``GET /.well-known/jwks.json``, answered in front of FastAPI's routing from ready bytes (RFC 7517 section 8.5).

The set is public: no credentials, any origin. It changes rarely, and its ETag is the SHA-256 of its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from keyservice.errors import KeySetUnavailable
from keyservice.keyring import Document

from .problems import problem

__all__ = ["JWKS_PATH", "JwksFirst"]

JWKS_PATH: Final = "/.well-known/jwks.json"


class JwksFirst:
    """Serves the key set; everything else goes to ``app``.

    ``document`` raises :class:`KeySetUnavailable` while there is none to serve.
    """

    def __init__(self, app: ASGIApp, document: Callable[[], Document], max_age_s: int) -> None:
        self._app = app
        self._document = document
        self._cache_control = f"public, max-age={max_age_s}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] != JWKS_PATH:
            await self._app(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD"):
            await problem(405, "method_not_allowed", "the key set is read with GET or HEAD", {"Allow": "GET, HEAD"})(
                scope, receive, send
            )
            return
        try:
            document = self._document()
        except KeySetUnavailable as error:
            await problem(503, error.code, str(error), {"Retry-After": "1"})(scope, receive, send)
        else:
            await self._serve(document, scope, send)

    async def _serve(self, document: Document, scope: Scope, send: Send) -> None:
        unchanged = _matches(scope, document.etag)
        headers = [
            (b"cache-control", self._cache_control),
            (b"etag", document.etag.encode()),
            (b"trust-generation", str(document.generation).encode()),
            (b"access-control-allow-origin", b"*"),
            (b"access-control-expose-headers", b"ETag, Trust-Generation"),
        ]
        if not unchanged:
            headers += [
                (b"content-type", b"application/jwk-set+json"),
                (b"content-length", str(len(document.body)).encode()),
            ]
        body = b"" if unchanged or scope["method"] == "HEAD" else document.body
        await send({"type": "http.response.start", "status": 304 if unchanged else 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _matches(scope: Scope, etag: str) -> bool:
    """If-None-Match by weak comparison (RFC 9110 section 13.1.2)."""
    for name, value in scope["headers"]:
        if name == b"if-none-match":
            listed = [item.strip().removeprefix("W/") for item in value.decode("latin-1").split(",")]
            if etag in listed or "*" in listed:
                return True
    return False
