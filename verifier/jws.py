"""One function for a JWS and a local key set (RFC 7515 section 5.2), without claims, revocations or state. Pure.

For anything that protects a service use :class:`verifier.Verifier`: a signature alone says neither for whom a token
was issued nor whether it was revoked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature

from .decision import PUBLIC_KEY_ALGORITHMS
from .errors import ConfigurationError, InvalidToken
from .jwk import HmacKey, JwksError, KeySet, PublicKey
from .token import decode_segment, parse, read_header

__all__ = ["verify_compact"]


def _local_hmac_keys(document: Mapping[str, Any]) -> list[HmacKey]:
    keys = []
    members = document.get("keys")
    for jwk in members if isinstance(members, list) else ():
        if isinstance(jwk, dict) and jwk.get("kty") == "oct" and jwk.get("alg", "HS256") == "HS256":
            try:
                secret = decode_segment(str(jwk.get("k", "")).encode("ascii"), "k")
                keys.append(HmacKey.from_secret(secret, jwk.get("kid")))
            except (ValueError, InvalidToken) as error:
                raise ConfigurationError("jwks_invalid", f"jwks: an oct key is unusable: {error}") from None
    return keys


def _candidates(document: Mapping[str, Any], alg: str, kid: str | None) -> list[PublicKey | HmacKey]:
    try:
        keys = _local_hmac_keys(document) if alg == "HS256" else list(KeySet.from_document(document))
    except JwksError as error:
        raise ConfigurationError("jwks_invalid", f"jwks: {error.reason}", setting="jwks") from None
    return [key for key in keys if key.alg == alg and (kid is None or key.kid == kid)]


def verify_compact(token: str, jwks: Mapping[str, Any], algorithms: Iterable[str] = ("RS256",)) -> bytes:
    """The payload of a compact JWS whose signature verifies with a key of the local, trusted set ``jwks``.

    The payload is not parsed and ``typ`` is not checked. A token without ``kid`` is verified with the only key that
    fits. ``oct`` keys are used only if ``algorithms`` is ``("HS256",)`` alone, so that no public key can be mistaken
    for a secret. Raises :class:`InvalidToken` and :class:`ConfigurationError`.
    """
    allowed = frozenset(algorithms)
    if not allowed or not (allowed == {"HS256"} or allowed <= set(PUBLIC_KEY_ALGORITHMS)):
        raise ConfigurationError("setting_invalid", "algorithms: name public-key algorithms, or HS256 alone")
    parsed = parse(token)
    header = read_header(parsed.header)
    if header.alg not in allowed:
        raise InvalidToken("alg_not_allowed", step=2)
    fitting = _candidates(jwks, header.alg, header.kid)
    if len(fitting) != 1:
        raise InvalidToken("kid_unknown" if not fitting else "kid_invalid", step=3)
    try:
        fitting[0].verify(parsed.signature, parsed.signing_input)
    except InvalidSignature:
        raise InvalidToken("signature_invalid", step=4) from None
    return parsed.payload
