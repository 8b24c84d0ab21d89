"""What the tests of the verifier share: tokens of any shape, verifiers with a short list of settings, waiting."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import padding

from verifier import InvalidToken, Verifier
from verifier.freshness import Heard
from verifier.log import CUTOFF_KINDS, NEVER_EXPIRES, Entry, Position
from verifier.mirroring import View
from verifier.revocations import Mirror, Snapshot
from verifier.testing import ManualClock, SigningKey, StaticKeys, StaticRevocations, b64url, sign

ISSUER = "https://id.test"
AUDIENCE = "orders"
NOW = 1_800_000_000
SECRET = "a shared secret of more than thirty-two bytes"
WAIT_S = 60.0


def until(condition: Callable[[], object], what: str, within_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.005)


def members(**claims: Any) -> dict[str, Any]:
    """The claims of a good token at NOW; one given as None is left out."""
    base: dict[str, Any] = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "jti": "t-1", "iat": NOW, "exp": NOW + 900}
    return {name: value for name, value in {**base, **claims}.items() if value is not None}


def token_of(key: SigningKey | str | bytes, *, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
    return sign(key, members(**claims), header=header, now=NOW)


def live_token(key: SigningKey | str | bytes, *, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
    """A good token by the machine's clock, for verifiers with real servers."""
    now = int(time.time())
    return sign(key, members(**{"iat": now, "exp": now + 900, **claims}), header=header)


def sign_segments(key: SigningKey | bytes, header: str, payload: str) -> str:
    """Sign two segments as they are, whatever is in them."""
    signing_input = f"{header}.{payload}".encode()
    if isinstance(key, SigningKey):
        signature = key.private.sign(signing_input, padding.PKCS1v15(), hashes.SHA256())
    else:
        mac = hmac.HMAC(key, hashes.SHA256())
        mac.update(signing_input)
        signature = mac.finalize()
    return f"{header}.{payload}.{b64url(signature)}"


def raw_token(key: SigningKey, *, header: bytes | None = None, payload: bytes | None = None) -> str:
    """Sign any bytes as header and payload."""
    head = json.dumps({"alg": "RS256", "kid": key.kid}).encode() if header is None else header
    body = msgspec.json.encode(members()) if payload is None else payload
    return sign_segments(key, b64url(head), b64url(body))


def make_verifier(*keys: SigningKey, **settings: Any) -> Verifier:
    """At NOW, with these keys and no revocations, unless told otherwise."""
    jwks = StaticKeys(*keys).jwks if keys else None
    defaults = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_urls": None, "redis_url": None, "jwks": jwks}
    return Verifier(**{**defaults, "clock": ManualClock(NOW), **settings})


class Mirrored:
    """A verifier with revocations and a clock that the test moves by hand."""

    def __init__(self, *keys: SigningKey, synced: bool = True, confirmed: bool = True, **settings: Any) -> None:
        self.clock = ManualClock(NOW)
        self.revocations = StaticRevocations(clock=self.clock, synced=synced, confirmed=confirmed)
        self.verifier = make_verifier(*keys, redis_url=self.revocations, clock=self.clock, **settings).start()

    def revoke(self, kind: str, value: str, **details: Any) -> str:
        return self.revocations.revoke(kind, value, issuer=ISSUER, **details)


def refusal(verifier: Verifier, token: Any) -> InvalidToken:
    with pytest.raises(InvalidToken) as caught:
        verifier.verify(token)
    return caught.value


def code_of(verifier: Verifier, token: Any) -> str:
    return refusal(verifier, token).code


class Source:
    """A mirror whose view the test sets, and of whose changes it tells the verifier when it pleases."""

    def __init__(self, view: View) -> None:
        self.counters: Counter[str] = Counter()
        self.view = view
        self._on_change: list[Callable[[View], None]] = []

    def start(self) -> None: ...

    def close(self) -> None: ...

    def wait_synced(self, timeout_s: float) -> bool:
        return self.view.freshness.synced

    def wait_position(self, reached: Callable[[View], bool], timeout_s: float) -> bool:
        return reached(self.view)

    def subscribe(self, on_change: Callable[[View], None]) -> None:
        self._on_change.append(on_change)

    def tell(self) -> None:
        for on_change in self._on_change:
            on_change(self.view)


NONCE = "0123456789abcdef"
NONCE_2 = "fedcba9876543210"


def entry(kind: str, value: str, **fields: Any) -> Entry:
    """An entry of the trust log, good for a day after NOW."""
    cutoff = NOW if kind in CUTOFF_KINDS else None
    expires_at = NEVER_EXPIRES if kind == "kid" else NOW + 86_400
    base: dict[str, Any] = {
        "id": f"{kind}-{value or 'x'}", "kind": kind, "issuer": ISSUER, "value": value, "before": cutoff,
        "expires_at": expires_at, "reason": "", "at": NOW * 1000, "region": "test",
    }  # fmt: skip
    return Entry(**{**base, **fields})


def snapshot_of(*entries: Entry) -> Snapshot:
    mirror = Mirror()
    mirror.apply(entries)
    return mirror.snapshot


def heard(position: Position, *, at_s: float = NOW, mono: float = 1_000.0, n: int = 1) -> Heard:
    return Heard(position.nonce, n, at_s, position, mono)
