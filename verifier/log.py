"""The trust log's wire format: positions, entries, epochs, beats and meta. Pure: bytes in, values out.

What lives here is what every writer and reader of ``{trust}:*`` agrees on. Rules:

* An entry's stream id is ``<epoch>-<seq>``. ``seq`` is dense from 0 within an epoch, and entry 0 is the ``epoch``
  entry, so that a hole is arithmetic. Outside the log a position carries its epoch's nonce: ``<epoch>-<seq>.<nonce>``.
* An epoch is (number, nonce). A number alone is not an identity: two servers that were promoted without seeing each
  other draw the same one.
* An id that is a UUID stands in the log as ``~`` and 22 characters of base64url: it is in every entry, and in memory.
* Times are integer Unix seconds, ``at`` and beat times milliseconds. Values are exact bytes of UTF-8.
* Unknown fields are ignored; an entry that cannot be parsed raises :class:`FormatError` and is skipped by readers.
"""

from __future__ import annotations

import hashlib
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple
from uuid import UUID

import msgspec

from .limits import ENTRY_ID_CHARS_MAX, ENTRY_REASON_BYTES_MAX, ENTRY_VALUE_BYTES_MAX

__all__ = [
    "BEAT_KEY",
    "EPOCH_KEY",
    "FORMAT",
    "KEYS_KEY",
    "KINDS",
    "KIND_FORMATS",
    "LOG_KEY",
    "META_KEY",
    "Beat",
    "Entry",
    "Epoch",
    "EpochLink",
    "FormatError",
    "Generation",
    "Hole",
    "Meta",
    "Position",
    "region_key",
    "serving_key",
]

FORMAT: Final = 1
"""The format that this code writes, and the highest that it reads completely."""

LOG_KEY: Final = "{trust}:log"
EPOCH_KEY: Final = "{trust}:epoch"
META_KEY: Final = "{trust}:meta"
BEAT_KEY: Final = "{trust}:beat"
KEYS_KEY: Final = "{trust}:keys"

EXACT_KINDS: Final = frozenset({"jti", "tok", "sid", "kid"})
"""Kinds that name one thing, revoked whenever its tokens were issued."""

CUTOFF_KINDS: Final = frozenset({"sub", "client", "all"})
"""Kinds that revoke what was issued at or before ``before``."""

EPOCH_KIND: Final = "epoch"

KIND_FORMATS: Final[Mapping[str, int]] = dict.fromkeys(sorted(EXACT_KINDS | CUTOFF_KINDS | {EPOCH_KIND}), 1)
"""Which format a reader must know to enforce each kind. A kind that is not in the first format is written only to a log
whose ``min_reader_format`` was raised to its own: a reader below that is not fresh, instead of fresh and ignorant."""

KINDS: Final = frozenset(KIND_FORMATS)

NEVER_EXPIRES: Final = 0
"""``expires_at`` of an entry that is kept for ever (``kid``)."""

_ID: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{ENTRY_ID_CHARS_MAX}}}\Z")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
PACKED: Final = "~"
"""In front of a packed id; no caller's id has it."""

_NONCE: Final = re.compile(r"[0-9a-f]{16}\Z")
_POSITION: Final = re.compile(r"(0|[1-9][0-9]{0,15})-(0|[1-9][0-9]{0,15})\.([0-9a-f]{16})\Z")
_UINT: Final = re.compile(r"(0|[1-9][0-9]{0,15})\Z")
_FIELDS: Final = ("v", "id", "kind", "issuer", "value", "before", "expires_at", "reason", "at", "region")
_CANONICAL: Final = tuple(name for name in _FIELDS if name not in ("v", "at"))


class FormatError(ValueError):
    """Something in ``{trust}:*`` is not of a form that this reader knows. ``code`` is stable."""

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        super().__init__(f"{code}: {detail}")


def region_key(region: str) -> str:
    """The key of a region's evidence record."""
    return f"{{trust}}:region:{region}"


def serving_key(region: str) -> str:
    """The key of the record of what a region serves: since when (ms), by ``kid``."""
    return f"{{trust}}:serving:{region}"


def _uint(text: str, name: str) -> int:
    if not _UINT.match(text):
        raise FormatError("not_an_integer", name)
    return int(text)


def _text(fields: Mapping[bytes, bytes], name: str, default: str | None = None) -> str:
    raw = fields.get(name.encode())
    if raw is None:
        if default is None:
            raise FormatError("field_missing", name)
        return default
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise FormatError("not_utf8", name) from None


def _pack_id(entry_id: str) -> str:
    """An id as it stands in the log: a UUID (RFC 9562, lower case) in 23 characters instead of 36."""
    if not _UUID.match(entry_id):
        return entry_id
    return PACKED + urlsafe_b64encode(bytes.fromhex(entry_id.replace("-", ""))).rstrip(b"=").decode()


def _unpack_id(text: str) -> str:
    if not text.startswith(PACKED):
        return text
    try:
        entry_id = str(UUID(bytes=urlsafe_b64decode(text.removeprefix(PACKED) + "==")))
    except ValueError:
        raise FormatError("id_invalid", "not a packed UUID") from None
    if _pack_id(entry_id) != text:
        raise FormatError("id_invalid", "not a packed UUID")
    return entry_id


class Position(NamedTuple):
    """A place in the log: ``epoch`` number, ``seq`` within it, and the epoch's ``nonce`` (16 hex digits)."""

    epoch: int
    seq: int
    nonce: str

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read ``<epoch>-<seq>.<nonce>``; raises :class:`FormatError`."""
        match = _POSITION.match(text)
        if match is None:
            raise FormatError("position_invalid", "expected <epoch>-<seq>.<nonce>")
        return cls(int(match[1]), int(match[2]), match[3])

    @property
    def stream_id(self) -> str:
        """The id inside the stream, which has no nonce."""
        return f"{self.epoch}-{self.seq}"

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}.{self.nonce}"


def parse_stream_id(raw: bytes | str) -> tuple[int, int]:
    """``b"<epoch>-<seq>"`` to numbers; raises :class:`FormatError`."""
    text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else raw
    epoch, _, seq = text.partition("-")
    return _uint(epoch, "stream id"), _uint(seq, "stream id")


class Generation(NamedTuple):
    """The version of the key set: ``n`` counts the changes within an epoch; compares by epoch, then n."""

    epoch: int
    n: int

    @classmethod
    def parse(cls, text: str) -> Generation:
        """Read ``<epoch>-<n>``; raises :class:`FormatError`."""
        return cls(*parse_stream_id(text))

    def __str__(self) -> str:
        return f"{self.epoch}-{self.n}"


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One revocation, or the ``epoch`` entry that opens an epoch's history.

    ``before`` (Unix seconds) is set for cut-offs only. ``expires_at`` (Unix seconds) is when the last token that this
    entry can hit has expired; :data:`NEVER_EXPIRES` for ``kid``. ``at`` is the time in milliseconds at which a primary
    first took it, 0 for one that none has taken yet.
    """

    id: str
    kind: str
    issuer: str
    value: str
    before: int | None
    expires_at: int
    reason: str
    at: int
    region: str

    def check(self) -> Entry:
        """Itself, if every field is in bounds; raises :class:`FormatError`."""
        if not _ID.match(self.id):
            raise FormatError("id_invalid", "an id has 1 to 64 characters of A-Z a-z 0-9 _ -")
        if self.kind not in KINDS:
            raise FormatError("kind_unknown", self.kind[:32])
        if len(self.value.encode()) > ENTRY_VALUE_BYTES_MAX or bool(self.value) == (self.kind == "all"):
            raise FormatError("value_invalid", f"a value has 1 to {ENTRY_VALUE_BYTES_MAX} bytes of UTF-8, for all none")
        if len(self.issuer.encode()) > ENTRY_VALUE_BYTES_MAX:
            raise FormatError("issuer_too_long", f"an issuer has at most {ENTRY_VALUE_BYTES_MAX} bytes")
        if len(self.reason.encode()) > ENTRY_REASON_BYTES_MAX:
            raise FormatError("reason_too_long", f"a reason has at most {ENTRY_REASON_BYTES_MAX} bytes")
        if (self.before is not None) != (self.kind in CUTOFF_KINDS):
            raise FormatError("before_invalid", "cut-offs have a time, and only they do")
        if self.expires_at == NEVER_EXPIRES and self.kind not in ("kid", EPOCH_KIND):
            raise FormatError("expires_at_invalid", "only kid entries never expire")
        if self.kind == EPOCH_KIND:
            self.epoch_start()
        return self

    def encode(self) -> dict[str, str]:
        """The stream fields, always all of them and in one order (which lets the server store them compactly)."""
        before = "" if self.before is None else str(self.before)
        values = (str(FORMAT), _pack_id(self.id), self.kind, self.issuer, self.value, before)
        return dict(zip(_FIELDS, (*values, str(self.expires_at), self.reason, str(self.at), self.region), strict=True))

    @classmethod
    def decode(cls, fields: Mapping[bytes, bytes]) -> Entry:
        """Read stream fields; raises :class:`FormatError`."""
        if _uint(_text(fields, "v"), "v") > FORMAT and _text(fields, "kind") not in KINDS:
            raise FormatError("format_newer", "written by a newer release")
        before = _text(fields, "before", "")
        return cls(
            id=_unpack_id(_text(fields, "id")),
            kind=_text(fields, "kind"),
            issuer=_text(fields, "issuer"),
            value=_text(fields, "value"),
            before=_uint(before, "before") if before else None,
            expires_at=_uint(_text(fields, "expires_at"), "expires_at"),
            reason=_text(fields, "reason", ""),
            at=_uint(_text(fields, "at"), "at"),
            region=_text(fields, "region", ""),
        ).check()

    def digest(self) -> bytes:
        """SHA-256 over the canonical fields: two entries are the same one if and only if their digests are equal.

        ``v`` and ``at`` are not part of it: they say how and when a log took the entry, not what it says.
        """
        fields = {**self.encode(), "id": self.id}
        return hashlib.sha256(msgspec.json.encode([fields[name] for name in _CANONICAL])).digest()

    def caller_fields(self) -> tuple[str, str, str, int | None, str]:
        """What a caller chose: two entries under one id conflict when these differ."""
        return (self.kind, self.issuer, self.value, self.before, self.reason)

    def epoch_start(self) -> tuple[str, Position | None]:
        """For an ``epoch`` entry: its nonce, and the last position of the epoch before (None for the first)."""
        nonce, _, previous = self.value.partition(" ")
        if self.kind != EPOCH_KIND or not _NONCE.match(nonce):
            raise FormatError("epoch_entry_invalid", "expected '<nonce> <previous position or ->'")
        return nonce, None if previous == "-" else Position.parse(previous)


class EpochLink(msgspec.Struct, frozen=True, omit_defaults=True):
    """One epoch in the chain: who it is, where the one before ended, who votes in it, and whether it ever opened.

    ``voters`` maps a region to its keeper's id, empty for a vacant seat; ``chosen`` is the epoch (number, nonce) for
    which they were chosen, None for this one: a failover takes them over. ``forgotten`` are keeper ids that an operator
    has given up for good: no majority waits for them any more.
    """

    number: int
    nonce: str
    previous: str | None
    voters: dict[str, str]
    opened: bool
    forgotten: tuple[str, ...] = ()
    chosen: tuple[int, str] | None = None


def _links(text: str) -> tuple[EpochLink, ...]:
    try:
        return msgspec.json.decode(text, type=tuple[EpochLink, ...])
    except msgspec.DecodeError:
        raise FormatError("chain_invalid", "not a list of epochs") from None


Hole = tuple[Position | None, Position]
"""The entries on both sides of a gap in the log, None for the beginning of the log."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """The hash ``{trust}:epoch``. ``replid`` is the replication id of the server that it was opened on.

    ``chain`` is this history, ``known`` are epochs that keepers know of and this history lacks.

    ``holes`` are gaps that were in the log before this epoch was opened, by the word of whoever opened it or one before
    it: the regions have answered them by merging into the epoch.
    """

    number: int
    nonce: str
    replid: str
    open: bool
    generation: Generation
    chain: tuple[EpochLink, ...]
    known: tuple[EpochLink, ...] = ()
    holes: frozenset[Hole] = frozenset()

    @classmethod
    def decode(cls, fields: Mapping[bytes, bytes]) -> Epoch:
        """Read the hash; raises :class:`FormatError`, also for an empty one."""
        number, nonce = _uint(_text(fields, "number"), "number"), _text(fields, "nonce")
        if not _NONCE.match(nonce):
            raise FormatError("nonce_invalid", "expected 16 hex digits")
        return cls(
            number=number,
            nonce=nonce,
            replid=_text(fields, "replid", ""),
            open=_text(fields, "open", "0") == "1",
            generation=Generation(number, _uint(_text(fields, "keys_n", "0"), "keys_n")),
            chain=_links(_text(fields, "chain")),
            known=_links(_text(fields, "known", "[]")),
            holes=_holes(_text(fields, "holes", "[]")),
        )

    def nonce_of(self, number: int) -> str | None:
        """The nonce of that epoch number in this history, or None if it is not part of it."""
        return next((link.nonce for link in self.chain if link.number == number), None)


def _holes(text: str) -> frozenset[Hole]:
    """``[["1-1.<nonce>" or null, "1-3.<nonce>"], …]``; raises :class:`FormatError`."""
    try:
        pairs = msgspec.json.decode(text, type=list[tuple[str | None, str]])
    except msgspec.DecodeError:
        raise FormatError("holes_invalid", "not a list of pairs of positions") from None
    return frozenset((None if left is None else Position.parse(left), Position.parse(right)) for left, right in pairs)


@dataclass(frozen=True, slots=True)
class Beat:
    """The hash ``{trust}:beat``: proof of how far the primary's log went at ``at_ms`` (the primary's clock).

    ``confirmed_*`` describe the newest beat that a majority of regions confirmed, None while there is none.
    """

    nonce: str
    n: int
    at_ms: int
    position: Position
    generation: Generation
    confirmed_n: int | None = None
    confirmed_at_ms: int | None = None
    confirmed_position: Position | None = None

    @classmethod
    def decode(cls, fields: Mapping[bytes, bytes]) -> Beat:
        """Read the hash; raises :class:`FormatError`, also for an empty one."""
        nonce = _text(fields, "nonce")
        confirmed = _text(fields, "confirmed_n", "")
        return cls(
            nonce=nonce,
            n=_uint(_text(fields, "n"), "n"),
            at_ms=_uint(_text(fields, "at"), "at"),
            position=Position.parse(f"{_text(fields, 'position')}.{nonce}"),
            generation=Generation.parse(_text(fields, "generation")),
            confirmed_n=_uint(confirmed, "confirmed_n") if confirmed else None,
            confirmed_at_ms=_uint(_text(fields, "confirmed_at"), "confirmed_at") if confirmed else None,
            confirmed_position=Position.parse(f"{_text(fields, 'confirmed_position')}.{nonce}") if confirmed else None,
        )


@dataclass(frozen=True, slots=True)
class Meta:
    """The hash ``{trust}:meta``. Entries up to ``trimmed_to`` (a stream id, or None) were trimmed on purpose."""

    incarnation: str
    trimmed_to: tuple[int, int] | None
    writer_format: int
    min_reader_format: int
    max_token_lifetime_s: int

    @classmethod
    def decode(cls, fields: Mapping[bytes, bytes]) -> Meta:
        """Read the hash; raises :class:`FormatError`, also for an empty one."""
        trimmed_to = _text(fields, "trimmed_to", "")
        return cls(
            incarnation=_text(fields, "incarnation"),
            trimmed_to=parse_stream_id(trimmed_to) if trimmed_to else None,
            writer_format=_uint(_text(fields, "writer_format"), "writer_format"),
            min_reader_format=_uint(_text(fields, "min_reader_format"), "min_reader_format"),
            max_token_lifetime_s=_uint(_text(fields, "max_token_lifetime_s"), "max_token_lifetime_s"),
        )
