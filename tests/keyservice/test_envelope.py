"""Private keys at rest."""

from __future__ import annotations

import base64
import copy
import json
import pickle

import pytest

from keyservice.core.sessions import RefreshToken
from keyservice.envelope import Kek, unwrap, wrap
from keyservice.errors import EnvelopeError
from keyservice.issuing import SharedSecret, SigningKey
from keyservice.keyring import new_key, reopen

KEK, OTHER = Kek(b"k" * 32), Kek(b"o" * 32)
PRIVATE = b"the private key"
ENVELOPE = wrap(PRIVATE, KEK, region="eu", kid="a")


def test_a_wrapped_key_opens_with_its_kek_region_and_kid() -> None:
    assert unwrap(ENVELOPE, KEK, region="eu", kid="a") == PRIVATE


def test_no_two_envelopes_are_alike() -> None:
    assert wrap(PRIVATE, KEK, region="eu", kid="a") != ENVELOPE


def test_a_wrong_kek_is_a_mismatch_by_name() -> None:
    with pytest.raises(EnvelopeError) as refused:
        unwrap(ENVELOPE, OTHER, region="eu", kid="a")
    assert refused.value.code == "kek_mismatch"
    assert KEK.kek_id in str(refused.value)


@pytest.mark.parametrize(("region", "kid"), [("us", "a"), ("eu", "b"), ("e", "ua")])
def test_an_envelope_belongs_to_one_region_and_one_key(region: str, kid: str) -> None:
    with pytest.raises(EnvelopeError) as refused:
        unwrap(ENVELOPE, KEK, region=region, kid=kid)
    assert refused.value.code == "envelope_invalid"


@pytest.mark.parametrize("member", ["key", "data"])
@pytest.mark.parametrize("at", [0, 12, -1])
def test_an_altered_envelope_does_not_open(member: str, at: int) -> None:
    altered = json.loads(ENVELOPE)
    raw = bytearray(base64.b64decode(altered[member]))
    raw[at] ^= 1
    altered[member] = base64.b64encode(raw).decode()
    with pytest.raises(EnvelopeError) as refused:
        unwrap(json.dumps(altered), KEK, region="eu", kid="a")
    assert refused.value.code == "envelope_invalid"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"v":1}', b"\xff"])
def test_what_is_no_envelope_is_refused(text: str | bytes) -> None:
    with pytest.raises(EnvelopeError) as refused:
        unwrap(text, KEK, region="eu", kid="a")
    assert refused.value.code == "envelope_invalid"


def test_a_stored_key_without_a_record_can_be_taken_up_again() -> None:
    made = new_key(KEK, "eu")
    assert reopen(made.envelope, KEK, "eu", made.kid) == made
    assert set(made.jwk) == {"kty", "n", "e", "use", "alg", "kid"}


def test_secrets_are_in_no_repr_and_cannot_be_serialised() -> None:
    from cryptography.hazmat.primitives import serialization as ser
    from cryptography.hazmat.primitives.asymmetric import rsa

    pem = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption()
    )
    held = [Kek(b"k" * 32), SigningKey("kid", pem), SharedSecret("s3cret"), RefreshToken("sid", "family", "s3cret")]
    for secret in held:
        assert "kkk" not in repr(secret)
        assert "s3cret" not in repr(secret)
        assert "BEGIN" not in repr(secret)
        assert not hasattr(secret, "__dict__")
        for serialise in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                serialise(secret)
