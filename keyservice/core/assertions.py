"""Client assertions (RFC 7523 section 3): what a JWT must say to authenticate a client at the token endpoint. Pure.

``iss`` and ``sub`` are the client, ``aud`` is the issuer or the token endpoint, ``exp`` lies at most five minutes
ahead, and ``jti`` is used once (:mod:`keyservice.assertions`). The signature is checked before anything that the
assertion says is believed or answered to. An access token is no assertion: its ``typ`` is at+jwt.

An unknown client's assertion is checked all the same, with a key that nobody has, so that its answer takes as long.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from keyservice.clients import ASSERTION_ALGORITHMS, Client, ClientLookup
from keyservice.limits import ASSERTION_LIFE_MAX_S
from verifier.errors import InvalidToken
from verifier.jwk import KeySet, PublicKey
from verifier.limits import IDENTIFIER_BYTES_MAX, RSA_BITS_MIN
from verifier.token import Header, parse, read_header, read_payload

__all__ = ["Assertion", "AssertionRefused", "check_assertion"]

_TYPES: Final = ("JWT", "absent")


class AssertionRefused(Exception):
    """The client is not authenticated. The message is for a client that has signed, or says nothing."""


@dataclass(frozen=True, slots=True)
class Assertion:
    """A good one, its ``jti`` not looked at yet. ``exp`` is Unix seconds."""

    client: Client
    jti: str
    exp: float


def check_assertion(
    text: str, clients: ClientLookup, audiences: Collection[str], now: float, leeway_s: float
) -> Assertion:
    """Check all but whether it was used before; raises :class:`AssertionRefused`."""
    try:
        parsed = parse(text)
        header = read_header(parsed.header)
        claims = read_payload(parsed.payload)
    except InvalidToken:
        raise AssertionRefused("not a JWT") from None
    if header.alg not in ASSERTION_ALGORITHMS or header.typ not in _TYPES:
        raise AssertionRefused(f"alg is one of {', '.join(ASSERTION_ALGORITHMS)}, and typ is JWT or absent")
    client_id = claims.get("sub")
    client = clients.get(client_id) if isinstance(client_id, str) else None
    signed = _is_signed(header, parsed.signing_input, parsed.signature, client)
    if client is None or not signed:
        raise AssertionRefused("")
    _check_audience(claims.get("aud"), audiences)
    if claims.get("iss") != client_id:
        raise AssertionRefused("iss and sub are not both the client_id")
    return Assertion(client, _jti(claims), _exp(claims, now, leeway_s))


def _is_signed(header: Header, signing_input: bytes, signature: bytes, client: Client | None) -> bool:
    keys = client.keys if client is not None else None
    for key in _candidates(header, keys) or (_nobody(header.alg),):
        try:
            key.verify(signature, signing_input)
        except InvalidSignature:
            continue
        return True
    return False


def _candidates(header: Header, keys: KeySet | None) -> tuple[PublicKey, ...]:
    """The key that is named, or all that fit."""
    if keys is None:
        return ()
    return tuple(key for key in keys if key.alg == header.alg and header.kid in (None, key.kid))


@cache
def _nobody(alg: str) -> PublicKey:
    """A key that costs as much as one of this algorithm, and that nobody has the other half of."""
    if alg == "ES256":
        point = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
        jwk = {"kty": "EC", "crv": "P-256", "x": _base64(point.x, 32), "y": _base64(point.y, 32)}
    else:
        modulus = secrets.randbits(RSA_BITS_MIN) | 1 << RSA_BITS_MIN - 1 | 1
        jwk = {"kty": "RSA", "n": _base64(modulus, RSA_BITS_MIN // 8), "e": "AQAB"}
    return next(iter(KeySet.from_document({"keys": [{**jwk, "alg": alg}]})))


def _base64(number: int, size: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes(size, "big")).rstrip(b"=").decode()


def _check_audience(aud: Any, audiences: Collection[str]) -> None:
    named = aud if isinstance(aud, list) else [aud]
    if not any(isinstance(one, str) and one in audiences for one in named):
        raise AssertionRefused(f"aud is one of {', '.join(sorted(audiences))}")


def _jti(claims: dict[str, Any]) -> str:
    jti = claims.get("jti")
    if not isinstance(jti, str) or not 0 < len(jti.encode()) <= IDENTIFIER_BYTES_MAX:
        raise AssertionRefused(f"jti has 1 to {IDENTIFIER_BYTES_MAX} bytes")
    return jti


def _time(claims: dict[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AssertionRefused(f"{name} is not a number of seconds")
    return value


def _exp(claims: dict[str, Any], now: float, leeway_s: float) -> float:
    exp, starts = _time(claims, "exp"), [_time(claims, "nbf"), _time(claims, "iat")]
    if exp is None or exp <= now - leeway_s:
        raise AssertionRefused("exp is missing or past")
    if exp > now + ASSERTION_LIFE_MAX_S + leeway_s:
        raise AssertionRefused(f"exp is more than {ASSERTION_LIFE_MAX_S:g} s ahead")
    if any(start is not None and start > now + leeway_s for start in starts):
        raise AssertionRefused("nbf or iat is in the future")
    return exp
