"""ASGI middleware: claims for the application, RFC 6750 answers for everyone else.

``scope["state"]["claims"]`` (Starlette and FastAPI: ``request.state.claims``) holds the verified claims, or None on an
optional path without a token; :func:`~verifier.current_claims` gives the same anywhere below.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any

from .bearer import Challenge, bearer_token, challenge_for, claims_variable
from .claims import Claims
from .errors import InvalidToken, Undecidable
from .verifier import Verifier

__all__ = ["AuthMiddleware"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_POLICY_VIOLATION, _TRY_AGAIN_LATER = 1008, 1013  # RFC 6455 section 7.4.1, and the IANA registry of close codes


class AuthMiddleware:
    """Verifies the bearer token of every HTTP request and WebSocket.

    ``required=True``: no token is 401. Below ``optional_paths`` (or everywhere with ``required=False``) a request
    without a token passes with ``claims`` None, and one with a bad token is refused all the same. ``public_paths`` are
    passed through untouched. Paths are prefixes of whole segments.
    """

    def __init__(
        self,
        app: App,
        verifier: Verifier,
        *,
        required: bool = True,
        optional_paths: Collection[str] = (),
        public_paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._verifier = verifier
        self._required = required
        self._optional_paths = tuple(path.rstrip("/") for path in optional_paths)
        self._public_paths = tuple(path.rstrip("/") for path in public_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] not in ("http", "websocket") or _below(scope["path"], self._public_paths):
            await self._app(scope, receive, send)
            return
        try:
            claims = await self._authenticate(scope)
        except (Challenge, InvalidToken, Undecidable) as error:
            await _refuse(scope, send, error if isinstance(error, Challenge) else challenge_for(error))
            return
        scope.setdefault("state", {})["claims"] = claims
        reset = claims_variable.set(claims)
        try:
            await self._app(scope, receive, send)
        finally:
            claims_variable.reset(reset)

    async def _authenticate(self, scope: Scope) -> Claims | None:
        token = bearer_token(value for name, value in scope["headers"] if name == b"authorization")
        if token is not None:
            return await self._verifier.averify(token)
        if self._required and not _below(scope["path"], self._optional_paths):
            raise Challenge(401)
        return None


def _below(path: str, prefixes: Iterable[str]) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


async def _refuse(scope: Scope, send: Send, challenge: Challenge) -> None:
    if scope["type"] == "websocket":
        code = _POLICY_VIOLATION if challenge.status < 500 else _TRY_AGAIN_LATER
        await send({"type": "websocket.close", "code": code, "reason": challenge.error or challenge.code or ""})
        return
    body = challenge.body()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in challenge.headers()]
    await send({"type": "http.response.start", "status": challenge.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
