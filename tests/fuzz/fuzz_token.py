"""Invariant: verify gives claims of exact types under a key it trusts, or InvalidToken with its step; nothing else."""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Any

from tests.verifier import vectors
from verifier import Claims, InvalidToken, Verifier
from verifier.testing import ManualClock, b64url
from verifier.token import decode_segment

ISSUER, AUDIENCE, NOW, SECRET = "https://id.test", "orders", 1_800_000_000, b"s" * 32
HS256 = b64url(b'{"alg":"HS256"}')

_verifier = Verifier(
    issuer=ISSUER,
    audience=AUDIENCE,
    jwks_urls=None,
    redis_url=None,
    jwks={"keys": [{**vectors.A2_KEY, "kid": "a"}, {**vectors.A3_KEY, "kid": "b"}]},
    algorithms=("RS256", "ES256"),
    hs256_secrets=[SECRET],
    require_iat=False,
    clock=ManualClock(NOW),
)


def check(data: bytes) -> None:
    """The first byte says how the rest is used: as a token, as a signed payload, or as a signed header and payload."""
    kind, rest = data[:1], data[1:]
    segment(rest)
    if kind == b"p":
        attempt(signed(HS256, b64url(rest)), rest)
    elif kind == b"h":
        head, _, payload = rest.partition(b"\n\n")
        attempt(signed(b64url(head), b64url(payload)), payload)
    elif kind == b"s":  # segments as they are, signed
        first, _, second = rest.decode("latin-1").partition(".")
        attempt(signed(first, second), None)
    else:
        attempt(rest.decode("utf-8", "surrogateescape"), None)


def signed(header: str, payload: str) -> str:
    signing_input = f"{header}.{payload}"
    mac = hmac.new(SECRET, signing_input.encode("utf-8", "surrogateescape"), hashlib.sha256)
    return f"{signing_input}.{b64url(mac.digest())}"


def verified(token: str) -> Claims | None:
    try:
        return _verifier.verify(token)
    except InvalidToken as error:
        refused = error
    assert 1 <= refused.step <= 6
    assert str(refused)
    return None


def attempt(token: str, payload: bytes | None) -> None:
    claims = verified(token)
    if claims is None:
        return
    assert payload is None or b64url(payload) == token.split(".")[1]
    assert claims["iss"] == ISSUER
    audience = claims["aud"]
    assert audience == AUDIENCE or AUDIENCE in audience
    for name in ("exp", "nbf", "iat"):
        assert name not in claims or type(claims[name]) in (int, float), name
    for name in ("sub", "jti", "sid", "client_id"):
        assert name not in claims or (type(claims[name]) is str and claims[name]), name
    assert claims["exp"] + 30 > NOW


def segment(data: bytes) -> None:
    """One spelling: accepted exactly if it is what encoding its own meaning gives."""
    expected: Any = None
    if not set(data) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") and len(data) % 4 != 1:
        raw = base64.urlsafe_b64decode(data + b"=" * (-len(data) % 4))
        expected = raw if b64url(raw).encode() == data else None
    try:
        found: Any = decode_segment(data, "x")
    except InvalidToken:
        found = None
    assert found == expected, "base64url: another reading than the one spelling"
