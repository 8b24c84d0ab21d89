"""Steps 1 and 2: one token has one spelling, and no input raises anything but InvalidToken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.verifier.support import NOW, code_of, make_verifier, members, raw_token, refusal, sign_segments, token_of
from verifier import Verifier
from verifier.decision import Trust
from verifier.limits import HEADER_BYTES_MAX, INTEGER_DIGITS_MAX, JSON_DEPTH_MAX, KID_BYTES_MAX, TOKEN_CHARS_MAX
from verifier.testing import SigningKey, b64url, make_key
from verifier.token import parse, strict_json_object


@pytest.fixture
def verifier(key: SigningKey) -> Verifier:
    return make_verifier(key, token_cache_size=0)


def payload_with(text: str) -> bytes:
    """A good payload with one more member, as text."""
    return (json.dumps(members())[:-1] + ", " + text + "}").encode()


def header_with(key: SigningKey, text: str) -> bytes:
    return f'{{"alg": "RS256", "kid": "{key.kid}", {text}}}'.encode()


def test_a_token_with_any_json_spelling_of_good_claims_is_accepted(verifier: Verifier, key: SigningKey) -> None:
    spaced = json.dumps(members(), indent=3).replace('"sub"', r'"\u0073ub"').encode()
    assert verifier.verify(raw_token(key, payload=b"\n\t " + spaced + b"\r\n"))["sub"] == "ada"


@pytest.mark.parametrize(
    "token", ["", ".", "..", "...", "a.b", "a.b.c.d", "a..c", ".b.c", "eyJ9.e30", "Bearer a.b.c", "ä.b.c", "\ud800.b.c"]
)
def test_what_is_not_three_segments_is_malformed_or_not_canonical(verifier: Verifier, token: str) -> None:
    error = refusal(verifier, token)
    assert (error.step, error.code) in ((1, "token_malformed"), (1, "token_not_canonical"), (1, "token_json_invalid"))


class Text(str):
    """Not exactly a string."""


@pytest.mark.parametrize("token", [None, 1, 1.5, b"a.b.c", [], {}, object(), ("a",), Text("a.b.c"), Verifier])
def test_what_is_not_a_string_is_refused_and_not_an_error(verifier: Verifier, token: object) -> None:
    assert code_of(verifier, token) == "token_malformed"


def test_what_is_not_exactly_a_string_is_refused_also_when_an_equal_token_is_cached(key: SigningKey) -> None:
    verifier = make_verifier(key)
    token = token_of(key)
    verifier.verify(token)
    assert code_of(verifier, token.encode()) == "token_malformed"


def test_a_token_of_the_greatest_length_is_read_and_one_character_more_is_not(
    verifier: Verifier, key: SigningKey
) -> None:
    # 3 bytes of filler are 4 characters of token; the rest is made up in the header, byte by byte.
    for filler in range(3):
        header = header_with(key, f'"x": "{"y" * filler}"')
        spare = TOKEN_CHARS_MAX - len(raw_token(key, header=header, payload=payload_with('"pad": ""')))
        token = raw_token(key, header=header, payload=payload_with(f'"pad": "{"z" * (spare * 3 // 4)}"'))
        if len(token) == TOKEN_CHARS_MAX:
            assert verifier.verify(token)["sub"] == "ada"
            break
    else:
        pytest.fail("no filler gives the exact length")
    assert code_of(verifier, token + "A") == "token_too_large"


# -- base64url -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [0, 1, 2])
@pytest.mark.parametrize("junk", ["=", "==", " ", "\n", "\r\n", "\t", "+", "/", "!", "\x00", "%3D", "A"])
def test_nothing_can_be_added_to_a_segment(verifier: Verifier, key: SigningKey, segment: int, junk: str) -> None:
    parts = token_of(key).split(".")
    parts[segment] += junk
    assert refusal(verifier, ".".join(parts)).step in (1, 4)


@pytest.mark.parametrize("junk", ["=", " ", "\n", "!"])
def test_junk_in_a_signed_segment_is_refused_although_the_signature_covers_it(
    verifier: Verifier, key: SigningKey, junk: str
) -> None:
    header, payload, _ = token_of(key).split(".")
    assert code_of(verifier, sign_segments(key, header, payload[:8] + junk + payload[8:])) == "token_not_canonical"
    assert code_of(verifier, sign_segments(key, header + junk, payload)) == "token_not_canonical"


@pytest.mark.parametrize("size", [1, 2])
def test_unused_bits_must_be_zero(verifier: Verifier, key: SigningKey, size: int) -> None:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    header, payload, signature = token_of(key).split(".")
    assert len(signature) % 4 == 2  # 256 bytes
    last = alphabet.index(signature[-1])
    assert last % 16 == 0
    assert code_of(verifier, f"{header}.{payload}.{signature[:-1]}{alphabet[last + size]}") == "token_not_canonical"


def test_the_standard_alphabet_is_refused(verifier: Verifier, key: SigningKey) -> None:
    payload = next(p for p in (payload_with(f'"x": "{"?" * n}~~~"') for n in range(4)) if "_" in b64url(p))
    header = token_of(key).split(".")[0]
    assert verifier.verify(sign_segments(key, header, b64url(payload)))
    spelled = b64url(payload).replace("_", "/").replace("-", "+")
    assert code_of(verifier, sign_segments(key, header, spelled)) == "token_not_canonical"


# -- JSON ------------------------------------------------------------------------------------------------------------

DEEP = "[" * JSON_DEPTH_MAX + "]" * JSON_DEPTH_MAX  # inside the payload's own object

BAD_MEMBERS = {
    "duplicate name": '"sub": "eve"',
    "duplicate name, escaped": r'"\u0073ub": "eve"',
    "duplicate name inside": '"x": {"a": 1, "a": 1}',
    "duplicate name in a list": '"x": [{"a": 1, "a": 1}]',
    "NaN": '"x": NaN',
    "Infinity": '"x": Infinity',
    "-Infinity": '"x": -Infinity',
    "1e400": '"x": 1e400',
    "-1e400": '"x": [-1e400]',
    "lone high surrogate": r'"x": "\ud800"',
    "lone low surrogate": r'"x": "\udc00 "',
    "surrogates the wrong way round": r'"x": "\udc00\ud800"',
    "lone surrogate as a name": r'"\ud800": 1',
    "lone surrogate deep inside": r'"x": [{"y": ["\udfff"]}]',
    "too deep": f'"x": [{DEEP}]',
    "far too deep": '"x": ' + "[" * 5000 + "]" * 5000,
    "objects too deep": '"x": ' + '{"a":' * JSON_DEPTH_MAX + "1" + "}" * JSON_DEPTH_MAX,
    "control character": '"x": "\n"',
    "single quotes": "'x': 1",
    "trailing comma": '"x": 1,',
    "comment": '"x": 1 /* */',
    "leading zero": '"x": 01',
    "leading plus": '"x": +1',
    "bare point": '"x": 1.',
    "hex": '"x": 0x10',
    "Python literal": '"x": None',
    "invalid escape": r'"x": "\x41"',
    "integer too long": f'"x": {"9" * (INTEGER_DIGITS_MAX + 1)}',
}

GOOD_MEMBERS = {
    "surrogate pair": r'"x": "\ud83d\ude00"',
    "deep enough": f'"x": {DEEP}',
    "a large number": '"x": 1e308',
    "a negative zero": '"x": -0',
    "a small number": '"x": 1e-400',
    "a long integer": f'"x": {"9" * INTEGER_DIGITS_MAX}',
    "null": '"x": null',
    "escapes": r'"x": "\"\\\/\b\f\n\r\t\u0000"',
    "text": '"ключ": "значение ✓"',
}


@pytest.mark.parametrize("text", BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_json_that_readers_may_disagree_on_is_refused_in_payload_and_header(
    verifier: Verifier, key: SigningKey, text: str
) -> None:
    in_payload = refusal(verifier, raw_token(key, payload=payload_with(text)))
    assert (in_payload.code, in_payload.step, in_payload.reason) == ("token_json_invalid", 1, "payload")
    text = text.replace('"sub"', '"kid"').replace(r'"\u0073ub"', r'"\u006bid"')
    in_header = refusal(verifier, raw_token(key, header=header_with(key, text)))
    assert in_header.code == ("token_too_large" if len(text) > HEADER_BYTES_MAX - 100 else "token_json_invalid")


@pytest.mark.parametrize("text", GOOD_MEMBERS.values(), ids=GOOD_MEMBERS)
def test_json_just_inside_the_rules_is_accepted(verifier: Verifier, key: SigningKey, text: str) -> None:
    assert verifier.verify(raw_token(key, payload=payload_with(text)))["sub"] == "ada"
    assert verifier.verify(raw_token(key, header=header_with(key, text)))["sub"] == "ada"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b" ",
        b"[]",
        b"null",
        b"1",
        b'"text"',
        b"{}{}",
        b"{} x",
        b'{"a": 1',
        b"\xef\xbb\xbf{}",
        json.dumps(members()).encode("utf-8-sig"),
        json.dumps(members()).encode("utf-16"),
        json.dumps(members()).encode("utf-16-le"),
        json.dumps(members()).encode("utf-32"),
        b'{"x": "\xff"}',
        b'{"x": "\xc0\xaf"}',
        b'{"x": "\xed\xa0\x80"}',
        b"\x80\x04\x95",
    ],
)
def test_a_payload_that_is_no_strict_json_object_is_refused(
    verifier: Verifier, key: SigningKey, payload: bytes
) -> None:
    if payload:
        assert code_of(verifier, raw_token(key, payload=payload)) == "token_json_invalid"
    with pytest.raises(ValueError):  # noqa: PT011 - the promise is the type alone
        strict_json_object(payload)


# -- header ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "", "HS256", "RS384", "PS256", "ES256", "rs256", "RS256 "])
def test_an_algorithm_that_was_not_named_is_refused(verifier: Verifier, key: SigningKey, alg: str) -> None:
    error = refusal(verifier, token_of(key, header={"alg": alg}))
    assert (error.code, error.step) == ("alg_not_allowed", 2)


@pytest.mark.parametrize("alg", [None, 1, True, ["RS256"], {"RS256": 1}])
def test_an_algorithm_of_the_wrong_type_is_refused(verifier: Verifier, key: SigningKey, alg: Any) -> None:
    assert code_of(verifier, token_of(key, header={"alg": alg})) == "alg_not_allowed"
    assert code_of(verifier, raw_token(key, header=b"{}")) == "alg_not_allowed"


def test_an_unsigned_token_is_refused_whatever_its_third_segment(verifier: Verifier) -> None:
    head, body = b64url(b'{"alg":"none"}'), b64url(json.dumps(members()).encode())
    assert [code_of(verifier, f"{head}.{body}.{end}") for end in ("", "AA")] == ["alg_not_allowed"] * 2


@pytest.mark.parametrize("typ", ["JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt"])
def test_an_access_token_type_is_accepted(verifier: Verifier, key: SigningKey, typ: str) -> None:
    assert verifier.verify(token_of(key, header={"typ": typ}))


def test_a_token_without_typ_is_accepted(verifier: Verifier, key: SigningKey) -> None:
    assert verifier.verify(raw_token(key))


@pytest.mark.parametrize(
    "typ", ["", "JWE", "logout+jwt", "dpop+jwt", "secevent+jwt", "JWT ", 1, True, [], ["JWT"], None]
)
def test_another_type_is_refused(verifier: Verifier, key: SigningKey, typ: Any) -> None:
    error = refusal(verifier, token_of(key, header={"typ": typ}))
    assert (error.code, error.step) == ("typ_not_allowed", 2)


@pytest.mark.parametrize("crit", [[], ["exp"], ["b64"], None, "exp", {}, 0])
def test_any_crit_is_refused(verifier: Verifier, key: SigningKey, crit: Any) -> None:
    error = refusal(verifier, token_of(key, header={"crit": crit}))
    assert (error.code, error.step) == ("crit_not_supported", 2)


def test_keys_in_the_header_are_not_used(key: SigningKey, other_key: SigningKey) -> None:
    verifier = make_verifier(other_key)
    header = {"jwk": dict(key.jwk), "jku": "https://evil.test/jwks.json", "x5u": "https://evil.test", "x5c": ["AA"]}
    assert code_of(verifier, token_of(key, header=header)) == "kid_unknown"
    assert code_of(verifier, token_of(key, header={**header, "kid": other_key.kid})) == "signature_invalid"
    assert verifier.verify(token_of(other_key, header=header))


@pytest.mark.parametrize("kid", ["", 1, True, [], {}, "k" * (KID_BYTES_MAX + 1), "é" * (KID_BYTES_MAX // 2 + 1), None])
def test_a_kid_that_is_not_a_short_string_is_refused(verifier: Verifier, key: SigningKey, kid: Any) -> None:
    error = refusal(verifier, token_of(key, header={"kid": kid}))
    assert (error.code, error.step) == ("kid_invalid", 2)


@pytest.mark.parametrize("kid", ["k" * KID_BYTES_MAX, "é" * (KID_BYTES_MAX // 2), "../../etc/passwd", "' OR 1=1 --"])
def test_a_kid_of_the_greatest_length_or_any_characters_is_only_unknown(
    verifier: Verifier, key: SigningKey, kid: str
) -> None:
    error = refusal(verifier, token_of(key, header={"kid": kid}))
    assert (error.code, error.step) == ("kid_unknown", 3)


def test_a_kid_of_a_megabyte_is_too_large(verifier: Verifier, key: SigningKey) -> None:
    assert code_of(verifier, token_of(key, header={"kid": "k" * 1_000_000})) == "token_too_large"


def test_a_header_of_the_greatest_size_is_read_and_one_byte_more_is_not(verifier: Verifier, key: SigningKey) -> None:
    room = HEADER_BYTES_MAX - len(header_with(key, '"x": ""'))
    assert verifier.verify(raw_token(key, header=header_with(key, f'"x": "{"y" * room}"')))
    too_large = raw_token(key, header=header_with(key, f'"x": "{"y" * (room + 1)}"'))
    assert code_of(verifier, too_large) == "token_too_large"


def test_headers_are_remembered_without_being_mixed_up(key: SigningKey) -> None:
    other = make_key()
    verifier = make_verifier(key, other, token_cache_size=0)
    for index in range(2 * Trust.REMEMBERED + 10):
        assert code_of(verifier, token_of(key, header={"crit": [str(index)]})) == "crit_not_supported"
        assert code_of(verifier, token_of(other, header={"kid": key.kid, "x": index})) == "signature_invalid"
        assert verifier.verify(raw_token(key, header=header_with(key, f'"x": {index}')))
        assert verifier.verify(token_of(other))
    assert verifier.verify(token_of(key))


def test_the_signing_input_is_what_was_received(key: SigningKey) -> None:
    token = token_of(key)
    parsed = parse(token)
    assert parsed.signing_input.decode() == token.rpartition(".")[0]
    assert json.loads(parsed.payload) == members(exp=NOW + 900)
