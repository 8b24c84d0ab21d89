"""Granting tokens: who may get which, for the token endpoint and for sessions.

``client_credentials`` needs nothing but memory. Sessions and refresh tokens live on the primary: without it a new
session gets an access token and no refresh token, and a refresh is refused by name. Before a refresh token is consumed,
its session is checked against the revocations in memory, so a revoked session or subject gets nothing even where its
record is still there; that record is then deleted. A refresh token that is used again ends its session everywhere
(:mod:`keyservice.core.sessions`).

One grant looks at one snapshot of the revocations. With two, a cut-off that arrives in between would be named in the
claim ``after`` of a token that it was meant to hit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from verifier.revocations import Snapshot

from .clients import Client
from .core.sessions import RefreshToken, Session, narrowed_scope, new_sid
from .ending import SessionEnd, entry_id_for
from .errors import KeyserviceError, OAuthError, RequestRefused, StoreError
from .issuing import Grant, Issuer
from .limits import AUDIENCES_MAX, SCOPE_CHARS_MAX
from .sessions import SessionStore
from .telemetry import Metrics

__all__ = ["Granted", "Granting"]

_log = structlog.get_logger(__name__)
_USED: Final = "the refresh token is unknown, expired, revoked or was used before"
REUSED: Final = "refresh token reused"
"""The reason in the trust log."""


@dataclass(frozen=True, slots=True)
class Granted:
    """A token and what belongs to it."""

    access_token: str
    expires_in: int
    scope: str
    sid: str | None = None
    refresh_token: RefreshToken | None = None

    def response(self) -> dict[str, str | int]:
        """RFC 6749 section 5.1."""
        body: dict[str, str | int] = {
            "access_token": self.access_token,
            "token_type": "Bearer",
            "expires_in": self.expires_in,
        }
        if self.scope:
            body["scope"] = self.scope
        if self.refresh_token is not None:
            body["refresh_token"] = self.refresh_token.reveal()
        return body


class Granting:
    """Decides and signs. ``snapshot`` gives the revocations known now."""

    def __init__(
        self,
        issuer: Issuer,
        sessions: SessionStore,
        end: SessionEnd,
        metrics: Metrics,
        *,
        issuer_name: str,
        session_ttl_s: int,
        clock: Callable[[], float],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        self._issuer = issuer
        self._sessions = sessions
        self._end = end
        self._metrics = metrics
        self._issuer_name = issuer_name
        self._session_ttl_s = session_ttl_s
        self._clock = clock
        self._snapshot = snapshot

    def client_credentials(self, client: Client, audience: str | None, scope: str | None) -> Granted:
        """RFC 6749 section 4.4. Without ``audience`` the client must have just one; without ``scope`` it gets all."""
        if audience is None and len(client.audiences) > 1:
            raise OAuthError("invalid_request", f"audience is needed: one of {', '.join(client.audiences)}")
        chosen = audience or client.audiences[0]
        if chosen not in client.audiences:
            raise OAuthError("invalid_target", "the client may not have this audience")  # RFC 8707 section 2
        granted = narrowed_scope(" ".join(client.scopes), scope)
        if granted is None:
            raise OAuthError("invalid_scope", "the client may not have this scope")
        after = self._after(self._snapshot(), None, client.client_id)
        grant = Grant(client.client_id, client.client_id, (chosen,), granted, after)
        return self._count(self._issue(grant, client), client, "client_credentials")

    async def start_session(
        self,
        client: Client,
        sub: str,
        audience: tuple[str, ...],
        scope: str | None,
        authentication: Mapping[str, Any] | None = None,
    ) -> Granted:
        """A session for somebody whom the caller has identified. Raises :class:`RequestRefused`.

        Where it cannot be stored it has no refresh token, and lasts as long as its access token.
        """
        granted = narrowed_scope(" ".join(client.scopes), scope)
        if granted is None or len(granted) > SCOPE_CHARS_MAX:
            raise RequestRefused("scope_not_allowed", "the client may not have this scope")
        if not 0 < len(audience) <= AUDIENCES_MAX or not set(audience) <= set(client.audiences):
            raise RequestRefused("audience_not_allowed", "the client may not have this audience")
        now = int(self._clock())
        session = Session(
            sid=new_sid(),
            sub=sub,
            client_id=client.client_id,
            audience=audience,
            scope=granted,
            created_at=now,
            expires_at=now + self._session_ttl_s,
            after=self._after(self._snapshot(), sub, client.client_id),
            authentication=dict(authentication or {}),
        )
        grant = _grant(session, granted, session.after)
        issued = self._count(self._issue(grant, client), client, "session")
        token = await self._store(session)
        return Granted(issued.access_token, issued.expires_in, granted, session.sid, token)

    async def _store(self, session: Session) -> RefreshToken | None:
        """Its first refresh token; None if that is not known to be stored."""
        token = RefreshToken.new(session.sid)
        try:
            await self._sessions.start(session, token)
        except StoreError as error:
            _log.warning("session not stored: no refresh token for it", code=error.code)
            self._metrics.sessions.labels("not_stored").inc()
            return None
        self._metrics.sessions.labels("stored").inc()
        return token

    async def refresh(self, client: Client, presented: str, scope: str | None) -> Granted:
        """RFC 6749 section 6, with rotation: the token is consumed and replaced in one step. Raises StoreError.

        Signed first: what cannot be signed consumes nothing.
        """
        old = RefreshToken.parse(presented)
        session = await self._sessions.get(old.sid) if old is not None else None
        if old is None or session is None or not self._is_current(session, client):
            raise self._refused("unknown")
        snapshot = self._snapshot()
        if self._is_revoked(session, snapshot):
            await self._end.forget(session.sid)
            raise self._refused("revoked")
        granted = narrowed_scope(session.scope, scope)
        if granted is None:
            raise OAuthError("invalid_scope", "more than the session was given")
        after = self._after(snapshot, session.sub, session.client_id)
        issued = self._issue(_grant(session, granted, after), client)
        outcome, new = await self._sessions.redeem(old)
        if outcome == "reused":
            await self._end_family(session)
        if new is None:
            raise self._refused(outcome)
        self._metrics.refreshes.labels(outcome).inc()
        self._count(issued, client, "refresh_token")
        return Granted(issued.access_token, issued.expires_in, granted, session.sid, new)

    def _refused(self, outcome: str) -> OAuthError:
        self._metrics.refreshes.labels(outcome).inc()
        return OAuthError("invalid_grant", _USED)

    async def _end_family(self, session: Session) -> None:
        """Somebody has a copy of a refresh token: the session's access tokens die everywhere too.

        The record is dead already; while the revocation cannot be stored, the next reuse tries again.
        """
        named = {"sid": session.sid, "sub": session.sub, "client_id": session.client_id}
        _log.warning("refresh token used again: its session is revoked", **named)
        try:
            await self._end.revoke(session.sid, entry_id_for("reuse", "sid", session.sid), REUSED)
        except KeyserviceError as error:
            _log.error(
                "session of a reused refresh token not revoked: its last token runs out", code=error.code, **named
            )
        else:
            await self._end.forget(session.sid)

    def _is_current(self, session: Session, client: Client) -> bool:
        return session.client_id == client.client_id and self._clock() < session.expires_at

    def _is_revoked(self, session: Session, snapshot: Snapshot) -> bool:
        hit = snapshot.find(
            issuer=self._issuer_name,
            sid=session.sid,
            sub=session.sub,
            client_id=session.client_id,
            iat=session.created_at,
            after=session.after,
        )
        return hit is not None

    def _after(self, snapshot: Snapshot, sub: str | None, client_id: str) -> tuple[str, ...]:
        """The live cut-offs that this token comes after, so that they do not hit it."""
        return snapshot.live_cutoffs(self._issuer_name, sub or client_id, client_id, self._clock())

    def _issue(self, grant: Grant, client: Client) -> Granted:
        issued = self._issuer.issue(grant, client.token_alg)
        return Granted(issued.token, issued.expires_in, grant.scope, grant.sid)

    def _count(self, granted: Granted, client: Client, kind: str) -> Granted:
        self._metrics.tokens.labels(kind, client.token_alg).inc()
        return granted


def _grant(session: Session, scope: str, after: tuple[str, ...]) -> Grant:
    return Grant(session.sub, session.client_id, session.audience, scope, after, session.sid, session.authentication)
