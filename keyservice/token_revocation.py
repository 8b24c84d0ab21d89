"""Token revocation (RFC 7009): a client ends what it was given, and nobody else's.

An access token is revoked by its ``jti``. A refresh token, current or not, ends its session: the session's access
tokens die with it, and its record goes once the revocation is replicated, so that a retry still finds it. What this
system did not issue, has expired, or belongs to another client is left alone, and the caller is told no more than that
all is well. Doing it again is a retry: the same token leads to the same entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from verifier.mirroring import View

from .clients import Client
from .core.revocation import Draft
from .core.sessions import RefreshToken
from .ending import SessionEnd, entry_id_for
from .own_tokens import OwnTokens
from .receipts import Receipt
from .revoking import Revoker
from .sessions import SessionStore

__all__ = ["TokenRevocation"]

REASON: Final = "revoked by its client"


class TokenRevocation:
    """Raises what :meth:`Revoker.revoke` raises, StoreError and CannotVouch: then nothing was done."""

    def __init__(
        self,
        tokens: OwnTokens,
        sessions: SessionStore,
        end: SessionEnd,
        revoker: Revoker,
        *,
        view: Callable[[], View],
    ) -> None:
        self._tokens = tokens
        self._sessions = sessions
        self._end = end
        self._revoker = revoker
        self._view = view

    async def revoke(self, client: Client, token: str) -> Receipt | None:
        """The receipt; None where there is nothing to revoke."""
        refresh = RefreshToken.parse(token)
        return await (self._access(client, token) if refresh is None else self._session(client, refresh))

    async def _session(self, client: Client, token: RefreshToken) -> Receipt | None:
        session = await self._sessions.of_family(token)
        if session is None or session.client_id != client.client_id:
            return None
        receipt = await self._end.revoke(session.sid, entry_id_for("revoke", "sid", session.sid), REASON)
        if receipt.replicated:
            await self._end.forget(session.sid)
        return receipt

    async def _access(self, client: Client, token: str) -> Receipt | None:
        verified = self._tokens.check(token, self._view())
        if verified is None or verified.facts.client_id != client.client_id:
            return None
        facts = verified.facts
        kind, value = ("jti", facts.jti) if facts.jti is not None else ("tok", verified.tok or "")
        entry_id = entry_id_for("revoke", kind, value)
        exp = float(verified.members["exp"])
        return await self._revoker.revoke(Draft(entry_id, kind, facts.issuer, value, None, REASON, exp))
