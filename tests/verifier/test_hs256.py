"""HS256 (DESIGN 9): shared secrets that nobody else knows, and only until the cut-off."""

from __future__ import annotations

import json
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from tests.verifier.support import NOW, SECRET, Mirrored, code_of, make_verifier, token_of
from verifier import ConfigurationError
from verifier.testing import ManualClock, SigningKey


def public_bytes(key: SigningKey, encoding: Encoding, form: PublicFormat) -> bytes:
    return key.private.public_key().public_bytes(encoding, form)


def certificate(key: SigningKey, encoding: Encoding) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "id.test")])
    start = datetime(2020, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.private.public_key())
    builder = builder.serial_number(1).not_valid_before(start).not_valid_after(start + timedelta(days=1))
    return builder.sign(key.private, hashes.SHA256()).public_bytes(encoding)


PUBLIC_FORMS: dict[str, Callable[[SigningKey], bytes]] = {
    "PEM": lambda key: public_bytes(key, Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    "PEM without its last newline": lambda key: PUBLIC_FORMS["PEM"](key).rstrip(),
    "PEM PKCS1": lambda key: public_bytes(key, Encoding.PEM, PublicFormat.PKCS1),
    "PEM with CRLF": lambda key: PUBLIC_FORMS["PEM"](key).replace(b"\n", b"\r\n"),
    "PEM on one line": lambda key: PUBLIC_FORMS["PEM"](key).replace(b"\n", b"\\n"),
    "DER": lambda key: public_bytes(key, Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    "DER PKCS1": lambda key: public_bytes(key, Encoding.DER, PublicFormat.PKCS1),
    "base64 of DER": lambda key: b64encode(PUBLIC_FORMS["DER"](key)),
    "base64url of DER": lambda key: urlsafe_b64encode(PUBLIC_FORMS["DER"](key)).rstrip(b"="),
    "the lines of a PEM": lambda key: b"".join(PUBLIC_FORMS["PEM"](key).splitlines(keepends=True)[1:-1]),
    "SSH": lambda key: public_bytes(key, Encoding.OpenSSH, PublicFormat.OpenSSH),
    "SSH without its name": lambda key: PUBLIC_FORMS["SSH"](key).split()[1],
    "SSH2": lambda key: b"---- BEGIN SSH2 PUBLIC KEY ----\n" + PUBLIC_FORMS["SSH without its name"](key),
    "JWK": lambda key: json.dumps(dict(key.jwk)).encode(),
    "JWK set": lambda key: json.dumps({"keys": [dict(key.jwk)]}, indent=1).encode(),
    "certificate": lambda key: certificate(key, Encoding.PEM),
    "certificate DER": lambda key: certificate(key, Encoding.DER),
}


@pytest.mark.parametrize("form", PUBLIC_FORMS.values(), ids=PUBLIC_FORMS)
def test_a_public_key_in_any_form_is_refused_as_a_secret(key: SigningKey, form: Callable[[SigningKey], bytes]) -> None:
    secret = form(key)
    for given in (secret, ("kid", secret)):
        with pytest.raises(ConfigurationError) as caught:
            make_verifier(key, hs256_secrets=[given])
        assert (caught.value.code, caught.value.setting) == ("secret_is_public_key", "hs256_secrets")
        assert secret[-20:].decode("latin-1") not in str(caught.value)


@pytest.mark.parametrize("form", PUBLIC_FORMS.values(), ids=PUBLIC_FORMS)
def test_a_token_forged_with_a_public_key_as_hmac_secret_is_refused(
    key: SigningKey, form: Callable[[SigningKey], bytes]
) -> None:
    forged = token_of(form(key), header={"kid": key.kid})
    assert code_of(make_verifier(key), forged) == "alg_not_allowed"
    assert code_of(make_verifier(key, hs256_secrets=[SECRET]), forged) == "signature_invalid"


@pytest.mark.parametrize("secret", [b"", b"s", b"s" * 31, "s" * 31])
def test_a_secret_of_fewer_than_32_bytes_is_refused_with_advice(secret: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_verifier(hs256_secrets=[secret])
    assert (caught.value.code, caught.value.setting) == ("secret_too_short", "hs256_secrets")
    assert "32 random bytes" in str(caught.value)


@pytest.mark.parametrize("secret", ["s" * 32, "s\udcff" * 16, b"\x00\xff" * 16, "é" * 16, b"0" + b"\x1e" + b"x" * 30])
def test_a_secret_of_32_bytes_of_anything_else_is_taken(secret: Any) -> None:
    token = token_of(secret.encode("utf-8", "surrogateescape") if isinstance(secret, str) else secret)
    assert make_verifier(hs256_secrets=[secret]).verify(token)["sub"] == "ada"


@pytest.mark.parametrize(
    "secret", [None, 64, 1.5, ["s" * 32], ("kid",), ("kid", None), ("a", "b", "c"), ("kid", 64), "\ud800" * 32]
)
def test_what_is_no_secret_is_a_configuration_error(secret: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_verifier(hs256_secrets=[secret])
    assert caught.value.setting == "hs256_secrets"


@pytest.mark.parametrize("secrets", ["s" * 40, b"s" * 40])
def test_one_secret_that_is_not_in_a_list_is_a_configuration_error(secrets: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_verifier(hs256_secrets=secrets)
    assert caught.value.setting == "hs256_secrets"


def test_each_of_several_secrets_is_tried_for_a_token_without_kid() -> None:
    first, second, third = "1" * 32, "2" * 32, "3" * 32
    verifier = make_verifier(hs256_secrets=[first, ("old", second)])
    assert verifier.verify(token_of(first))
    assert verifier.verify(token_of(second))
    assert code_of(verifier, token_of(third)) == "signature_invalid"


def test_a_kid_chooses_among_the_secrets() -> None:
    first, second = "1" * 32, "2" * 32
    verifier = make_verifier(hs256_secrets=[("a", first), ("b", second)])
    assert verifier.verify(token_of(first, header={"kid": "a"}))
    assert code_of(verifier, token_of(first, header={"kid": "b"})) == "signature_invalid"
    assert code_of(verifier, token_of(first, header={"kid": "c"})) in ("kid_unknown", "signature_invalid")


def test_without_a_secret_hs256_is_not_allowed(key: SigningKey) -> None:
    assert code_of(make_verifier(key), token_of(SECRET)) == "alg_not_allowed"


def test_both_kinds_of_token_verify_side_by_side(key: SigningKey) -> None:
    verifier = make_verifier(key, hs256_secrets=[SECRET])
    assert verifier.verify(token_of(SECRET))["sub"] == verifier.verify(token_of(key))["sub"]


def test_the_cut_off_compares_now_and_not_iat(key: SigningKey) -> None:
    clock = ManualClock(NOW)
    verifier = make_verifier(key, hs256_secrets=[SECRET], hs256_until=NOW + 10, clock=clock)
    old, backdated = token_of(SECRET), token_of(SECRET, iat=NOW - 900)
    clock.advance(9.999)
    assert verifier.verify(old)
    assert verifier.verify(backdated)
    clock.advance(0.001)
    assert [code_of(verifier, token) for token in (old, backdated)] == ["hs256_cutoff"] * 2  # cached or not
    assert verifier.verify(token_of(key))


def test_a_legacy_token_is_revoked_like_any_other_also_by_the_secret_it_was_signed_with(key: SigningKey) -> None:
    for kind, value in (("jti", "t-1"), ("sub", "ada"), ("kid", "legacy")):
        mirrored = Mirrored(key, hs256_secrets=[("legacy", SECRET)])
        token = token_of(SECRET)
        assert mirrored.verifier.verify(token)
        mirrored.revoke(kind, value)
        assert code_of(mirrored.verifier, token) == "token_revoked"


def test_a_verifier_of_legacy_tokens_alone_is_ready() -> None:
    with make_verifier(hs256_secrets=[SECRET]) as verifier:
        assert verifier.wait_ready(0)
        assert verifier.verify(token_of(SECRET))
        assert verifier.status().ready
