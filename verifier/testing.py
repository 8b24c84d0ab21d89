"""Helpers for the tests of services that embed a verifier: keys, tokens, revocations and a clock without servers.

keys = StaticKeys(make_key())
revocations = StaticRevocations()
verifier = Verifier(issuer="https://id.test", audience="orders", jwks_urls=None, jwks=keys.jwks, redis_url=revocations)
token = sign(keys[0], {"iss": "https://id.test", "aud": "orders", "sub": "ada", "jti": "1"})
revocations.revoke("jti", "1", issuer="https://id.test")
"""

from __future__ import annotations

import threading
import time
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from .freshness import Freshness, Heard
from .jwk import thumbprint
from .log import CUTOFF_KINDS, NEVER_EXPIRES, Entry, Epoch, Generation, Position
from .mirroring import View
from .revocations import Mirror

__all__ = ["ManualClock", "SigningKey", "StaticKeys", "StaticRevocations", "make_key", "sign"]


def b64url(raw: bytes) -> str:
    """Base64url without padding (RFC 7515 section 2)."""
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A throw-away RSA key: ``jwk`` is its public half."""

    jwk: Mapping[str, str]
    private: rsa.RSAPrivateKey = field(repr=False)

    @property
    def kid(self) -> str:
        """The key's RFC 7638 thumbprint."""
        return self.jwk["kid"]


def make_key(bits: int = 2048) -> SigningKey:
    """A new RSA key (about 50 ms): share it between tests."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    numbers = private.public_key().public_numbers()
    jwk = {
        "kty": "RSA",
        "n": b64url(numbers.n.to_bytes((bits + 7) // 8, "big")),
        "e": b64url(numbers.e.to_bytes(3, "big")),
    }
    return SigningKey({**jwk, "alg": "RS256", "use": "sig", "kid": thumbprint(jwk)}, private)


def sign(
    key: SigningKey | str | bytes,
    claims: Mapping[str, Any],
    *,
    header: Mapping[str, Any] | None = None,
    now: float | None = None,
    lifetime_s: float = 900,
) -> str:
    """A compact JWS: RS256 with a :class:`SigningKey`, HS256 with a secret. ``iat`` and ``exp`` are added if absent."""
    issued = int(time.time() if now is None else now)
    head: dict[str, Any] = {"alg": "HS256", "typ": "JWT"}
    if isinstance(key, SigningKey):
        head = {"alg": "RS256", "typ": "at+jwt", "kid": key.kid}
    members = {"iat": issued, "exp": issued + int(lifetime_s), **claims}
    parts = (msgspec.json.encode({**head, **(header or {})}), msgspec.json.encode(members))
    signing_input = ".".join(map(b64url, parts)).encode()
    if isinstance(key, SigningKey):
        signature = key.private.sign(signing_input, padding.PKCS1v15(), hashes.SHA256())
    else:
        mac = hmac.HMAC(key.encode() if isinstance(key, str) else key, hashes.SHA256())
        mac.update(signing_input)
        signature = mac.finalize()
    return f"{signing_input.decode()}.{b64url(signature)}"


class StaticKeys(Sequence[SigningKey]):
    """A fixed set of signing keys; ``jwks`` is the document for ``Verifier(jwks=…)``."""

    def __init__(self, *keys: SigningKey) -> None:
        self._keys = keys

    def __getitem__(self, index: Any) -> Any:
        return self._keys[index]

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def jwks(self) -> dict[str, Any]:
        """The public halves as a JWK set."""
        return {"keys": [dict(key.jwk) for key in self._keys]}


class ManualClock:
    """A clock that a test moves by hand, for ``Verifier(clock=…)``."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now
        self.mono = 1_000.0

    def time(self) -> float:
        """Wall clock, Unix seconds."""
        return self.now

    def monotonic(self) -> float:
        """Monotonic seconds."""
        return self.mono

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        self.now += seconds
        self.mono += seconds


class StaticRevocations:
    """Stands in for a region's replica: pass it as ``redis_url``. Fresh until told otherwise."""

    def __init__(
        self, *, clock: Any = time, synced: bool = True, confirmed: bool = True, max_skew_s: float = 5.0
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._clock = clock
        self._mirror = Mirror()
        self._on_change: list[Callable[[View], None]] = []
        self._advanced = threading.Condition()
        self._seq = 0
        self._nonce = "0123456789abcdef"
        self._view = View(self._mirror.snapshot, Freshness(max_skew_s), connection="tailing")
        if synced:
            self.beat(confirmed=confirmed)

    @property
    def view(self) -> View:
        """What the verifier sees."""
        return self._view

    def _position(self) -> Position:
        return Position(1, self._seq, self._nonce)

    def _publish(self, **changes: Any) -> None:
        with self._advanced:
            self._view = replace(self._view, **changes)
            self._advanced.notify_all()
        for on_change in self._on_change:
            on_change(self._view)

    def beat(self, *, confirmed: bool = True, age_s: float = 0.0) -> None:
        """A beat arrives; ``confirmed`` by a majority or not, ``age_s`` old by the primary's clock."""
        heard = Heard(self._nonce, self._seq, self._clock.time() - age_s, self._position(), self._clock.monotonic())
        freshness = replace(
            self._view.freshness,
            synced=True,
            epoch_open=confirmed,
            applied=heard,
            confirmed=heard if confirmed else self._view.freshness.confirmed,
        )
        epoch = Epoch(1, self._nonce, "", confirmed, Generation(1, 0), ())
        self._publish(freshness=freshness, epoch=epoch, position=self._position())

    def revoke(
        self, kind: str, value: str, *, issuer: str, before: int | None = None, entry_id: str | None = None
    ) -> str:
        """An entry arrives; returns its id. ``before`` defaults to now for cut-offs."""
        self._seq += 1
        now = int(self._clock.time())
        cutoff = (now if before is None else before) if kind in CUTOFF_KINDS else None
        expires_at = NEVER_EXPIRES if kind == "kid" else now + 86_400
        name = entry_id or f"entry-{self._seq}"
        entry = Entry(name, kind, issuer, value, cutoff, expires_at, "", now * 1000, "test").check()
        self._mirror.apply([entry])
        self._publish(snapshot=self._mirror.snapshot, position=self._position())
        return name

    def subscribe(self, on_change: Callable[[View], None]) -> None:
        """Called by the verifier."""
        self._on_change.append(on_change)

    def wait_synced(self, timeout_s: float) -> bool:
        """True as soon as a beat was given."""
        with self._advanced:
            return self._advanced.wait_for(lambda: self._view.freshness.synced, timeout_s)

    def wait_position(self, reached: Callable[[View], bool], timeout_s: float) -> bool:
        """True as soon as ``reached(view)`` holds."""
        with self._advanced:
            return self._advanced.wait_for(lambda: reached(self._view), timeout_s)

    def start(self) -> None:
        """Called by the verifier; there is nothing to start."""

    def close(self) -> None:
        """Called by the verifier; there is nothing to close."""
