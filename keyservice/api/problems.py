"""Every HTTP error is made here.

* ``/oauth2/*``: RFC 6749 section 5.2, ``{"error", "error_description"}``.
* elsewhere: RFC 9457 problem documents, ``{"type", "title", "status", "code", "detail"}``.

A 503 says when to come back. What happened is told exactly: ``primary_unreachable`` means that nothing was done,
``outcome_unknown`` that it may have been.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final, cast

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from keyservice.bearer import BearerRefused
from keyservice.errors import KeyserviceError, OAuthError, OutcomeUnknown, Refused, RequestRefused, StoreError

__all__ = ["install", "json_response", "problem", "problem_of"]

RETRY_AFTER_S: Final = 1


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer; nothing of this service is to be stored by a cache."""
    merged = {"Cache-Control": "no-store", **(headers or {})}
    return Response(msgspec.json.encode(content), status, merged, media_type="application/json")


def problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None, **members: Any) -> Response:
    """An RFC 9457 problem document; ``members`` are its extension members."""
    document = {
        "type": f"urn:multiregion-jwks:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        **members,
    }
    merged = {"Cache-Control": "no-store", **(headers or {})}
    if status == 503:
        merged["Retry-After"] = str(RETRY_AFTER_S)
    return Response(msgspec.json.encode(document), status, merged, media_type="application/problem+json")


def problem_of(error: KeyserviceError) -> tuple[int, str]:
    """Status and code of an error of ours."""
    if isinstance(error, RequestRefused | BearerRefused | OAuthError):
        return error.status, error.code
    if isinstance(error, Refused):
        return 503, f"primary_refused_{error.code.lower()}"
    return 503, error.code


def _oauth(request: Request, error: KeyserviceError) -> Response:
    """RFC 6749 has no code for a store that is away but ``temporarily_unavailable``; the description names it."""
    status, code = problem_of(error)
    headers = {"Pragma": "no-cache"}
    if status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
        code = "temporarily_unavailable"
    if status == 401 and "authorization" in request.headers:
        headers["WWW-Authenticate"] = 'Basic realm="oauth2", charset="UTF-8"'  # RFC 6749 section 5.2
    own = isinstance(error, OAuthError) or code != "temporarily_unavailable"
    description = str(error) if own else f"{_public_name(error)}: {error}"
    return json_response({"error": code, "error_description": description}, status, headers)


def _public_name(error: KeyserviceError) -> str:
    refused = isinstance(error, Refused) and error.code != "READONLY"  # that one is no primary: as good as away
    unreachable = isinstance(error, StoreError) and not isinstance(error, OutcomeUnknown) and not refused
    return "session_store_unreachable" if unreachable else problem_of(error)[1]


def _bearer(error: BearerRefused) -> Response:
    """RFC 6750 section 3: the challenge names an error only if there was a token."""
    named = {401: 'Bearer error="invalid_token"', 403: 'Bearer error="insufficient_scope"'}
    challenge = "Bearer" if error.code == "token_missing" else named.get(error.status)
    headers = {"WWW-Authenticate": challenge} if challenge else None
    return problem(error.status, error.code, str(error), headers)


async def _on_error(request: Request, raised: Exception) -> Response:
    error = cast(KeyserviceError, raised)  # registered for that class
    request.scope["keyservice.error"] = error.code
    if request.url.path.startswith("/oauth2/"):
        return _oauth(request, error)
    if isinstance(error, BearerRefused):
        return _bearer(error)
    status, code = problem_of(error)
    return problem(status, code, str(error))


async def _on_http_error(request: Request, raised: Exception) -> Response:
    error = cast(HTTPException, raised)  # registered for that class
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    headers = dict(error.headers) if error.headers else None
    if request.url.path.startswith("/oauth2/"):
        return json_response({"error": "invalid_request", "error_description": code}, error.status_code, headers)
    return problem(error.status_code, code, error.detail, headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    del request, error  # logged by the server with its traceback
    return problem(500, "internal_error", "a mistake in the key service; it has been logged")


def install(app: FastAPI) -> None:
    """Answer every error of this application in its one form."""
    app.add_exception_handler(KeyserviceError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
