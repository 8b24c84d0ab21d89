"""What every speed benchmark verifies, and the one verifier that does: all checks on, as a service would set it up.

`benchmarked_verifier` is also what the tests of strictness run against, so that no speed is bought with a check.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from verifier import Verifier
from verifier.testing import SigningKey, StaticKeys, StaticRevocations, sign
from verifier.verifier import Clock

__all__ = ["AUDIENCE", "ISSUER", "benchmarked_verifier", "make_tokens", "verifier_of"]

ISSUER, AUDIENCE = "https://id.test", "orders"
LIFETIME_S = 4 * 3_600
"""Longer than any run, shorter than the day that a token may last."""


def benchmarked_verifier(
    keys: StaticKeys,
    cache_size: int,
    *,
    clock: Clock = time,
    revocations: StaticRevocations | None = None,
) -> Verifier:
    """A started verifier of `keys` with a mirror of revocations and no other setting than the cache's size."""
    held = StaticRevocations(clock=clock) if revocations is None else revocations
    return verifier_of(keys.jwks, cache_size, held, clock)


def verifier_of(jwks: dict[str, Any], cache_size: int, revocations: StaticRevocations, clock: Clock = time) -> Verifier:
    """The same where only the public keys are known."""
    verifier = Verifier(
        issuer=ISSUER,
        audience=AUDIENCE,
        jwks_urls=None,
        jwks=jwks,
        redis_url=revocations,
        token_cache_size=cache_size,
        clock=clock,
    )
    return verifier.start()


def make_tokens(key: SigningKey, count: int) -> list[str]:
    """Tokens as the key service issues them, all different."""
    return [sign(key, _claims(), lifetime_s=LIFETIME_S) for _ in range(count)]


def _claims() -> dict[str, Any]:
    return {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "user-1234567890",
        "jti": str(uuid.uuid4()),
        "sid": str(uuid.uuid4()),
        "client_id": "web",
        "scope": "orders:read orders:write",
    }
