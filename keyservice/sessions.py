"""Sessions on the primary: one hash per session, with a time to live, written and read by :class:`SessionStore`."""

from __future__ import annotations

import msgspec

from .core.sessions import RefreshToken, Session
from .store import Node

__all__ = ["SessionStore"]


def _key(sid: str) -> str:
    return f"{{ks}}:session:{sid}"


class SessionStore:
    """Every method raises :class:`StoreError`."""

    def __init__(self, primary: Node) -> None:
        self._primary = primary

    async def start(self, session: Session, token: RefreshToken) -> None:
        """Store a session and its first refresh token."""
        key = _key(session.sid)
        data = msgspec.json.encode(session)
        await self._primary.run("session_start.lua", (key,), [data.decode(), token.digest, str(session.expires_at)])

    async def get(self, sid: str) -> Session | None:
        """The session, or None if it ended, expired or never was."""
        raw = await self._primary.write("HGET", _key(sid), "data")
        try:
            return msgspec.json.decode(raw, type=Session) if raw else None
        except msgspec.DecodeError:
            return None

    async def replace_token(self, old: RefreshToken, new: RefreshToken) -> bool:
        """Consume ``old`` and put ``new`` in its place; False if ``old`` was used before or the session is gone."""
        return bool(await self._primary.run("refresh.lua", (_key(old.sid),), [old.digest, new.digest]))

    async def end(self, sid: str) -> None:
        """Forget a session and its refresh token."""
        await self._primary.write("DEL", _key(sid))
