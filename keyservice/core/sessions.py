"""Sessions and their one-time refresh tokens. Pure.

A refresh token is ``<sid>.<256 random bits>``. Only the SHA-256 of the random part is stored, inside the session's own
record, so consuming a token and putting its successor in place is one compare-and-set on one key. What a session may do
is fixed when it starts; a refresh can only narrow the scope (RFC 6749 section 6).
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final

import msgspec

__all__ = ["RefreshToken", "Session", "narrowed_scope", "new_sid"]

_TOKEN: Final = re.compile(r"([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{43})\Z")


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A session as it stands in ``{ks}:session:<sid>``. Times are Unix seconds."""

    sid: str
    sub: str
    client_id: str
    audience: tuple[str, ...]
    scope: str
    created_at: int
    expires_at: int
    after: tuple[str, ...] = ()
    """Ids of the cut-offs that were known and live when the session began: they do not hit it."""


def new_sid() -> str:
    """A session id of 128 random bits."""
    return secrets.token_urlsafe(16)


class RefreshToken:
    """The secret half of a session, as text once and as a hash ever after. In no ``repr``, never pickled."""

    __slots__ = ("_secret", "sid")

    def __init__(self, sid: str, secret: str) -> None:
        self.sid = sid
        self._secret = secret

    @classmethod
    def new(cls, sid: str) -> RefreshToken:
        """A fresh one for this session."""
        return cls(sid, secrets.token_urlsafe(32))

    @classmethod
    def parse(cls, text: str) -> RefreshToken | None:
        """Read what a client sent; None if it is not of the form."""
        match = _TOKEN.match(text)
        return cls(match[1], match[2]) if match else None

    def reveal(self) -> str:
        """The text that the client gets."""
        return f"{self.sid}.{self._secret}"

    @property
    def digest(self) -> str:
        """What is stored: SHA-256 of 256 random bits needs no salt and no stretching."""
        return hashlib.sha256(self._secret.encode()).hexdigest()

    def __repr__(self) -> str:
        return "RefreshToken(…)"

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("a refresh token is not to be serialised")


def narrowed_scope(granted: str, wanted: str | None) -> str | None:
    """``wanted`` if it is within ``granted``, ``granted`` if nothing is asked for, else None."""
    if wanted is None:
        return granted
    names = wanted.split()
    return " ".join(names) if set(names) <= set(granted.split()) else None
