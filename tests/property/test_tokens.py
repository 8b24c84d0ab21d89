"""No input whatever raises anything but InvalidToken, and no change to a valid token verifies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.verifier.support import ISSUER, NOW, SECRET, make_verifier, members, sign_segments, token_of
from verifier import Claims, InvalidToken, Verifier
from verifier.testing import SigningKey, b64url
from verifier.token import parse

leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = "alg typ kid crit jwk jku b64 iss aud sub exp iat nbf jti sid client_id after scope x"
names = st.sampled_from(NAMES.split())
words = st.sampled_from(
    [
        "RS256",
        "HS256",
        "none",
        "ES256",
        "JWT",
        "at+jwt",
        ISSUER,
        "orders",
        ["orders"],
        NOW,
        NOW + 900,
        NOW - 900,
        1e400,
        True,
    ]
)
json_objects = st.dictionaries(names, words | values, max_size=8)


@pytest.fixture(scope="module")
def verifier(key: SigningKey) -> Verifier:
    return make_verifier(key, hs256_secrets=[SECRET], require_iat=False)


def refused_or_verified(verifier: Verifier, token: Any) -> Claims | None:
    try:
        return verifier.verify(token)
    except InvalidToken as error:
        refused = error
    assert 1 <= refused.step <= 6
    assert str(refused)
    return None


class Odd(str):
    """A string whose every comparison and hash is a mistake."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __hash__(self) -> int:
        raise RuntimeError


@given(st.one_of(st.text(), st.binary(), values, st.tuples(st.integers()), st.builds(object), st.builds(Odd)))
@example("\ud800")
@example(float("nan"))
@example("a." * 5000)
def test_anything_at_all_is_refused_by_name(verifier: Verifier, token: Any) -> None:
    assert refused_or_verified(verifier, token) is None


@given(st.lists(st.text(alphabet="AQZ_-.=+/ \néé", max_size=12), min_size=1, max_size=5))
def test_text_that_looks_like_a_token_is_refused_by_name(verifier: Verifier, parts: list[str]) -> None:
    assert refused_or_verified(verifier, ".".join(parts)) is None


@given(json_objects, json_objects)
def test_any_header_and_claims_are_refused_or_verified(
    verifier: Verifier, header: dict[str, Any], payload: dict[str, Any]
) -> None:
    segments = [b64url(json.dumps(part).encode("utf-8", "surrogatepass")) for part in (header, payload)]
    assert refused_or_verified(verifier, ".".join([*segments, "AAAA"])) is None


@given(payload=json_objects)
@settings(max_examples=200)
def test_what_verifies_under_a_secret_has_claims_of_exact_types(verifier: Verifier, payload: dict[str, Any]) -> None:
    body = json.dumps({"iss": ISSUER, "aud": "orders", "exp": NOW + 60, **payload}).encode("utf-8", "surrogatepass")
    claims = refused_or_verified(verifier, sign_segments(SECRET.encode(), b64url(b'{"alg":"HS256"}'), b64url(body)))
    if claims is None:
        return
    assert claims["iss"] == ISSUER
    assert claims["aud"] == "orders" or "orders" in claims["aud"]
    for name in ("exp", "iat", "nbf"):
        assert name not in claims or type(claims[name]) in (int, float)
    for name in ("sub", "jti", "sid", "client_id"):
        assert name not in claims or (type(claims[name]) is str and claims[name])
    assert claims["exp"] + 30 > NOW
    assert dict(claims) == json.loads(body)


@given(header=st.binary(max_size=60), payload=st.binary(max_size=60))
def test_any_signed_bytes_are_refused_by_name(verifier: Verifier, header: bytes, payload: bytes) -> None:
    good_header = b64url(b'{"alg":"HS256"}')
    assert refused_or_verified(verifier, sign_segments(SECRET.encode(), b64url(header), b64url(payload))) is None
    assert refused_or_verified(verifier, sign_segments(SECRET.encode(), good_header, b64url(payload))) is None


@pytest.fixture(scope="module")
def good(key: SigningKey) -> str:
    return token_of(key)


@given(data=st.data())
@settings(max_examples=400)
def test_a_changed_token_never_verifies(verifier: Verifier, good: str, data: st.DataObject) -> None:
    assert refused_or_verified(verifier, good) is not None
    at = data.draw(st.integers(0, len(good)))
    cut = data.draw(st.integers(0, 3))
    put = data.draw(st.text(alphabet="ABCgQwxyz0189-_.=+/ \n", max_size=3) | st.text(max_size=2))
    changed = good[:at] + put + good[at + cut :]
    assume(changed != good)
    assert refused_or_verified(verifier, changed) is None


@given(bit=st.integers(0, 255 * 8 + 7))
def test_a_signature_with_one_bit_changed_does_not_verify(verifier: Verifier, good: str, bit: int) -> None:
    parsed = parse(good)
    flipped = bytearray(parsed.signature)
    flipped[bit // 8] ^= 1 << bit % 8
    assert refused_or_verified(verifier, f"{parsed.signing_input.decode()}.{b64url(bytes(flipped))}") is None


@given(length=st.integers(0, 600))
def test_a_signature_of_another_length_does_not_verify(verifier: Verifier, good: str, length: int) -> None:
    assume(length != 256)
    parsed = parse(good)
    other = (parsed.signature * 3)[:length]
    assert refused_or_verified(verifier, f"{parsed.signing_input.decode()}.{b64url(other)}") is None


@given(name=st.sampled_from(["sub", "jti", "exp", "iat", "iss", "aud"]), value=words | values)
def test_changed_claims_do_not_verify_under_the_old_signature(
    verifier: Verifier, good: str, name: str, value: Any
) -> None:
    header, _, signature = good.split(".")
    assume(value != members()[name])
    body = b64url(json.dumps({**members(), name: value}).encode("utf-8", "surrogatepass"))
    assert refused_or_verified(verifier, f"{header}.{body}.{signature}") is None
