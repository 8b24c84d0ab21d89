"""JWK sets: one bad key leaves the rest, a bad set is refused whole."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.verifier import vectors
from tests.verifier.support import NOW, code_of, make_verifier, members, raw_token, token_of
from verifier import ConfigurationError
from verifier.jwk import JwksError, KeySet, PublicKey, thumbprint
from verifier.jws import verify_compact
from verifier.limits import JWKS_BYTES_MAX, JWKS_KEYS_MAX, KID_BYTES_MAX, RSA_BITS_MAX
from verifier.testing import ManualClock, SigningKey, b64url
from verifier.token import decode_segment


def uint(number: int) -> str:
    return b64url(number.to_bytes((number.bit_length() + 7) // 8, "big"))


def rsa_jwk(n: int, e: int = 65537, **members: Any) -> dict[str, Any]:
    return {"kty": "RSA", "n": uint(n), "e": uint(e), "kid": "bad", **members}


ODD_2048 = (1 << 2047) | 1
ROCA_PRIMES = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)


def roca_modulus() -> int:
    """A number of 2,048 bits that is a power of 65537 modulo every prime of the flawed generator's product."""
    product = prod(ROCA_PRIMES)
    residue = pow(65537, 12345, product)
    n = ODD_2048 - ODD_2048 % product + product + residue
    return n if n % 2 else n + product


SHORT_POINT = {  # its x begins with a zero octet, which belongs to it
    "kty": "EC",
    "crv": "P-256",
    "x": "AFVDiUrz0A7X10Cr29dclrBod7eH219w7qeLkKjXwAo",
    "y": "u0yFo9jqKe-q-iRAaRLdhNWxTcMr9lbvbGvVil2UP5I",
}


def real_roca_primes() -> tuple[int, int]:
    """Primes as the flawed generator made them: k * M + 65537^a mod M, M being the product of the first 126 primes."""
    small = [n for n in range(2, 702) if all(n % d for d in range(2, int(n**0.5) + 1))]
    assert len(small) == 126
    m = prod(small)
    found = ((646033957832983175, 6927203892759609), (27537119037529581, 8238135436210820))
    p, q = (k * m + pow(65537, a, m) for a, k in found)
    return p, q


BAD_KEYS: dict[str, Any] = {
    "not an object": "key",
    "null": None,
    "a list": ["RSA"],
    "empty": {},
    "kty unknown": {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},
    "kty of another case": {**vectors.A2_KEY, "kty": "rsa"},
    "kty a list": {**vectors.A2_KEY, "kty": ["RSA"]},
    "kty an object": {**vectors.A2_KEY, "kty": {}},
    "kty a number": {**vectors.A2_KEY, "kty": 1},
    "symmetric": {"kty": "oct", "k": b64url(b"s" * 64), "kid": "secret"},
    "symmetric and public": {**vectors.A2_KEY, "k": b64url(b"s" * 64)},
    "private d": {**vectors.A2_KEY, "d": "AQAB"},
    "private p": {**vectors.A2_KEY, "p": "AQAB"},
    "private d of EC": {**vectors.A3_KEY, "d": "AQAB"},
    "for encryption": {**vectors.A2_KEY, "use": "enc"},
    "use null": {**vectors.A2_KEY, "use": None},
    "key_ops to sign": {**vectors.A2_KEY, "key_ops": ["sign"]},
    "key_ops empty": {**vectors.A2_KEY, "key_ops": []},
    "key_ops text": {**vectors.A2_KEY, "key_ops": "verify"},
    "key_ops of objects": {**vectors.A2_KEY, "key_ops": [{}]},
    "alg of another type": {**vectors.A2_KEY, "alg": "ES256"},
    "alg symmetric": {**vectors.A2_KEY, "alg": "HS256"},
    "alg none": {**vectors.A2_KEY, "alg": "none"},
    "alg null": {**vectors.A2_KEY, "alg": None},
    "alg a list": {**vectors.A2_KEY, "alg": ["RS256"]},
    "kid empty": {**vectors.A2_KEY, "kid": ""},
    "kid a number": {**vectors.A2_KEY, "kid": 1},
    "kid a list": {**vectors.A2_KEY, "kid": []},
    "kid too long": {**vectors.A2_KEY, "kid": "k" * (KID_BYTES_MAX + 1)},
    "n missing": {"kty": "RSA", "e": "AQAB"},
    "e missing": {"kty": "RSA", "n": vectors.A2_KEY["n"]},
    "n a number": {**vectors.A2_KEY, "n": 5},
    "n padded": {**vectors.A2_KEY, "n": vectors.A2_KEY["n"] + "=="},
    "n with a space": {**vectors.A2_KEY, "n": " " + vectors.A2_KEY["n"]},
    "n empty": {**vectors.A2_KEY, "n": ""},
    "e empty": {**vectors.A2_KEY, "e": ""},
    "n not ASCII": {**vectors.A2_KEY, "n": "é"},
    "n of 1024 bits": rsa_jwk((1 << 1023) | 1),
    "n of 2047 bits": rsa_jwk((1 << 2046) | 1),
    "n too long": rsa_jwk((1 << RSA_BITS_MAX) | 1),
    "n even": rsa_jwk(1 << 2047),
    "n of the ROCA shape": rsa_jwk(roca_modulus()),
    "n of a real key of the ROCA shape": rsa_jwk(prod(real_roca_primes())),
    "n with a leading zero": {**vectors.A2_KEY, "n": b64url(b"\0" + decode_segment(vectors.A2_KEY["n"].encode(), "n"))},
    "n huge": {**vectors.A2_KEY, "n": b64url(b"\xff" * 150_000)},
    "n with zeros for ever": {**vectors.A2_KEY, "n": b64url(bytes(150_000) + b"\x01")},
    "n is 0": {**vectors.A2_KEY, "n": "AA"},
    "n with unused bits": {**vectors.A2_KEY, "n": vectors.A2_KEY["n"][:-1] + "R"},
    "n in the standard alphabet": {**vectors.A2_KEY, "n": vectors.A2_KEY["n"].replace("-", "+")},
    "e with leading zeros": {**vectors.A2_KEY, "e": b64url(b"\0\x01\0\x01")},
    "e huge": {**vectors.A2_KEY, "e": b64url(b"\xff" * 1_000)},
    "e is 0": {**vectors.A2_KEY, "e": "AA"},
    "e is 1": {**vectors.A2_KEY, "e": "AQ"},
    "e is 2": {**vectors.A2_KEY, "e": "Ag"},
    "e even": {**vectors.A2_KEY, "e": uint(65536)},
    "e of 34 bits": {**vectors.A2_KEY, "e": uint(2**33 + 1)},
    "crv of another curve": {**vectors.A3_KEY, "crv": "P-384"},
    "crv missing": {"kty": "EC", "x": vectors.A3_KEY["x"], "y": vectors.A3_KEY["y"]},
    "crv a list": {**vectors.A3_KEY, "crv": []},
    "point off the curve": {**vectors.A3_KEY, "y": vectors.A3_KEY["x"]},
    "point at zero": {**vectors.A3_KEY, "x": b64url(bytes(32)), "y": b64url(bytes(32))},
    "point past the field": {**vectors.A3_KEY, "x": b64url(b"\xff" * 32)},
    "x of 31 octets": {**SHORT_POINT, "x": b64url(decode_segment(SHORT_POINT["x"].encode(), "x")[1:])},
    "x of 33 octets": {**vectors.A3_KEY, "x": b64url(b"\0" + decode_segment(vectors.A3_KEY["x"].encode(), "x"))},
    "y of 33 octets": {**vectors.A3_KEY, "y": b64url(b"\0" + decode_segment(vectors.A3_KEY["y"].encode(), "y"))},
    "x huge": {**vectors.A3_KEY, "x": b64url(b"\xff" * 100_000)},
    "x empty": {**vectors.A3_KEY, "x": ""},
    "y missing": {"kty": "EC", "crv": "P-256", "x": vectors.A3_KEY["x"]},
    "key_ops twice": {**vectors.A2_KEY, "key_ops": ["verify", "verify"]},
    "key_ops of numbers too": {**vectors.A2_KEY, "key_ops": ["verify", 1]},
    "for encryption, by key_ops": {**vectors.A2_KEY, "key_ops": ["encrypt", "wrapKey"]},
    "alg of another curve": {**vectors.A3_KEY, "alg": "ES384"},
    "alg not taken": {**vectors.A2_KEY, "alg": "PS384"},
}


@pytest.mark.parametrize("bad", BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_bad_key_is_left_out_and_named_and_leaves_the_rest(key: SigningKey, bad: Any) -> None:
    document = {"keys": [bad, dict(key.jwk)]}
    for form in (document, json.dumps(document).encode()):
        keys = KeySet.from_document(form)
        assert keys.kids == (key.kid,)
        assert [index for index, _ in keys.rejected] == [0]
        assert len(keys) == 1
    verifier = make_verifier(key, jwks=document)
    assert verifier.verify(token_of(key))


@pytest.mark.parametrize("bad", BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_local_set_of_bad_keys_alone_is_a_configuration_error(bad: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_verifier(jwks={"keys": [bad]})
    assert (caught.value.code, caught.value.setting) == ("jwks_invalid", "jwks")


def test_what_is_said_of_a_bad_key_holds_nothing_secret() -> None:
    secret = b64url(b"very secret material" * 3)
    keys = KeySet.from_document(
        {"keys": [{"kty": "oct", "k": secret}, {**vectors.A2_KEY, "d": secret}, vectors.A3_KEY]}
    )
    assert len(keys.rejected) == 2
    assert secret not in str(keys.rejected)


GOOD_KEYS: dict[str, dict[str, Any]] = {
    "bare": vectors.A2_KEY,
    "EC": vectors.A3_KEY,
    "EC with a leading zero in x": SHORT_POINT,
    "e is 3": {**vectors.A2_KEY, "e": "Aw"},
    "2048 bits": rsa_jwk(ODD_2048 + 2),
    "8192 bits": rsa_jwk((1 << (RSA_BITS_MAX - 1)) | 3),
    "key_ops to verify": {**vectors.A2_KEY, "key_ops": ["verify"]},
    "a certificate, which is not looked at": {**vectors.A2_KEY, "x5c": ["AA=="], "x5t": "AA"},
    "unknown members": {**vectors.A2_KEY, "exp": 1, "iss": [], "x": {"y": 1}},
    "longest kid": {**vectors.A2_KEY, "kid": "k" * KID_BYTES_MAX},
    "alg named": {**vectors.A2_KEY, "alg": "PS256"},
}


@pytest.mark.parametrize("good", GOOD_KEYS.values(), ids=GOOD_KEYS)
def test_a_key_just_inside_the_rules_is_taken(good: dict[str, Any]) -> None:
    keys = KeySet.from_document({"keys": [good]})
    assert (len(keys), keys.rejected) == (1, ())


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"{}", b"null", b'{"keys": null}', b'{"keys": {}}', b'{"keys": []}', b'{"keys": [], "keys": []}',
     b'{"keys": [1]}', b"<html></html>", b'\xef\xbb\xbf{"keys": []}', b"{" * 1000, {}, {"keys": None}, {"keys": ()},
     b'{"keys":' + b"[" * 100_000, b'{"keys": [' + b'{"x5c":[' * 1_000,
     b'{"keys": [' + b'{"kty":"RSA","x":1},' * 9_000 + b"0]}",
     None, 1, "", '{"keys": []}', [], [{"kty": "RSA"}], object()],
)  # fmt: skip
def test_a_document_that_is_no_set_with_a_usable_key_is_refused(document: Any) -> None:
    with pytest.raises(JwksError):
        KeySet.from_document(document)


def test_a_duplicate_name_anywhere_in_a_fetched_set_is_refused(key: SigningKey) -> None:
    text = json.dumps({"keys": [dict(key.jwk)]}).replace('"kty": "RSA"', '"kty": "RSA", "kty": "RSA"')
    with pytest.raises(JwksError):
        KeySet.from_document(text.encode())


def test_a_set_that_uses_a_kid_twice_is_refused_whole(key: SigningKey, other_key: SigningKey) -> None:
    twice = {"keys": [dict(key.jwk), {**other_key.jwk, "kid": key.kid}]}
    with pytest.raises(JwksError):
        KeySet.from_document(twice)
    with pytest.raises(ConfigurationError):
        make_verifier(jwks=twice)
    with pytest.raises(JwksError):  # also the same key, said twice
        KeySet.from_document({"keys": [dict(key.jwk), dict(key.jwk)]})


def test_the_most_keys_are_read_and_one_more_is_not() -> None:
    most = [{**vectors.A2_KEY, "kid": str(n)} for n in range(JWKS_KEYS_MAX)]
    assert len(KeySet.from_document({"keys": most})) == JWKS_KEYS_MAX
    with pytest.raises(JwksError):
        KeySet.from_document({"keys": [*most, vectors.A2_KEY]})


def test_the_largest_document_is_read_and_one_byte_more_is_not(key: SigningKey) -> None:
    body = json.dumps({"keys": [dict(key.jwk)]}).encode()
    assert KeySet.from_document(body + b" " * (JWKS_BYTES_MAX - len(body)))
    with pytest.raises(JwksError):
        KeySet.from_document(body + b" " * (JWKS_BYTES_MAX - len(body) + 1))


def test_the_algorithm_is_bound_to_the_key(key: SigningKey) -> None:
    verifier = make_verifier(jwks={"keys": [{**key.jwk, "alg": "PS256"}]}, algorithms=["RS256", "PS256"])
    assert code_of(verifier, token_of(key)) == "alg_key_mismatch"


def test_a_token_without_kid_is_verified_with_the_only_key_that_fits(key: SigningKey, other_key: SigningKey) -> None:
    token = raw_token(key, header=b'{"alg": "RS256"}')
    assert make_verifier(key).verify(token)
    assert make_verifier(jwks={"keys": [dict(key.jwk), vectors.A3_KEY]}).verify(token)
    assert code_of(make_verifier(key, other_key), token) == "kid_invalid"
    assert code_of(make_verifier(other_key), token) == "signature_invalid"


def test_a_key_under_another_kid_is_not_tried(key: SigningKey, other_key: SigningKey) -> None:
    verifier = make_verifier(key, other_key)
    assert code_of(verifier, token_of(key, header={"kid": other_key.kid})) == "signature_invalid"
    assert code_of(verifier, token_of(key, header={"kid": key.kid.swapcase()})) == "kid_unknown"


def test_two_keys_are_the_same_one_only_if_their_material_and_algorithm_are(
    key: SigningKey, other_key: SigningKey
) -> None:
    def read(**members: Any) -> PublicKey:
        found = KeySet.from_document({"keys": [{**key.jwk, **members}]}).get(key.kid)
        assert found is not None
        return found

    assert read() == read(use="sig", x="other members do not matter")
    assert read() != read(alg="PS256")
    assert read() != read(n=other_key.jwk["n"])


@pytest.mark.parametrize(
    "jwk", [{}, {"kty": "oct", "k": "AA"}, {"kty": "RSA", "n": "AQ"}, {"kty": "RSA", "n": 1, "e": 1}]
)
def test_what_is_no_public_key_has_no_thumbprint(jwk: dict[str, Any]) -> None:
    with pytest.raises(JwksError):
        thumbprint(jwk)


@pytest.mark.parametrize("alg", ["RS384", "RS512", "PS256"])
def test_other_rsa_algorithms_work_only_by_name(key: SigningKey, alg: str) -> None:
    head = json.dumps({"alg": alg, "kid": "k"}).encode()
    signing_input = f"{b64url(head)}.{b64url(json.dumps(members()).encode())}"
    digest = {"384": hashes.SHA384(), "512": hashes.SHA512()}.get(alg[2:], hashes.SHA256())
    pad: Any = padding.PSS(padding.MGF1(hashes.SHA256()), 32) if alg == "PS256" else padding.PKCS1v15()
    token = f"{signing_input}.{b64url(key.private.sign(signing_input.encode(), pad, digest))}"
    jwks = {"keys": [{**key.jwk, "alg": alg, "kid": "k"}]}
    assert make_verifier(jwks=jwks, algorithms=[alg], clock=ManualClock(NOW)).verify(token)
    assert code_of(make_verifier(jwks=jwks), token) == "alg_not_allowed"


def test_a_key_of_the_roca_shape_verifies_nothing_although_its_signature_is_right() -> None:
    p, q = real_roca_primes()
    d = pow(65537, -1, (p - 1) * (q - 1))
    public = rsa.RSAPublicNumbers(65537, p * q)
    assert all(pow(base, prime - 1, prime) == 1 for prime in (p, q) for base in (2, 3, 5))
    private = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), public).private_key()
    signature = private.sign(b"x", padding.PKCS1v15(), hashes.SHA256())
    private.public_key().verify(signature, b"x", padding.PKCS1v15(), hashes.SHA256())
    jwks = {"keys": [rsa_jwk(p * q)]}
    head, body = b64url(b'{"alg":"RS256","kid":"bad"}'), b64url(b"{}")
    token = f"{head}.{body}.{b64url(signature)}"
    with pytest.raises(ConfigurationError, match="no usable key"):
        verify_compact(token, jwks)
    assert [why for _, why in KeySet.from_document({"keys": [*jwks["keys"], vectors.A2_KEY]}).rejected] == [
        "RSA modulus is weak"
    ]


@pytest.mark.parametrize("jwks", ["{}", b"{", [], 5, [{"kty": "RSA"}]])
def test_a_local_set_of_any_other_kind_is_a_configuration_error(jwks: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_verifier(jwks=jwks)
    assert (caught.value.code, caught.value.setting) == ("jwks_invalid", "jwks")


def test_a_kid_that_no_token_can_name_is_left_out() -> None:
    keys = KeySet.from_document({"keys": [vectors.A3_KEY, {**vectors.A2_KEY, "kid": "\ud800"}]})
    assert keys.rejected == ((1, "kid is not a short string"),)


@pytest.mark.parametrize("jwk", [{"kty": "RSA", "n": "\ud800", "e": "AQAB"}, {"kty": ["RSA"]}, {"kty": {}}])
def test_a_thumbprint_of_anything_else_is_refused_by_name(jwk: dict[str, Any]) -> None:
    with pytest.raises(JwksError):
        thumbprint(jwk)


def test_an_unusable_key_under_the_same_kid_does_not_spoil_the_set(key: SigningKey) -> None:
    for other in ({"use": "enc"}, {"alg": "RSA-OAEP"}, {"key_ops": ["encrypt"]}):
        keys = KeySet.from_document({"keys": [{**key.jwk, **other}, dict(key.jwk)]})
        assert (keys.kids, len(keys.rejected)) == ((key.kid,), 1)


def test_es256_works_only_by_name() -> None:
    private = ec.derive_private_key(379, ec.SECP256R1())  # the key of SHORT_POINT
    head = b64url(b'{"alg":"ES256","kid":"k"}')
    signing_input = f"{head}.{b64url(json.dumps(members()).encode())}"
    r, s = decode_dss_signature(private.sign(signing_input.encode(), ec.ECDSA(hashes.SHA256())))
    token = f"{signing_input}.{b64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"
    jwks = {"keys": [{**SHORT_POINT, "kid": "k"}]}
    assert make_verifier(jwks=jwks, algorithms=["ES256"]).verify(token)
    assert code_of(make_verifier(jwks=jwks), token) == "alg_not_allowed"
