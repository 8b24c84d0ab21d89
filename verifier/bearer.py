"""Bearer tokens in HTTP (RFC 6750): reading the headers, and the one place that makes refusals. Pure.

What a framework adds to a verification is here once, for all of them: which headers count, what a refusal looks like,
and the scopes that a caller must have. :mod:`verifier.guard` puts it together with a :class:`~verifier.Verifier`.

    400 invalid_request      the request cannot be read: two Authorization headers, a Trust-Position that is none
    401                      no bearer token (a bare challenge: RFC 6750 section 3.1 forbids an error code here)
    401 invalid_token        the token's fault; ``code`` is that of :class:`~verifier.InvalidToken`
    403 insufficient_scope   a good token without the scopes that are asked for
    503                      ours: ``code`` is that of :class:`~verifier.Undecidable`; Retry-After says when to retry
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from contextvars import ContextVar
from typing import Final

import msgspec

from .claims import Claims
from .errors import ConfigurationError, InvalidToken, Undecidable, VerifierError
from .log import FormatError, Position

__all__ = [
    "Challenge",
    "bearer_token",
    "challenge_for",
    "check_scopes",
    "checked_realm",
    "checked_scopes",
    "current_claims",
    "trust_position",
]

claims_variable: ContextVar[Claims | None] = ContextVar("claims", default=None)


def current_claims() -> Claims | None:
    """The claims of the request being handled, or None outside of one and for anonymous requests."""
    return claims_variable.get()


_TITLES: Final = {400: "Bad request", 401: "Unauthorized", 403: "Forbidden", 503: "Service unavailable"}


class Challenge(Exception):
    """A refusal as HTTP: ``status``, RFC 6750 ``error`` (None where no credentials came), ``code`` and a retry hint.

    ``scope`` names the scopes that are needed, where the lack of them is the reason.
    """

    def __init__(
        self,
        status: int,
        error: str | None = None,
        code: str | None = None,
        detail: str | None = None,
        retry_after_s: float | None = None,
        *,
        scope: str | None = None,
    ) -> None:
        self.status = status
        self.error = error
        self.code = code
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.scope = scope
        super().__init__(code or error or "no credentials")

    @property
    def stable_code(self) -> str:
        """What a client may branch on: ``code``, the RFC 6750 error, or ``token_required``."""
        return self.code or self.error or "token_required"

    def headers(self, realm: str | None = None) -> list[tuple[str, str]]:
        """``WWW-Authenticate`` (RFC 6750 section 3) for 4xx, ``Retry-After`` for 503; nothing is ever cached."""
        headers = [("cache-control", "no-store")]
        if self.retry_after_s is not None:
            headers.append(("retry-after", str(max(1, math.ceil(self.retry_after_s)))))
        if self.status < 500:
            parameters = {"realm": realm, "error": self.error, "error_description": self.detail, "scope": self.scope}
            text = ", ".join(f'{name}="{_quotable(value)}"' for name, value in parameters.items() if value)
            headers.append(("www-authenticate", f"Bearer {text}".strip()))
        return headers

    def problem(self) -> dict[str, str | int]:
        """The members of an RFC 9457 problem document."""
        problem: dict[str, str | int] = {"type": "about:blank", "title": _TITLES.get(self.status, "Error")}
        problem |= {"status": self.status, "code": self.stable_code}
        extra = {"detail": self.detail, "scope": self.scope}
        return problem | {name: value for name, value in extra.items() if value}

    def body(self) -> bytes:
        """An RFC 9457 problem document."""
        return msgspec.json.encode(self.problem())


def _quotable(text: str) -> str:
    """RFC 6750 section 3: no character outside %x20-21 / %x23-5B / %x5D-7E in a quoted value."""
    return "".join(character if " " <= character <= "~" and character not in '"\\' else "_" for character in text)


def bearer_token(authorization: Iterable[bytes]) -> str | None:
    """The token of the request's Authorization headers; None if there is no header. Raises :class:`Challenge`."""
    values = list(authorization)
    if not values:
        return None
    if len(values) > 1:
        raise Challenge(400, "invalid_request", detail="more than one Authorization header")
    scheme, _, token = values[0].strip(b" \t").partition(b" ")
    if scheme.lower() != b"bearer":
        raise Challenge(401)
    try:
        return token.strip(b" \t").decode("ascii")
    except UnicodeDecodeError:
        raise Challenge(401, "invalid_token", "token_malformed", detail="not ASCII") from None


def trust_position(values: Iterable[bytes]) -> str | None:
    """The ``Trust-Position`` of the request's headers of that name, if any. Raises :class:`Challenge`."""
    found = list(values)
    if not found:
        return None
    try:
        (value,) = found
        return str(Position.parse(value.strip(b" \t").decode("ascii")))
    except (FormatError, UnicodeDecodeError, ValueError):
        detail = "Trust-Position is one <epoch>-<seq>.<nonce>, as a receipt gives it"
        raise Challenge(400, "invalid_request", "position_invalid", detail) from None


def challenge_for(error: VerifierError) -> Challenge:
    """The HTTP form of a verification's refusal: 401 for the token's fault, 503 for ours."""
    if isinstance(error, InvalidToken):
        return Challenge(401, "invalid_token", error.code, str(error))
    retry_after_s = error.retry_after_s if isinstance(error, Undecidable) else 1.0
    return Challenge(503, None, error.code, str(error), retry_after_s)


def check_scopes(claims: Claims | None, scopes: Collection[str]) -> None:
    """Raises :class:`Challenge` unless the token has every one of ``scopes`` (403), or if there is none (401)."""
    if claims is None:
        raise Challenge(401)
    if not claims.scopes.issuperset(scopes):
        needed = " ".join(sorted(scopes))
        raise Challenge(403, "insufficient_scope", detail="the token lacks a scope that is needed", scope=needed)


def checked_scopes(scopes: Collection[str], setting: str = "scopes") -> frozenset[str]:
    """Scopes as a setting gives them. Raises :class:`ConfigurationError` for what no token can have."""
    if isinstance(scopes, str):
        raise ConfigurationError("setting_invalid", f"{setting} is a list of scopes, not one string", setting=setting)
    for scope in scopes:
        # RFC 6749 section 3.3: scope-token = 1*( %x21 / %x23-5B / %x5D-7E )
        if not scope or scope != _quotable(scope) or " " in scope:
            raise ConfigurationError("setting_invalid", f"{setting} has one that is no scope", setting=setting)
    return frozenset(scopes)


def checked_realm(realm: str | None) -> str | None:
    """A realm as a setting gives it. Raises :class:`ConfigurationError` for what cannot stand between quotes."""
    if realm is not None and realm != _quotable(realm):
        raise ConfigurationError("setting_invalid", "realm has a quote, a backslash or no ASCII", setting="realm")
    return realm
