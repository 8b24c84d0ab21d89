"""No document whatever makes KeySet.from_document raise anything but JwksError, and what it holds is sound."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_jwks import check, sound
from tests.verifier import vectors
from tests.verifier.support import AUDIENCE, ISSUER, NOW, SECRET
from verifier import ConfigurationError, InvalidToken, Issuer, Undecidable, Verifier
from verifier.jwk import JwksError, KeySet, thumbprint
from verifier.testing import ManualClock, SigningKey, b64url, sign

leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=3))
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
names = st.sampled_from(["kty", "alg", "use", "key_ops", "kid", "n", "e", "crv", "x", "y", "d", "k", "x5c", "oth"])
numbers = st.one_of(
    st.binary(max_size=70).map(b64url),
    st.sampled_from([vectors.A2_KEY["n"], vectors.A3_KEY["x"], vectors.A3_KEY["y"], "AQAB", "Aw", "AA", ""]),
)
words = st.sampled_from(
    ["RSA", "EC", "oct", "OKP", "RS256", "PS256", "ES256", "HS256", "none", "sig", "enc", "P-256", "P-384", ["verify"],
     ["sign"], ["verify", "verify"], "\ud800", "é"]
)  # fmt: skip
good = st.sampled_from([vectors.A2_KEY, vectors.A3_KEY, vectors.COOKBOOK_RSA_KEY, vectors.THUMBPRINT_KEY])
jwks = st.one_of(
    good,
    st.dictionaries(names, words | numbers | values, max_size=8),
    st.tuples(good, st.dictionaries(names, words | numbers | values, max_size=2)).map(lambda two: {**two[0], **two[1]}),
    values,
)
documents = st.fixed_dictionaries({"keys": st.lists(jwks, max_size=5)}) | st.dictionaries(st.text(max_size=4), values)


def read(document: Any) -> KeySet | None:
    try:
        return KeySet.from_document(document)
    except JwksError:
        return None


@given(st.one_of(values, st.binary(), st.text(), st.builds(object), documents))
@example(float("nan"))
@example(bytearray(b"{}"))
@example({"keys": [{"kty": "RSA", "n": "\ud800", "e": "AQAB"}]})
def test_any_object_is_refused_by_name_or_is_a_sound_set(document: Any) -> None:
    keys = read(document)
    if keys is not None:
        sound(keys, document)


@given(documents)
@settings(max_examples=300)
def test_any_set_is_read_alike_as_text_and_as_a_mapping(document: dict[str, Any]) -> None:
    try:
        text = json.dumps(document)
    except TypeError:  # bytes inside
        assume(False)
    check(text.encode())


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_by_name(raw: bytes) -> None:
    check(raw)
    check(b'{"keys":[' + raw + b"]}")


@given(documents, st.data())
def test_any_change_to_a_set_in_text_is_read_alike(document: dict[str, Any], data: st.DataObject) -> None:
    try:
        raw = bytearray(json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    except TypeError:
        assume(False)
    at = data.draw(st.integers(0, len(raw)))
    raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check(bytes(raw))


@given(documents | values)
def test_a_local_set_is_a_verifier_or_a_configuration_error(document: Any) -> None:
    assume(document is not None)
    try:
        verifier = Verifier(issuer=ISSUER, audience=AUDIENCE, jwks_urls=None, redis_url=None, jwks=document)
    except ConfigurationError as error:
        refused = (error.code, error.setting)
    else:
        assert isinstance(document, dict)
        with pytest.raises(InvalidToken):
            verifier.verify("a.b.c")
        return
    assert refused == ("jwks_invalid", "jwks")


@given(st.dictionaries(names, words | numbers | values, max_size=6))
def test_a_thumbprint_is_of_a_public_key_or_refused_by_name(jwk: dict[str, Any]) -> None:
    try:
        assert len(thumbprint(jwk)) == 43
    except JwksError:
        pass
    else:
        assert jwk["kty"] in ("RSA", "EC")


claims = st.dictionaries(
    st.sampled_from(["iss", "aud", "sub", "exp", "iat", "nbf", "jti", "sid", "client_id", "after", "scope"]),
    st.sampled_from([ISSUER, "https://two.test", AUDIENCE, [AUDIENCE], NOW, NOW + 60, NOW - 900, True, "", []])
    | values,
    max_size=11,
)


@given(claims, st.booleans(), st.sampled_from([None, "a", "unknown", "\ud800", 1]))
@settings(max_examples=300)
def test_any_claims_under_several_issuers_have_one_of_three_outcomes(
    key: SigningKey, claims: dict[str, Any], secret: bool, kid: Any
) -> None:
    """``sign`` takes what JSON can hold; whatever verifies names an issuer that was named here."""
    issuers = [
        Issuer(
            issuer=ISSUER, audience=AUDIENCE, jwks_urls=None, jwks={"keys": [dict(key.jwk)]}, hs256_secrets=[SECRET]
        ),
        Issuer(issuer="https://two.test", audience=None, jwks_urls=None, jwks={"keys": [{**key.jwk, "kid": "a"}]}),
    ]
    verifier = Verifier(issuers=issuers, redis_url=None, require_iat=False, clock=ManualClock(NOW))
    header = {} if kid is None else {"kid": kid}
    try:
        token = sign(SECRET if secret else key, {"exp": NOW + 60, **claims}, header=header, now=NOW)
    except (TypeError, ValueError, OverflowError):
        assume(False)
    try:
        verified = verifier.verify(token)
    except (InvalidToken, Undecidable):
        return
    assert verified["iss"] in (ISSUER, "https://two.test")
    assert not (secret and verified["iss"] != ISSUER)
