"""Steps 1 and 2 of verification: parse a compact JWS strictly, then read its header. Pure.

The input is a stranger's. Rules, each with the check that enforces it beside it:

* three parts of canonical base64url: no padding, whitespace, foreign alphabet or unused bits (RFC 7515 section 2,
  RFC 4648 section 3.5), so that one token has one spelling;
* header and payload are one JSON object each: strict UTF-8, no byte-order mark, no NaN or Infinity, no duplicate
  names, no lone surrogates (RFC 8259, RFC 8725 section 2.4), bounded depth and integer size;
* any ``crit`` is refused; ``jku``, ``jwk``, ``x5u`` and ``x5c`` are never looked at. What ``alg`` and ``typ`` may be
  is the caller's to say (:mod:`verifier.decision`).
"""

from __future__ import annotations

import json
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Annotated, Any, Final, NoReturn

import msgspec

from .errors import InvalidToken
from .limits import (
    HEADER_BYTES_MAX,
    INTEGER_DIGITS_MAX,
    JSON_DEPTH_MAX,
    KID_BYTES_MAX,
    TOKEN_CHARS_MAX,
)

__all__ = ["Header", "Parsed", "decode_segment", "parse", "read_header", "read_payload", "strict_json_object"]

_TYPES: Final = {"jwt": "JWT", "application/jwt": "JWT", "at+jwt": "at+jwt", "application/at+jwt": "at+jwt"}
_ABSENT: Final = "absent"

_Word = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Flat = dict[str, str | _Word | float | bool | list[str] | None]
_decode_flat: Final = msgspec.json.Decoder(_Flat).decode
_decode_json: Final = msgspec.json.Decoder().decode
_encode_json: Final = msgspec.json.Encoder().encode

_decode_base64: Final = msgspec.json.Decoder(bytes).decode
# By the length of a segment modulo 4: what closes it as a padded string, and last characters without unused bits.
_CLOSE: Final = (b'"', b'"', b'=="', b'="')
_ALPHABET: Final = (ascii_uppercase + ascii_lowercase + digits + "-_").encode()
_LAST: Final = (frozenset(_ALPHABET), frozenset[int](), frozenset(_ALPHABET[::16]), frozenset(_ALPHABET[::4]))
_PLUS, _SLASH, _DOT = b"+/."


class Header(msgspec.Struct, frozen=True, gc=False):
    """The header parameters that verification uses; everything else is ignored."""

    alg: str
    kid: str | None
    typ: str | None
    """``JWT``, ``at+jwt`` or ``absent``, compared as RFC 7515 section 4.1.9 says; None for any other."""


class Parsed(msgspec.Struct, frozen=True, gc=False):
    """Step 1's result. ``signing_input`` is ``header.payload`` as received (RFC 7515 section 5.2)."""

    header: bytes
    """The header's segment, still encoded: :func:`read_header`."""
    payload: bytes
    signing_input: bytes
    signature: bytes

    def __repr__(self) -> str:
        return "Parsed()"


def decode_segment(segment: bytes, name: str) -> bytes:
    """Canonical base64url to bytes; raises :class:`InvalidToken` (``token_not_canonical``).

    One spelling is admitted: nothing outside the alphabet (a decoder that skipped it would give too few bytes), and
    no unused bits in the last character.
    """
    size = len(segment)
    rest = size % 4
    try:
        raw = _decode_base64(b'"' + segment.replace(b"-", b"+").replace(b"_", b"/") + _CLOSE[rest])
    except msgspec.DecodeError:
        raise InvalidToken("token_not_canonical", step=1, reason=name) from None
    if len(raw) != size * 3 // 4 or _PLUS in segment or _SLASH in segment or (size and segment[-1] not in _LAST[rest]):
        raise InvalidToken("token_not_canonical", step=1, reason=name)
    return raw


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate name")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _bounded_int(text: str) -> int:
    if len(text) > INTEGER_DIGITS_MAX:
        raise ValueError("integer too long")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("number out of range")
    return value


def _check_tree(value: Any, depth: int) -> None:
    """Refuse deep nesting, and strings that are not Unicode text (a lone surrogate cannot be encoded)."""
    if depth > JSON_DEPTH_MAX:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, item in value.items():
            key.encode()
            _check_tree(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_tree(item, depth + 1)


def strict_json_object(raw: bytes) -> dict[str, Any]:
    """One JSON object under the rules above; raises :class:`ValueError`.

    The common case is decided by encoding the result again: where that gives the same bytes, the input had no
    duplicate names, no odd spellings and no invalid text, and its type leaves no room for depth or large integers.
    Everything else takes the slow, exact path.
    """
    try:
        members = _decode_flat(raw)
        if _encode_json(members) == raw:
            return members
    except (msgspec.DecodeError, UnicodeError):
        pass
    return _exact_json_object(raw)


def _exact_json_object(raw: bytes) -> dict[str, Any]:
    try:
        members = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite,
        )
        if type(members) is not dict:
            raise ValueError("not an object")
        _check_tree(members, 0)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return members


def read_header(segment: bytes) -> Header:
    """Step 2's form: the header's segment to its parameters; raises :class:`InvalidToken`."""
    raw = decode_segment(segment, "header")
    if len(raw) > HEADER_BYTES_MAX:
        raise InvalidToken("token_too_large", step=1, reason="header")
    try:
        members = strict_json_object(raw)
    except ValueError:
        raise InvalidToken("token_json_invalid", step=1, reason="header") from None
    alg, kid, typ = members.get("alg"), members.get("kid"), members.get("typ")
    if not isinstance(alg, str):
        raise InvalidToken("alg_not_allowed", step=2, reason="missing" if alg is None else "not a string")
    if "crit" in members:
        raise InvalidToken("crit_not_supported", step=2)
    if "kid" in members and (not isinstance(kid, str) or not kid or len(kid.encode()) > KID_BYTES_MAX):
        raise InvalidToken("kid_invalid", step=2)
    if "typ" not in members:
        return Header(alg, kid, _ABSENT)
    return Header(alg, kid, _TYPES.get(typ.lower()) if isinstance(typ, str) else None)


def parse(token: str) -> Parsed:
    """Step 1: three parts; raises :class:`InvalidToken` for anything but a compact JWS in its one spelling.

    The header is handed on as it stands: an issuer repeats a handful of them, and what one means is remembered.
    """
    if type(token) is not str:
        raise InvalidToken("token_malformed", step=1, reason="not a string")
    if len(token) > TOKEN_CHARS_MAX:
        raise InvalidToken("token_too_large", step=1)
    try:
        raw = token.encode("ascii")
    except UnicodeEncodeError:
        raise InvalidToken("token_malformed", step=1, reason="not ASCII") from None
    signing_input, _, signature = raw.rpartition(b".")
    header, dot, payload = signing_input.partition(b".")
    if not dot or not header or not payload or _DOT in payload:
        raise InvalidToken("token_malformed", step=1)
    return Parsed(header, decode_segment(payload, "payload"), signing_input, decode_segment(signature, "signature"))


def read_payload(payload: bytes) -> dict[str, Any]:
    """The claims as one JSON object; raises :class:`InvalidToken` (``token_json_invalid``)."""
    try:
        return strict_json_object(payload)
    except ValueError:
        raise InvalidToken("token_json_invalid", step=1, reason="payload") from None
