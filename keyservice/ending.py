"""Ending a session: the revocation first, its record after.

From the revocation on the session gets nothing more and its access tokens die everywhere, whether or not its record is
still there; the record goes so that Redis does not fill up, and stays while the revocation could not be stored.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Callable
from hashlib import sha256

import structlog

from .core.revocation import RevocationPolicy, sid_draft
from .errors import StoreError
from .receipts import Receipt
from .revoking import Revoker
from .sessions import SessionStore

__all__ = ["SessionEnd", "entry_id_for"]

_log = structlog.get_logger(__name__)


def entry_id_for(cause: str, kind: str, value: str) -> str:
    """The same id for the same thing revoked for the same cause, so that doing it again is a retry."""
    digest = sha256(f"{cause}\0{kind}\0{value}".encode()).digest()
    return f"{cause}-{urlsafe_b64encode(digest).rstrip(b'=').decode()}"


class SessionEnd:
    """``session_life_s`` is the longest that a session and its last token can live."""

    def __init__(
        self,
        revoker: Revoker,
        sessions: SessionStore,
        policy: RevocationPolicy,
        *,
        session_life_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._revoker = revoker
        self._sessions = sessions
        self._policy = policy
        self._session_life_s = session_life_s
        self._clock = clock

    async def revoke(self, sid: str, entry_id: str, reason: str = "") -> Receipt:
        """Revoke it and wait for the receipt; raises what :meth:`Revoker.revoke` raises: then nothing was done."""
        until = self._clock() + self._session_life_s
        return await self._revoker.revoke(sid_draft(sid, entry_id, until, self._policy, reason))

    async def forget(self, sid: str) -> None:
        """Delete the record of a revoked session."""
        try:
            await self._sessions.end(sid)
        except StoreError as error:
            _log.warning("revoked session not deleted; it expires by itself", code=error.code)
