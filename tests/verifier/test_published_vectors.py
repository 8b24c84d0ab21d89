"""Published suites in full: Wycheproof, JSONTestSuite, RFC 7515 and 7520. What is stricter here stands in a table."""

from __future__ import annotations

import json
from base64 import b64decode
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature

from tests.verifier import vectors
from tests.verifier.support import code_of, make_verifier, raw_token
from verifier import ConfigurationError, InvalidToken
from verifier.jwk import JwksError, KeySet
from verifier.jws import verify_compact
from verifier.testing import SigningKey
from verifier.token import decode_segment, strict_json_object

VECTORS = Path(__file__).parents[1] / "vectors"
PUBLIC = ("RS256", "RS384", "RS512", "PS256", "ES256")


def read(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_bytes())


def octets(text: str) -> bytes:
    return decode_segment(text.encode(), "vector")


def outcome(token: str, keys: list[dict[str, Any]], algorithms: tuple[str, ...]) -> str:
    """``valid``, or the code of the refusal; for an unusable set, why."""
    try:
        verify_compact(token, {"keys": keys}, algorithms)
    except InvalidToken as error:
        return error.code
    except ConfigurationError as error:
        return f"{error.code}: {str(error).removeprefix('jwks: ')}"
    return "valid"


# -- Wycheproof: keys and compact signatures ---------------------------------------------------------------------------

NO_KEY = "jwks_invalid: the set has no usable key"
SHORT = "jwks_invalid: an oct key is unusable: secret_too_short"

KEYS: dict[int, tuple[str, str]] = {
    # tcId: the outcome where public-key algorithms are allowed, and where HS256 alone is
    1: ("alg_not_allowed", "valid"),  # see LAXER
    2: ("alg_not_allowed", "valid"),
    3: ("alg_not_allowed", "signature_invalid"),
    5: ("valid", "alg_not_allowed"),
    6: (NO_KEY, "alg_not_allowed"),
    7: (NO_KEY, "alg_not_allowed"),
    8: ("token_malformed", "token_malformed"),  # its payload is empty; the key is refused as well
    9: ("token_malformed", "token_malformed"),  # the same
    10: ("alg_not_allowed", SHORT),
    11: ("alg_not_allowed", "alg_not_allowed"),
    12: ("alg_not_allowed", "alg_not_allowed"),
    13: ("alg_not_allowed", "valid"),
    14: ("alg_not_allowed", "alg_not_allowed"),
    15: ("alg_not_allowed", "alg_not_allowed"),
    16: ("alg_not_allowed", SHORT),
    17: ("alg_not_allowed", "alg_not_allowed"),
    18: ("alg_not_allowed", "alg_not_allowed"),
    19: (NO_KEY, "alg_not_allowed"),
    20: (NO_KEY, "alg_not_allowed"),
    21: (NO_KEY, "alg_not_allowed"),
    22: (NO_KEY, "alg_not_allowed"),
    23: (NO_KEY, "alg_not_allowed"),
    24: (NO_KEY, "alg_not_allowed"),
    25: ("alg_not_allowed", "kid_unknown"),
    26: ("alg_not_allowed", "kid_unknown"),
}

STRICTER_KEYS: dict[int, str] = {
    14: "HS384 is no algorithm of this verifier",
    15: "HS512 is no algorithm of this verifier",
}

LAXER: dict[int, str] = {
    1: "a local set with a secret beside a public key; the caller who names HS256 alone has said which is meant, and "
    "a public key is never tried as a secret. A fetched set never holds a secret (the next test)",
}

USABLE = {1, 5}
"""The sets that have a usable public key, as a fetched document."""


@pytest.mark.parametrize("vector", read("wycheproof_json_web_key"), ids=lambda vector: f"{vector['tcId']}")
def test_wycheproof_json_web_key(vector: dict[str, Any]) -> None:
    number, expected = vector["tcId"], vector["result"]
    got = tuple(outcome(vector["jws"], vector["keys"], allowed) for allowed in (PUBLIC, ("HS256",)))
    if number == 4:  # one kid twice; the second key's text has unused bits set besides
        assert got[0] == "alg_not_allowed"
        assert got[1].startswith("jwks_invalid: an oct key is unusable")
    else:
        assert got == KEYS[number]
    deviates = ("valid" in got) != (expected == "valid")
    assert deviates == (number in STRICTER_KEYS or number in LAXER)
    try:
        held = KeySet.from_document({"keys": vector["keys"]})
    except JwksError:
        assert number not in USABLE
    else:
        assert number in USABLE
        assert {key.alg for key in held} <= set(PUBLIC)


def test_a_kid_that_two_local_secrets_share_decides_nothing() -> None:
    secret = vectors.COOKBOOK_OCT_KEY
    twice = [secret, {**secret, "k": vectors.A1_KEY["k"]}]
    assert outcome(vectors.COOKBOOK_HS256_TOKEN, twice, ("HS256",)) == "kid_invalid"


SIGNATURES: dict[str, str] = {
    "acceptsValid": "valid",
    "rejectsModifiedSignature": "signature_invalid",
    "rejectsMissingSignature": "signature_invalid",
    "rejectsMissingSignatureAndSeparator": "token_malformed",
    "rejectsModifiedPayload": "signature_invalid",
    "rejectsMissingPayload": "token_malformed",
    "rejectsMissingPayloadAndSeparator": "token_malformed",
    "rejectsModifiedHeader": "kid_unknown",
    "rejectsMissingHeader": "token_malformed",
    "rejectsMissingHeaderAndSeparator": "token_malformed",
    "rejectsMissingHeaderAndSignature": "token_malformed",
    "rejectsMissingHeaderSignatureAndSeparators": "token_malformed",
    "rejectsEmptyString": "token_malformed",
    "rejectsExtraEmptyComponent": "token_malformed",
    "rejectsExtraComponent": "token_malformed",
    "rejectsNoneAlgorithmAndMissingSignature": "alg_not_allowed",
    "rejectsValidJsonSerialization": "token_malformed",
    "rejectsSymmetryConfusionAttacks_aesKeyFromEcVerificationKeyBytes": "alg_not_allowed",
    "rejectsAttackerProvidedEmbeddedJwk": "signature_invalid",
}


@pytest.mark.parametrize("vector", read("wycheproof_json_web_signature"), ids=lambda vector: f"{vector['tcId']}")
def test_wycheproof_json_web_signature(vector: dict[str, Any]) -> None:
    family, _, comment = vector["comment"].partition(": ")
    got = outcome(vector["jws"], vector["keys"], ("HS256",) if family == "hs256" else PUBLIC)
    assert got == SIGNATURES[comment]
    assert (got == "valid") == (vector["result"] == "valid")


SIGNATURE_COUNTS = {"RS256": 517, "RS384": 258, "RS512": 259, "PS256": 108, "ES256": 262}

STRICTER_SIGNATURES = {
    "MissingNull": "RFC 8017 section 9.2 note 1: the NULL in DigestInfo is what a signer writes; PKCS #1 v1.5 allowed "
    "verifiers to do without it, and the suite calls it acceptable, not valid",
}


@pytest.mark.parametrize("alg", PUBLIC)
def test_wycheproof_signatures(alg: str) -> None:
    counted = 0
    for group in read("wycheproof_signatures"):
        if group["jwk"]["alg"] != alg:
            continue
        (key,) = KeySet.from_document({"keys": [group["jwk"]]})
        for number, expected, comment, flags, message, signature in group["tests"]:
            counted += 1
            try:
                key.verify(octets(signature), octets(message))
                got = "valid"
            except InvalidSignature:
                got = "invalid"
            if expected == "acceptable":
                assert (got, flags) == ("invalid", next(iter(STRICTER_SIGNATURES)))
            else:
                assert got == expected, f"{group['file']} {number}: {comment}"
    assert counted == SIGNATURE_COUNTS[alg]


# -- JSONTestSuite -----------------------------------------------------------------------------------------------------


def json_suite() -> dict[str, bytes]:
    def text(packed: Any) -> bytes:
        if isinstance(packed, str):
            return b64decode(packed)
        piece, times, rest = packed
        return b64decode(piece) * int(times) + b64decode(rest)

    return {name: text(packed) for name, packed in read("json_test_suite").items()}


SUITE = json_suite()

STRICTER_JSON = {
    "y_object_duplicated_key": "duplicate names (RFC 8725 section 2.4, RFC 7519 section 4)",
    "y_object_duplicated_key_and_value": "duplicate names (RFC 8725 section 2.4, RFC 7519 section 4)",
}

IMPLEMENTATION_DEFINED = {
    "i_number_double_huge_neg_exp": True,  # becomes 0.0, as every reader has it
    "i_number_real_underflow": True,
    "i_number_too_big_neg_int": True,  # exact, up to INTEGER_DIGITS_MAX digits
    "i_number_too_big_pos_int": True,
}
"""All other ``i_`` texts are refused: out of range, too many digits, lone surrogates, not UTF-8, a BOM, or too deep."""


def reads(raw: bytes) -> bool:
    try:
        strict_json_object(raw)
    except ValueError:
        return False
    return True


def wrapped(raw: bytes) -> bytes:
    """As a member of an object, because claims and headers are objects."""
    return b'{"x":' + raw + b"}"


def test_the_json_suite_is_whole() -> None:
    assert Counter(name[0] for name in SUITE) == {"y": 95, "n": 188, "i": 35}


@pytest.mark.parametrize("name", [name for name in SUITE if name[0] == "n"])
def test_json_that_must_be_refused_is_refused(name: str) -> None:
    assert not reads(SUITE[name])
    assert not reads(wrapped(SUITE[name]))


@pytest.mark.parametrize("name", [name for name in SUITE if name[0] == "y"])
def test_json_that_must_be_accepted_is_accepted_with_its_value(name: str) -> None:
    raw = SUITE[name]
    accepted = name not in STRICTER_JSON
    assert reads(wrapped(raw)) is accepted
    assert reads(raw) is (accepted and raw.lstrip()[:1] == b"{")  # one object, and nothing else
    if accepted:
        assert strict_json_object(wrapped(raw)) == {"x": json.loads(raw)}


@pytest.mark.parametrize("name", [name for name in SUITE if name[0] == "i"])
def test_json_that_readers_may_choose_about_is_decided_once_and_for_all(name: str) -> None:
    assert reads(wrapped(SUITE[name])) is IMPLEMENTATION_DEFINED.get(name, False)


def test_the_json_suite_in_a_signed_token(key: SigningKey) -> None:
    verifier = make_verifier(key, token_cache_size=0)
    codes = Counter()  # type: Counter[str]
    for raw in SUITE.values():
        if 0 < len(raw) < 10_000:
            codes[code_of(verifier, raw_token(key, payload=raw))] += 1
    objects = sum(reads(raw) for raw in SUITE.values())
    assert codes["claim_missing"] == objects  # good JSON without claims
    assert set(codes) == {"claim_missing", "token_json_invalid"}


# -- RFC 7515 appendix A and RFC 7520 that ask for more than this verifier does ----------------------------------------


@pytest.mark.parametrize(
    ("token", "key", "allowed", "expected"),
    [
        (vectors.A4_TOKEN, vectors.A4_KEY, ("ES256",), "alg_not_allowed"),
        (vectors.A4_TOKEN, vectors.A4_KEY, ("ES512",), "setting_invalid"),
        (vectors.A5_TOKEN, vectors.A2_KEY, ("RS256",), "alg_not_allowed"),
        (vectors.A5_TOKEN, vectors.A2_KEY, ("none",), "setting_invalid"),
        (vectors.A1_TOKEN, vectors.A1_KEY, ("RS256", "HS256"), "setting_invalid"),
        (vectors.A3_TOKEN, vectors.A3_KEY, ("RS256",), "alg_not_allowed"),
        (vectors.COOKBOOK_PS384_TOKEN, vectors.COOKBOOK_RSA_KEY, PUBLIC, "alg_not_allowed"),
        (vectors.COOKBOOK_PS384_TOKEN, vectors.COOKBOOK_RSA_KEY, ("PS384",), "setting_invalid"),
        (vectors.COOKBOOK_ES512_TOKEN, vectors.COOKBOOK_EC_KEY, PUBLIC, "alg_not_allowed"),
        (vectors.COOKBOOK_DETACHED_TOKEN, vectors.COOKBOOK_RSA_KEY, ("RS256",), "token_malformed"),
        (vectors.COOKBOOK_HS256_PROTECTED_TOKEN, vectors.COOKBOOK_OCT_KEY, ("HS256",), "valid"),
        (vectors.COOKBOOK_FLATTENED, vectors.COOKBOOK_OCT_KEY, ("HS256",), "token_malformed"),
        (vectors.COOKBOOK_GENERAL, vectors.COOKBOOK_OCT_KEY, ("HS256",), "token_malformed"),
    ],
    ids=[
        "RFC 7515 A.4 ES512", "A.4 ES512 named", "A.5 none", "A.5 none named", "A.1 beside RS256", "A.3 not named",
        "RFC 7520 4.2 PS384", "4.2 PS384 named", "4.3 ES512", "4.5 detached", "4.6 compact", "4.6 flattened",
        "4.6 general",
    ],
)  # fmt: skip
def test_an_example_of_an_rfc_has_its_one_outcome(
    token: str, key: dict[str, Any], allowed: tuple[str, ...], expected: str
) -> None:
    assert outcome(token, [key], allowed).partition(":")[0] == expected


@pytest.mark.parametrize(
    ("jwk", "rejected"),
    [
        (vectors.COOKBOOK_EC_KEY, "ES256 needs crv P-256"),
        ({**vectors.COOKBOOK_EC_KEY, "d": "AAhRON2r9cqXX1hg-RoI6R1tX5p2rUAYdmpHZoC1XNM5"}, "holds private members"),
        (vectors.COOKBOOK_RSA_KEY, None),
        ({**vectors.COOKBOOK_RSA_KEY, "d": "bWUSVaxorn7bEF1djytBd0kHv70Ly5pvbomzMWSOr20"}, "holds private members"),
        (vectors.COOKBOOK_OCT_KEY, "kty is not RSA or EC; a symmetric key has no place in a set"),
        ({**vectors.COOKBOOK_OCT_KEY, "use": "enc", "alg": "A256GCM"}, "kty is not RSA or EC; a symmetric key has no"),
    ],
    ids=["3.1 EC public", "3.2 EC private", "3.3 RSA public", "3.4 RSA private", "3.5 HMAC", "3.6 encryption"],
)
def test_a_key_of_rfc_7520_section_3_is_taken_or_left_out_by_name(jwk: dict[str, Any], rejected: str | None) -> None:
    keys = KeySet.from_document({"keys": [{**vectors.A3_KEY, "kid": "beside"}, jwk]})
    if rejected is None:
        assert keys.kids == ("beside", jwk["kid"])
    else:
        ((index, why),) = keys.rejected
        assert index == 1
        assert why.startswith(rejected)
