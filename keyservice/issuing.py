"""Access tokens (RFC 9068): the claims, and signing them with what is held in memory.

New tokens are RS256 with ``typ`` at+jwt and a ``kid``. A client that is pinned to HS256 gets the old form: ``typ`` JWT,
no ``kid``, signed with the shared secret. python-jose signs; nothing here verifies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from jose import jwt
from jose.backends.cryptography_backend import CryptographyRSAKey

from .core.ids import uuid7
from .envelope import Sealed
from .errors import SigningUnavailable

__all__ = ["Grant", "Issued", "Issuer", "SharedSecret", "SigningKey"]


class SigningKey(Sealed):
    """A private key ready to sign, and its ``kid``."""

    __slots__ = ("_key", "kid")

    def __init__(self, kid: str, private_pem: bytes) -> None:
        self.kid: Final = kid
        self._key = CryptographyRSAKey(private_pem, "RS256")

    def sign(self, claims: dict[str, Any]) -> str:
        """The compact token."""
        return str(jwt.encode(claims, self._key, "RS256", headers={"typ": "at+jwt", "kid": self.kid}))


class SharedSecret(Sealed):
    """The secret of HS256 tokens."""

    __slots__ = ("_secret",)

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def sign(self, claims: dict[str, Any]) -> str:
        """The compact token."""
        return str(jwt.encode(claims, self._secret, "HS256"))


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token is to say. ``after`` names the live cut-offs that do not hit it, ``authentication`` how its subject
    proved who it is (RFC 9068 section 2.2.1)."""

    sub: str
    client_id: str
    audience: tuple[str, ...]
    scope: str
    after: tuple[str, ...] = ()
    sid: str | None = None
    authentication: Mapping[str, Any] = field(default_factory=dict)


class Issued(NamedTuple):
    """A token and how many seconds it lasts, which may be fewer than usual."""

    token: str
    expires_in: int


class Issuer:
    """Makes access tokens for one issuer. ``signing_key`` and ``gate`` raise :class:`SigningUnavailable`.

    ``lifetime_max_s`` caps a token's life by that of its key.
    """

    def __init__(
        self,
        issuer: str,
        ttl_s: int,
        *,
        clock: Callable[[], float],
        signing_key: Callable[[], SigningKey],
        gate: Callable[[], None],
        lifetime_max_s: Callable[[], float],
        shared_secret: SharedSecret | None,
    ) -> None:
        self._issuer = issuer
        self._clock = clock
        self._signing_key = signing_key
        self._gate = gate
        self._lifetime_max_s = lifetime_max_s
        self._shared_secret = shared_secret
        self._ttl_s = ttl_s

    def issue(self, grant: Grant, alg: str = "RS256") -> Issued:
        """A signed access token; raises :class:`SigningUnavailable`, also for what ended while it was signed."""
        self._gate()
        claims = self.claims(grant)
        token = self._sign(claims, alg)
        self._gate()
        return Issued(token, claims["exp"] - claims["iat"])

    def _sign(self, claims: dict[str, Any], alg: str) -> str:
        if alg != "HS256":
            return self._signing_key().sign(claims)
        if self._shared_secret is None:
            raise SigningUnavailable("hs256_secret_missing", "JWT_SECRET is not set")
        return self._shared_secret.sign(claims)

    def claims(self, grant: Grant) -> dict[str, Any]:
        """RFC 9068 section 2.2; ``aud`` is a string where there is one audience (RFC 7519 section 4.1.3)."""
        now = self._clock()
        issued_at, lifetime_s = int(now), min(self._ttl_s, math.floor(self._lifetime_max_s()))
        if lifetime_s <= 0:
            message = "the key set could not be read for so long that the active key may have been replaced"
            raise SigningUnavailable("key_set_unconfirmed", message)
        claims: dict[str, Any] = {
            "iss": self._issuer,
            "sub": grant.sub,
            "aud": grant.audience[0] if len(grant.audience) == 1 else list(grant.audience),
            "client_id": grant.client_id,
            "iat": issued_at,
            "exp": issued_at + lifetime_s,
            "jti": uuid7(now),
        }
        optional = {"scope": grant.scope, "sid": grant.sid, "after": list(grant.after), **grant.authentication}
        return {**claims, **{name: value for name, value in optional.items() if value}}
