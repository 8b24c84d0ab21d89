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
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from typing import Any, Final, NamedTuple, NoReturn

import msgspec

from .errors import InvalidToken
from .limits import (
    HEADER_BYTES_MAX,
    INTEGER_DIGITS_MAX,
    JSON_DEPTH_MAX,
    KID_BYTES_MAX,
    TOKEN_CHARS_MAX,
)

__all__ = ["Header", "Parsed", "parse", "strict_json_object"]

_TO_STANDARD: Final = bytes.maketrans(b"-_", b"+/")
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt", "application/jwt"})
_decode_json: Final = msgspec.json.Decoder().decode
_encode_json: Final = msgspec.json.Encoder().encode


class Header(NamedTuple):
    """The header parameters that verification uses; everything else is ignored."""

    alg: str
    kid: str | None
    is_jwt: bool
    """True if ``typ`` is absent, ``JWT`` or ``at+jwt``, compared as RFC 7515 section 4.1.9 says."""


class Parsed(NamedTuple):
    """Step 1's result. ``signing_input`` is ``header.payload`` as received (RFC 7515 section 5.2)."""

    header: Header
    payload: bytes
    signing_input: bytes
    signature: bytes

    def __repr__(self) -> str:
        return f"Parsed(header={self.header!r})"


def decode_segment(segment: bytes, name: str) -> bytes:
    """Canonical base64url to bytes; raises :class:`InvalidToken` (``token_not_canonical``).

    The decoder is lenient; encoding its result again and comparing admits exactly one spelling.
    """
    standard = segment.translate(_TO_STANDARD)
    try:
        raw = a2b_base64(standard + b"===="[: -len(segment) % 4])
    except (Base64Error, ValueError):
        raise InvalidToken("token_not_canonical", step=1, reason=name) from None
    if b2a_base64(raw, newline=False).rstrip(b"=").translate(_TO_URL) != segment:
        raise InvalidToken("token_not_canonical", step=1, reason=name)
    return raw


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate name")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _bounded_int(digits: str) -> int:
    if len(digits) > INTEGER_DIGITS_MAX:
        raise ValueError("integer too long")
    return int(digits)


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


def _is_flat(members: dict[str, Any]) -> bool:
    """True if no member holds an object, and no list holds anything but strings: nothing left to check."""
    for value in members.values():
        kind = type(value)
        if kind is dict or (kind is int and abs(value) >= 10**INTEGER_DIGITS_MAX):
            return False
        if kind is list and any(type(item) is not str for item in value):
            return False
    return True


def strict_json_object(raw: bytes) -> dict[str, Any]:
    """One JSON object under the rules above; raises :class:`ValueError`.

    The common case is decided by encoding the result again: where that gives the same bytes, the input had no
    duplicate names, no odd spellings and no invalid text. Everything else takes the slow, exact path.
    """
    try:
        members = _decode_json(raw)
        if type(members) is dict and _encode_json(members) == raw and _is_flat(members):
            return members
    except (msgspec.DecodeError, UnicodeError, RecursionError, OverflowError, ValueError):
        pass
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


def _read_object(raw: bytes, name: str) -> dict[str, Any]:
    try:
        return strict_json_object(raw)
    except ValueError:
        raise InvalidToken("token_json_invalid", step=1, reason=name) from None


def _read_header(segment: bytes) -> Header:
    raw = decode_segment(segment, "header")
    if len(raw) > HEADER_BYTES_MAX:
        raise InvalidToken("token_too_large", step=1, reason="header")
    members = _read_object(raw, "header")
    alg, kid, typ = members.get("alg"), members.get("kid"), members.get("typ")
    if not isinstance(alg, str):
        raise InvalidToken("alg_not_allowed", step=2, reason="missing" if alg is None else "not a string")
    if "crit" in members:
        raise InvalidToken("crit_not_supported", step=2)
    if "kid" in members and (not isinstance(kid, str) or not kid or len(kid.encode()) > KID_BYTES_MAX):
        raise InvalidToken("kid_invalid", step=2)
    return Header(alg, kid, "typ" not in members or (isinstance(typ, str) and typ.lower() in _TYPES))


class _HeaderMemo:
    """Header segment to parsed header: an issuer uses a handful of headers, each repeated in every token.

    Two generations instead of an LRU: a look-up moves nothing, and the size stays bounded.
    """

    SIZE = 256

    def __init__(self) -> None:
        self._young: dict[bytes, Header] = {}
        self._old: dict[bytes, Header] = {}

    def get(self, segment: bytes) -> Header:
        header = self._young.get(segment)
        if header is not None:
            return header
        header = self._old.get(segment) or _read_header(segment)
        if len(self._young) >= self.SIZE:
            self._old, self._young = self._young, {}
        if len(segment) <= HEADER_BYTES_MAX:
            self._young[segment] = header
        return header


_headers: Final = _HeaderMemo()


def parse(token: str) -> Parsed:
    """Step 1, and the form of step 2's header; raises :class:`InvalidToken` for anything but a strict compact JWS."""
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
    if not dot or b"." in payload or not header or not payload:
        raise InvalidToken("token_malformed", step=1)
    return Parsed(
        _headers.get(header),
        decode_segment(payload, "payload"),
        signing_input,
        decode_segment(signature, "signature"),
    )


def read_payload(payload: bytes) -> dict[str, Any]:
    """The claims as one JSON object; raises :class:`InvalidToken` (``token_json_invalid``)."""
    return _read_object(payload, "payload")
