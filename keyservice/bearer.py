"""Who may use the admin API: the one place where an admin token is judged.

Only RS256 tokens that this system signed by ``client_credentials`` count (``sub`` is the client itself, no session),
for the audience ``<issuer>/admin``. HS256 is never accepted: every microservice knows that secret.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from verifier.decision import Rules, Trust, UnknownKid, check_revoked, check_static, find_revoked_kid
from verifier.errors import InvalidToken
from verifier.jwk import KeySet
from verifier.revocations import Snapshot

from .errors import KeyserviceError

__all__ = ["ADMIN_SCOPE", "AdminBearer", "BearerRefused", "Caller"]

ADMIN_SCOPE: Final = "keyservice:admin"
"""Implies every other scope of the admin API."""


class BearerRefused(KeyserviceError):
    """RFC 6750 section 3.1. ``status`` is 401 (no or bad token), 403 (scope) or 503 (no keys to check with)."""

    def __init__(self, code: str, message: str, *, status: int) -> None:
        self.status = status
        super().__init__(code, message)


@dataclass(frozen=True, slots=True)
class Caller:
    """A client that showed a good token."""

    client_id: str
    scopes: frozenset[str]


class AdminBearer:
    """Checks ``Authorization: Bearer …`` against the keys and revocations in memory."""

    def __init__(
        self,
        *,
        issuer: str,
        audience: str,
        leeway_s: float,
        max_token_lifetime_s: float,
        clock: Callable[[], float],
        keys: Callable[[], KeySet | None],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        self._rules = Rules(
            issuer=issuer,
            audiences=frozenset({audience}),
            algorithms=frozenset({"RS256"}),
            leeway_s=leeway_s,
            max_token_lifetime_s=max_token_lifetime_s,
        )
        self._trust = Trust(self._rules, None)
        self._clock = clock
        self._keys = keys
        self._snapshot = snapshot

    def check(self, authorization: str | None, scope: str) -> Caller:
        """The caller, if its token is good and has ``scope``; raises :class:`BearerRefused`."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise BearerRefused("token_missing", "an Authorization: Bearer header is needed", status=401)
        caller = self._identify(token.strip())
        if scope not in caller.scopes and ADMIN_SCOPE not in caller.scopes:
            raise BearerRefused("insufficient_scope", f"the token lacks scope {scope}", status=403)
        return caller

    def _identify(self, token: str) -> Caller:
        keys = self._keys()
        if keys is None:
            raise BearerRefused("keys_unavailable", "no keys to check the token with yet", status=503)
        try:
            if self._trust.keys is not keys:
                self._trust = Trust(self._rules, keys)
            verified = check_static(token, self._trust, self._clock())
            check_revoked(verified, self._snapshot())
        except InvalidToken as refused:
            error = refused
            if isinstance(refused, UnknownKid):  # perhaps it is gone because it was revoked
                error = find_revoked_kid(refused, self._snapshot()) or refused
            raise BearerRefused(error.code, str(error), status=401) from None
        members = verified.members
        client_id = members.get("client_id")
        if not isinstance(client_id, str) or members.get("sub") != client_id or "sid" in members:
            raise BearerRefused("grant_not_allowed", "only client_credentials tokens are accepted here", status=401)
        scope = members.get("scope", "")
        return Caller(client_id, frozenset(scope.split() if isinstance(scope, str) else ()))
