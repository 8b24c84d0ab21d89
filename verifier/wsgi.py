"""WSGI middleware (PEP 3333): claims for Flask, Django and every other WSGI application.

``environ["verifier.claims"]`` holds the verified claims, or None on an optional path without a token;
:func:`~verifier.current_claims` gives the same anywhere below, also while a body is being generated.

A worker thread that waits is a worker thread less: ``Trust-Position`` may hold one for ``min_position_wait_s``, an
unknown ``kid`` for half a second. With few threads, ``trust_position=False`` may be the better choice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from .bearer import Challenge, claims_variable
from .claims import Claims
from .guard import Guard, below, path_prefixes
from .verifier import Verifier

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["AuthMiddleware"]

_HEADERS: Final = (("HTTP_AUTHORIZATION", b"authorization"), ("HTTP_TRUST_POSITION", b"trust-position"))


class AuthMiddleware:
    """Verifies the bearer token of every request: :class:`verifier.asgi.AuthMiddleware` for WSGI, with its settings.

    The verifier must have been started; where a server forks after that, it starts over by itself in each worker
    (``wait_ready`` first, so that no fork falls into a fetch). Apache's mod_wsgi hands on the header only with
    ``WSGIPassAuthorization On``.
    """

    def __init__(
        self,
        app: WSGIApplication,
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
        self._guard = Guard(verifier, scopes=scopes, trust_position=trust_position, realm=realm)
        self._required = required
        self._optional_paths = path_prefixes(optional_paths)
        self._public_paths = path_prefixes(public_paths)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI entry point."""
        path = _path(environ)
        if below(path, self._public_paths):
            return self._app(environ, start_response)
        headers = _headers(environ)
        claims = self._guard.glance(headers)
        if claims is None:
            try:
                required = self._required and not below(path, self._optional_paths)
                claims = self._guard.admit_blocking(headers, required=required)
            except Challenge as challenge:
                return _refuse(environ, start_response, challenge, self._guard.realm)
        environ["verifier.claims"] = claims
        return _with_claims(claims, self._app, environ, start_response)


def _path(environ: WSGIEnvironment) -> str:
    text: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return text.encode("latin-1").decode("utf-8", "replace")  # PEP 3333: bytes that travel as latin-1


def _headers(environ: WSGIEnvironment) -> list[tuple[bytes, bytes]]:
    """As ASGI has them. A server that got a header twice has joined the values; neither has a comma of its own."""
    found = []
    for variable, name in _HEADERS:
        text = environ.get(variable)
        if text is not None:
            found += [(name, value) for value in text.encode("latin-1").split(b",")]
    return found


def _with_claims(
    claims: Claims | None, app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    previous = claims_variable.get()
    claims_variable.set(claims)
    lasting = False
    try:
        body = app(environ, start_response)
        lasting = type(body) not in (list, tuple)
    finally:
        if not lasting:
            claims_variable.set(previous)
    return _Body(body, previous) if lasting else body


class _Body:
    """A body that is still being made: the claims stay until the server closes it, as PEP 3333 says it must."""

    def __init__(self, body: Iterable[bytes], previous: Claims | None) -> None:
        self._body = body
        self._previous = previous

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        try:
            close: Callable[[], Any] | None = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            claims_variable.set(self._previous)  # not reset(token): a server may close in another context


def _refuse(
    environ: WSGIEnvironment, start_response: StartResponse, challenge: Challenge, realm: str | None
) -> list[bytes]:
    body = challenge.body()
    headers = [("content-type", "application/problem+json"), ("content-length", str(len(body)))]
    status = f"{challenge.status} {HTTPStatus(challenge.status).phrase}"
    start_response(status, headers + challenge.headers(realm))
    return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]
