"""Sessions and their one-time refresh tokens. Pure.

A refresh token is ``<sid>.<family><secret>``. The *family* part (128 random bits) stays the same as long as the session
lives; the *secret* (256 random bits) is new at each use. Of both only the SHA-256 is stored, inside the session's own
record, so that consuming a token and putting its successor in place is one compare-and-set (``refresh.lua``), which
tells four cases apart:

    fresh       the current token: consumed, its successor is current from now on
    repeated    the one consumed last, and within the grace: the same successor once more
    reused      any other token of the family, whose holder once had a good one: somebody has a copy; the family dies
    unknown     not of the family: a guess, or the token of a session that is over. The ``sid`` alone, which is in every
                access token, ends nobody's session

**The same successor, though only hashes are stored.** Two tabs that refresh at once, or a client whose answer was lost,
present one token twice. Both must get one successor, or the session forks or an honest user is logged out. Neither may
the successor be computable from the old token (then rotation would protect from nobody who has an old one), nor may a
reader of Redis be able to make it. So it is random, and stored for the grace alone, in a key of its own that expires:
sealed with AES-256-GCM under a key that HKDF-SHA-256 derives from the secret of the token that was presented. Redis
holds that secret's hash, which opens nothing; the presenter of the old token gets it opened, as long as it is there.

What that leaves: a thief who presents a stolen token within the grace of its honest use gets the same successor. From
then on both hold it; the next time they refresh further apart than the grace, the second one is a reuse, and both are
out. A thief and a user who refresh at different times are found out at once.

**After a failover that lost the last refresh** the old token is current again: it works once more, and the successor
that was lost is a reuse when it comes. A session that was ended and comes back is refused by its ``sid`` entry, which
is in the trust log and is looked for at each refresh. So no two successors last, and the worst is a new log-in.

What a session may do is fixed when it starts; a refresh can only narrow the scope (RFC 6749 section 6).
"""

from __future__ import annotations

import hashlib
import re
import secrets
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from typing import Any, Final, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = ["Redeemed", "RefreshToken", "Session", "narrowed_scope", "new_sid"]

Redeemed = Literal["fresh", "repeated", "reused", "unknown"]

_TOKEN: Final = re.compile(r"([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{22})([A-Za-z0-9_-]{43})\Z")
_NONCE_BYTES: Final = 12
_SEALING: Final = b"multiregion-jwks: successor of a refresh token, 1"


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
    authentication: dict[str, Any] = {}
    """``auth_time``, ``acr``, ``amr`` as the login service gave them, the same at each refresh (RFC 9068, 2.2.1)."""


def new_sid() -> str:
    """A session id of 128 random bits."""
    return secrets.token_urlsafe(16)


class RefreshToken:
    """The secret half of a session, as text once and as hashes ever after. In no ``repr``, never pickled."""

    __slots__ = ("_family", "_secret", "sid")

    def __init__(self, sid: str, family: str, secret: str) -> None:
        self.sid = sid
        self._family = family
        self._secret = secret

    @classmethod
    def new(cls, sid: str) -> RefreshToken:
        """The first one of a session."""
        return cls(sid, secrets.token_urlsafe(16), secrets.token_urlsafe(32))

    @classmethod
    def parse(cls, text: str) -> RefreshToken | None:
        """Read what a client sent; None if it is not of the form."""
        match = _TOKEN.match(text)
        return cls(match[1], match[2], match[3]) if match else None

    def successor(self) -> RefreshToken:
        """A new one of the same family."""
        return RefreshToken(self.sid, self._family, secrets.token_urlsafe(32))

    def reveal(self) -> str:
        """The text that the client gets."""
        return f"{self.sid}.{self._family}{self._secret}"

    @property
    def digest(self) -> str:
        """What is stored of the secret: SHA-256 of 256 random bits needs no salt and no stretching."""
        return hashlib.sha256(self._secret.encode()).hexdigest()

    @property
    def family_digest(self) -> str:
        """What is stored of the family part."""
        return hashlib.sha256(self._family.encode()).hexdigest()

    def seal(self, successor: RefreshToken) -> str:
        """The successor, for nobody but holders of this token. The nonce is random: two requests may seal at once."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = AESGCM(self._sealing_key()).encrypt(nonce, successor._secret.encode(), self.sid.encode())
        return b64encode(nonce + sealed).decode()

    def open(self, sealed: bytes | str) -> RefreshToken | None:
        """What :meth:`seal` of an equal token made; None if it is anything else."""
        try:
            raw = b64decode(sealed, validate=True)
            opened = AESGCM(self._sealing_key()).decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], self.sid.encode())
        except (Base64Error, InvalidTag, ValueError):
            return None
        return RefreshToken(self.sid, self._family, opened.decode())

    def _sealing_key(self) -> bytes:
        return HKDF(SHA256(), 32, salt=self.sid.encode(), info=_SEALING).derive(self._secret.encode())

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
