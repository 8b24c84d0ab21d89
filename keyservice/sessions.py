"""Sessions on the primary: one hash per session, with a time to live, written and read by :class:`SessionStore`.

Beside it stands, for the grace alone, the sealed successor of the refresh token that was consumed last
(:mod:`keyservice.core.sessions`).
"""

from __future__ import annotations

import hmac
from typing import Any, NamedTuple, cast

import msgspec
from redis.exceptions import RedisError

from .core.sessions import Redeemed, RefreshToken, Session
from .errors import PrimaryUnreachable, StoreError
from .store import Node

__all__ = ["Redemption", "SessionStore"]


def _key(sid: str) -> str:
    return f"{{ks}}:session:{sid}"


def _successor_key(sid: str) -> str:
    return f"{{ks}}:successor:{sid}"


class Redemption(NamedTuple):
    """What a presented refresh token was, and its successor if it gets one."""

    outcome: Redeemed
    successor: RefreshToken | None


class SessionStore:
    """Every method raises :class:`StoreError`. ``own`` is the region's own server, which may be behind."""

    def __init__(self, primary: Node, own: Node, *, grace_s: float) -> None:
        self._primary = primary
        self._own = own
        self._grace_ms = round(grace_s * 1000)

    async def start(self, session: Session, token: RefreshToken) -> None:
        """Store a session and its first refresh token."""
        data = msgspec.json.encode(session).decode()
        arguments = [data, token.family_digest, token.digest, str(session.expires_at)]
        await self._primary.run("session_start.lua", (_key(session.sid),), arguments)

    async def get(self, sid: str) -> Session | None:
        """The session, or None if it ended, expired or never was."""
        return _decode((await self._held_by_primary(sid))[0])

    async def redeem(self, old: RefreshToken) -> Redemption:
        """Consume ``old``. After :class:`OutcomeUnknown` it may be consumed, and can be repeated within the grace."""
        new = old.successor()
        keys = (_key(old.sid), _successor_key(old.sid))
        arguments = (old.digest, old.family_digest, new.digest, old.seal(new), str(self._grace_ms))
        answer = await self._primary.run("refresh.lua", keys, arguments)
        outcome = cast(Redeemed, answer[0].decode())
        if outcome == "fresh":
            return Redemption(outcome, new)
        if outcome == "repeated":
            given = old.open(answer[1])
            return Redemption(outcome if given is not None else "unknown", given)
        return Redemption(outcome, None)

    async def of_family(self, token: RefreshToken) -> Session | None:
        """The session whose refresh tokens this is one of, current or not; None if there is none.

        While the primary is unreachable the own server answers, for what it holds: what it lacks may be there all the
        same, and then :class:`StoreError` is raised.
        """
        try:
            held = await self._held_by_primary(token.sid)
        except StoreError:
            held = await self._held_here(token.sid)
            if held[0] is None:
                raise
        data, family = held
        if not hmac.compare_digest(family or b"", token.family_digest.encode()):
            return None
        return _decode(data)

    async def _held_by_primary(self, sid: str) -> list[Any]:
        return list(await self._primary.run("session_get.lua", (_key(sid),), ()))

    async def _held_here(self, sid: str) -> list[Any]:
        try:
            return list(await self._own.redis.hmget(_key(sid), ["data", "family"]))
        except (RedisError, OSError):
            raise PrimaryUnreachable from None

    async def end(self, sid: str) -> None:
        """Forget a session and its refresh tokens."""
        await self._primary.write("DEL", _key(sid), _successor_key(sid))


def _decode(raw: bytes | None) -> Session | None:
    try:
        return msgspec.json.decode(raw, type=Session) if raw else None
    except msgspec.DecodeError:
        return None
