"""Bearer tokens in HTTP (RFC 6750): reading the header, and the one place that makes refusals. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final

import msgspec

from .claims import Claims
from .errors import InvalidToken, Undecidable, VerifierError

__all__ = ["Challenge", "bearer_token", "challenge_for", "current_claims"]

claims_variable: ContextVar[Claims | None] = ContextVar("claims", default=None)


def current_claims() -> Claims | None:
    """The claims of the request being handled, or None outside of one and for anonymous requests."""
    return claims_variable.get()


_TITLES: Final = {400: "Bad request", 401: "Unauthorized", 403: "Forbidden", 503: "Service unavailable"}


class Challenge(Exception):
    """A refusal as HTTP: ``status``, RFC 6750 ``error`` (None where no credentials came), ``code`` and a retry hint."""

    def __init__(
        self,
        status: int,
        error: str | None = None,
        code: str | None = None,
        detail: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.status = status
        self.error = error
        self.code = code
        self.detail = detail
        self.retry_after_s = retry_after_s
        super().__init__(code or error or "no credentials")

    def headers(self) -> list[tuple[str, str]]:
        """``WWW-Authenticate`` (RFC 6750 section 3) for 4xx, ``Retry-After`` for 503; nothing is ever cached."""
        headers = [("cache-control", "no-store")]
        if self.retry_after_s is not None:
            headers.append(("retry-after", str(max(1, math.ceil(self.retry_after_s)))))
        if self.status < 500:
            parameters = [("error", self.error), ("error_description", self.detail)]
            text = ", ".join(f'{name}="{value}"' for name, value in parameters if value)
            headers.append(("www-authenticate", f"Bearer {text}".strip()))
        return headers

    def body(self) -> bytes:
        """An RFC 9457 problem document."""
        problem = {"type": "about:blank", "title": _TITLES.get(self.status, "Error"), "status": self.status}
        extra = {"code": self.code or self.error or "token_required", "detail": self.detail}
        return msgspec.json.encode(problem | {name: value for name, value in extra.items() if value})


def bearer_token(authorization: Iterable[bytes]) -> str | None:
    """The token of the request's Authorization headers; None if there is no header. Raises :class:`Challenge`."""
    values = list(authorization)
    if not values:
        return None
    if len(values) > 1:
        raise Challenge(400, "invalid_request", detail="more than one Authorization header")
    scheme, _, token = values[0].strip().partition(b" ")
    if scheme.lower() != b"bearer":
        raise Challenge(401)
    try:
        return token.strip().decode("ascii")
    except UnicodeDecodeError:
        raise Challenge(401, "invalid_token", "token_malformed", detail="not ASCII") from None


def challenge_for(error: VerifierError) -> Challenge:
    """The HTTP form of a verification's refusal: 401 for the token's fault, 503 for ours."""
    if isinstance(error, InvalidToken):
        return Challenge(401, "invalid_token", error.code, str(error))
    retry_after_s = error.retry_after_s if isinstance(error, Undecidable) else 1.0
    return Challenge(503, None, error.code, str(error), retry_after_s)
