"""Reading stream entries quickly: a mirror's first read decodes a million. Pure.

:meth:`~verifier.log.Entry.decode` is the rule. :func:`read_entry` gives the same for every input, but takes the short
way for what nearly all entries are: a token or a session, written by the current release. It checks the same things,
each distinct issuer, region, reason and time once; whatever is out of the ordinary, or wrong, goes the long way.
"""

from __future__ import annotations

import re
from binascii import a2b_base64
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Final

from .limits import ENTRY_ID_CHARS_MAX, ENTRY_REASON_BYTES_MAX, ENTRY_VALUE_BYTES_MAX
from .log import Entry

__all__ = ["Fields", "read_entry", "read_usual"]

Fields = Mapping[bytes, bytes] | Sequence[bytes]
"""An entry's fields by name, or names and values in turn, as a server lists them."""

MEMO_MAX: Final = 4_096
"""Distinct texts and times that are remembered; a log has a handful of issuers and regions, and a time a second."""

_NAMES: Final = [b"v", b"id", b"kind", b"issuer", b"value", b"before", b"expires_at", b"reason", b"at", b"region"]
_values_of: Final = itemgetter(*_NAMES)
_KINDS: Final = {b"jti": "jti", b"tok": "tok", b"sid": "sid"}
_ID: Final = re.compile(rb"[A-Za-z0-9_-]{1,%d}\Z" % ENTRY_ID_CHARS_MAX)
_UINT: Final = re.compile(rb"(0|[1-9][0-9]{0,15})\Z")
_STANDARD: Final = bytes.maketrans(b"-_+/", b"+/!!")
_LAST_OF_UUID: Final = frozenset(b"AQgw")
"""128 bits are 21 characters of base64url and one whose last four bits are unused, so 0 (RFC 4648 section 3.5)."""


class _Texts(dict[bytes, str]):
    """Texts that occur again and again, by their bytes; raises :class:`ValueError` for what may be out of bounds."""

    def __missing__(self, raw: bytes) -> str:
        if len(raw) > min(ENTRY_VALUE_BYTES_MAX, ENTRY_REASON_BYTES_MAX):
            raise ValueError
        if len(self) >= MEMO_MAX:
            self.clear()
        text = self[raw] = raw.decode()
        return text


class _Times(dict[bytes, int]):
    """Numbers in their one form; raises :class:`ValueError` for any other."""

    def __missing__(self, raw: bytes) -> int:
        if not _UINT.match(raw):
            raise ValueError
        if len(self) >= MEMO_MAX:
            self.clear()
        number = self[raw] = int(raw)
        return number


_texts: Final = _Texts()
_times: Final = _Times()


def read_entry(fields: Fields) -> Entry:
    """Read stream fields; raises :class:`~verifier.log.FormatError`."""
    usual = read_usual(fields)
    if usual is not None:
        return usual
    return Entry.decode(fields if isinstance(fields, Mapping) else dict(zip(fields[::2], fields[1::2], strict=False)))


def read_usual(fields: Fields) -> Entry | None:
    """The entry of a token or a session, None for everything else and for anything wrong."""
    try:
        if not isinstance(fields, list):
            values = _values_of(fields)
        elif fields[::2] == _NAMES:
            values = fields[1::2]
        else:
            return None
        version, packed, raw_kind, issuer, value, before, expires_at, reason, at, region = values
        kind, ends = _KINDS[raw_kind], _times[expires_at]
        if version != b"1" or before or not ends or not 0 < len(value) <= ENTRY_VALUE_BYTES_MAX:
            return None
        entry_id = _id(packed)
        return Entry(
            entry_id, kind, _texts[issuer], value.decode(), None, ends, _texts[reason], _times[at], _texts[region]
        )
    except (ValueError, KeyError, TypeError):
        return None


def _id(packed: bytes) -> str:
    """An id, packed or not; raises :class:`ValueError`."""
    if packed[:1] != b"~":
        if not _ID.match(packed):
            raise ValueError
        return packed.decode()
    if len(packed) != 23 or packed[22] not in _LAST_OF_UUID:
        raise ValueError
    digits = a2b_base64(packed[1:].translate(_STANDARD) + b"==", strict_mode=True).hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
