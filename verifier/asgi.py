"""ASGI middleware: claims for the application, RFC 6750 answers for everyone else.

``scope["state"]["claims"]`` (Starlette and FastAPI: ``request.state.claims``) holds the verified claims, or None on an
optional path without a token; :func:`~verifier.current_claims` gives the same anywhere below.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from typing import Any, Final

from .bearer import Challenge, claims_variable
from .guard import Guard, below, path_prefixes
from .verifier import Verifier

__all__ = ["VERIFIED_BY", "AuthMiddleware", "refuse"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_POLICY_VIOLATION, _TRY_AGAIN_LATER = 1008, 1013  # RFC 6455 section 7.4.1, and the IANA registry of close codes
_GUARDED: Final = ("http", "websocket")
VERIFIED_BY: Final = "verifier.verified_by"
_DENIAL: Final = "websocket.http.response"


class AuthMiddleware:
    """Verifies the bearer token of every HTTP request and WebSocket.

    ``required=True``: no token is 401. Below ``optional_paths`` (or everywhere with ``required=False``) a request
    without a token passes with ``claims`` None, and one with a bad token is refused all the same. ``public_paths`` are
    passed through untouched. Paths are prefixes of whole segments. ``scopes``: every token must have all of them (403).

    A request's ``Trust-Position`` header makes its answer wait until the verifier has got that far, at most
    ``min_position_wait_s`` and only after its token was found good; ``trust_position=False`` ignores the header.

    A refused WebSocket gets the same answer as a request where the server can give one, else close code 1008, or 1013
    for 503.
    """

    def __init__(
        self,
        app: App,
        verifier: Verifier,
        *,
        required: bool = True,
        optional_paths: Collection[str] = (),
        public_paths: Collection[str] = (),
        scopes: Collection[str] = (),
        trust_position: bool = True,
        realm: str | None = None,
    ) -> None:
        self._app = app
        self._verifier = verifier
        self._guard = Guard(verifier, scopes=scopes, trust_position=trust_position, realm=realm)
        self._required = required
        self._optional_paths = path_prefixes(optional_paths)
        self._public_paths = path_prefixes(public_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] not in _GUARDED or (self._public_paths and below(scope["path"], self._public_paths)):
            await self._app(scope, receive, send)
            return
        claims = self._guard.glance(scope["headers"])
        if claims is None:
            try:
                required = self._required and not below(scope["path"], self._optional_paths)
                claims = await self._guard.admit(scope["headers"], required=required)
            except Challenge as challenge:
                await refuse(scope, send, challenge, self._guard.realm)
                return
        scope.setdefault("state", {})["claims"] = claims
        scope[VERIFIED_BY] = (self._verifier, claims)
        reset = claims_variable.set(claims)
        try:
            await self._app(scope, receive, send)
        finally:
            claims_variable.reset(reset)


async def refuse(
    scope: Scope, send: Send, challenge: Challenge, realm: str | None, more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Send a refusal over HTTP, or as the answer to a WebSocket's handshake; ``more`` headers go with it."""
    kind = "http.response"
    if scope["type"] == "websocket":
        if _DENIAL not in (scope.get("extensions") or {}):
            code = _POLICY_VIOLATION if challenge.status < 500 else _TRY_AGAIN_LATER
            await send({"type": "websocket.close", "code": code, "reason": challenge.stable_code})
            return
        kind = _DENIAL
    body = challenge.body()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in challenge.headers(realm)]
    headers += more
    await send({"type": f"{kind}.start", "status": challenge.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": b"" if scope.get("method") == "HEAD" else body})
