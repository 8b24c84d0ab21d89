"""verify_compact against published examples, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.verifier import vectors
from tests.verifier.support import token_of
from verifier import ConfigurationError, InvalidToken
from verifier.jwk import thumbprint
from verifier.jws import verify_compact
from verifier.testing import SigningKey, b64url
from verifier.token import decode_segment


@pytest.mark.parametrize(
    ("token", "jwk", "alg", "payload"),
    [
        (vectors.A1_TOKEN, vectors.A1_KEY, "HS256", vectors.JOE),
        (vectors.A2_TOKEN, vectors.A2_KEY, "RS256", vectors.JOE),
        (vectors.A3_TOKEN, vectors.A3_KEY, "ES256", vectors.JOE),
        (vectors.COOKBOOK_RS256_TOKEN, vectors.COOKBOOK_RSA_KEY, "RS256", vectors.FRODO),
        (vectors.COOKBOOK_HS256_TOKEN, vectors.COOKBOOK_OCT_KEY, "HS256", vectors.FRODO),
    ],
    ids=["RFC 7515 A.1", "RFC 7515 A.2", "RFC 7515 A.3", "RFC 7520 4.1", "RFC 7520 4.4"],
)
def test_a_published_example_verifies_and_changed_ones_do_not(
    token: str, jwk: dict[str, Any], alg: str, payload: bytes
) -> None:
    jwks = {"keys": [jwk]}
    assert verify_compact(token, jwks, (alg,)) == payload
    head, body, signature = token.split(".")
    for changed in (
        f"{head}.{b64url(payload + b' ')}.{signature}",
        f"{head}.{body}.{signature[1:]}A",
        f"{head}.{body}.",
    ):
        with pytest.raises(InvalidToken):
            verify_compact(changed, jwks, (alg,))


def test_the_unsecured_example_of_rfc_7515_a_5_is_refused() -> None:
    with pytest.raises(InvalidToken) as caught:
        verify_compact(vectors.A5_TOKEN, {"keys": [vectors.A2_KEY]})
    assert caught.value.code == "alg_not_allowed"


def test_the_thumbprint_of_rfc_7638_section_3_1() -> None:
    assert thumbprint(vectors.THUMBPRINT_KEY) == vectors.THUMBPRINT


@pytest.mark.parametrize("algorithms", [(), ("none",), ("HS256", "RS256"), ("HS384",), ("RS256", "x"), "RS256"])
def test_algorithms_that_mix_secrets_and_public_keys_or_are_unknown_are_misuse(algorithms: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        verify_compact(vectors.A2_TOKEN, {"keys": [vectors.A2_KEY]}, algorithms)
    assert caught.value.code == "setting_invalid"


def test_hs256_is_not_verified_unless_it_is_named() -> None:
    with pytest.raises(InvalidToken) as caught:
        verify_compact(vectors.A1_TOKEN, {"keys": [vectors.A1_KEY, vectors.A2_KEY]})
    assert caught.value.code == "alg_not_allowed"


def test_a_secret_beside_a_public_key_is_used_for_hs256_only() -> None:
    jwks = {"keys": [vectors.A1_KEY, vectors.A2_KEY]}
    assert verify_compact(vectors.A1_TOKEN, jwks, ("HS256",)) == vectors.JOE
    assert verify_compact(vectors.A2_TOKEN, jwks) == vectors.JOE


def test_a_public_key_as_an_oct_key_is_refused(key: SigningKey) -> None:
    pem = key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    token = token_of(pem)
    with pytest.raises(ConfigurationError):
        verify_compact(token, {"keys": [{"kty": "oct", "k": b64url(pem)}]}, ("HS256",))
    with pytest.raises(InvalidToken):
        verify_compact(token, {"keys": [dict(key.jwk)]}, ("HS256",))


@pytest.mark.parametrize(
    "jwks", [{}, {"keys": None}, {"keys": 1}, {"keys": {}}, {"keys": []}, {"keys": "x"}, {"keys": [1, None, {}]}]
)
@pytest.mark.parametrize("alg", ["RS256", "HS256"])
def test_a_local_set_without_a_usable_key_is_never_an_unnamed_error(jwks: Any, alg: str) -> None:
    token = vectors.A2_TOKEN if alg == "RS256" else vectors.A1_TOKEN
    with pytest.raises((ConfigurationError, InvalidToken)) as caught:
        verify_compact(token, jwks, (alg,))
    if alg == "RS256":
        assert caught.value.code == "jwks_invalid"


def test_without_kid_two_keys_that_fit_are_a_choice_nobody_made() -> None:
    jwks = {"keys": [vectors.A2_KEY, vectors.COOKBOOK_RSA_KEY]}
    with pytest.raises(InvalidToken) as caught:
        verify_compact(vectors.A2_TOKEN, jwks)
    assert (caught.value.code, caught.value.step) == ("kid_invalid", 3)
    assert verify_compact(vectors.COOKBOOK_RS256_TOKEN, jwks) == vectors.FRODO


def test_an_es256_signature_has_exactly_64_bytes() -> None:
    head, body, signature = vectors.A3_TOKEN.split(".")
    raw = decode_segment(signature.encode(), "signature")
    der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    for other in (der, raw[:63], raw + b"\0", bytes(64), b"\0" + raw[:32] + b"\0" + raw[32:]):
        with pytest.raises(InvalidToken) as caught:
            verify_compact(f"{head}.{body}.{b64url(other)}", {"keys": [vectors.A3_KEY]}, ("ES256",))
        assert caught.value.code == "signature_invalid"
