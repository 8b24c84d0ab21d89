"""What a revocation request means: from a caller's words to an entry of the trust log. Pure.

* Nothing that verifies may be refused revocation. ``expires_at`` follows the token's ``exp``; where that is not known,
  ``max(now, before) + max_token_lifetime_s``. What can hit a session (``sid`` and the cut-offs) lives at least as long
  as a session and its last token can. A revoked ``kid`` never expires.
* Of a token only its identifiers are kept: its ``jti``, or the SHA-256 of ``header.payload``. Its signature is not
  checked: whoever may revoke may revoke anything.
* Cut-offs (``sub``, ``client``, ``all``) hit what was issued at or before ``before``, which reaches ``max_skew_s`` into
  the future, so that a token minted by a fast clock is caught.
* The same id with the same fields is a retry and gets the stored entry; with other fields it is a conflict. Only what
  the caller chose is compared: a ``before`` that was filled in here is not.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from keyservice.errors import RequestRefused
from verifier.errors import InvalidToken
from verifier.limits import ENTRY_VALUE_BYTES_MAX
from verifier.log import CUTOFF_KINDS, EPOCH_KIND, KINDS, NEVER_EXPIRES, Entry, FormatError, Position
from verifier.token import parse, read_header, read_payload

__all__ = ["Draft", "EntryIndex", "RevocationPolicy", "Stored", "draft", "entry_for", "identifier_of", "sid_draft"]

SESSION_KINDS: Final = CUTOFF_KINDS | {"sid"}
"""Kinds that a session is checked against, as long as it lives."""

_TIME_MAX: Final = 10**13
"""Unix seconds; anything later is a mistake, and is kept that long at most."""


class RevocationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One item of ``POST /admin/revocations``: either ``token``, or ``kind`` and ``value``."""

    token: str | None = None
    kind: str | None = None
    value: str | None = None
    issuer: str | None = None
    before: int | None = None
    reason: str = ""
    id: str | None = None


@dataclass(frozen=True, slots=True)
class RevocationPolicy:
    """Times in seconds; ``issuer`` is assumed where the caller names none.

    ``session_life_s`` is the longest that a session and its last token can live.
    """

    issuer: str
    region: str
    max_token_lifetime_s: float
    session_life_s: float
    max_skew_s: float


@dataclass(frozen=True, slots=True)
class Draft:
    """What a caller asked for. ``until`` (Unix seconds) is when the last token concerned expires, if that is known."""

    id: str
    kind: str
    issuer: str
    value: str
    before: int | None
    reason: str
    until: float | None = None

    def same_request(self, entry: Entry) -> bool:
        """Whether a stored entry is what this caller asks for again."""
        mine = (self.kind, self.issuer, self.value, self.reason)
        theirs = (entry.kind, entry.issuer, entry.value, entry.reason)
        return mine == theirs and self.before in (None, entry.before)


def draft(request: RevocationRequest, entry_id: str, now: float, policy: RevocationPolicy) -> Draft:
    """Check a request; raises :class:`RequestRefused`. ``entry_id`` is used where the request has no id."""
    chosen = request.id or entry_id
    if request.token is not None:
        if (request.kind, request.value, request.issuer, request.before) != (None, None, None, None):
            raise RequestRefused("request_ambiguous", "give either token, or kind and value")
        return _token_draft(request.token, chosen, request.reason)
    if request.kind not in KINDS or request.kind == EPOCH_KIND:
        raise RequestRefused("kind_unknown", f"kind is one of {', '.join(sorted(KINDS - {EPOCH_KIND}))}")
    if request.before is not None and request.kind not in CUTOFF_KINDS:
        raise RequestRefused("before_invalid", f"before belongs to {', '.join(sorted(CUTOFF_KINDS))} only")
    if request.before is not None and not 0 <= request.before <= _cut_at(now, policy):
        raise RequestRefused("before_invalid", "before is a time in Unix seconds that is not in the future")
    issuer = _bounded_issuer(policy.issuer if request.issuer is None else request.issuer)
    value = _value(request.kind, request.value)
    return Draft(chosen, request.kind, issuer, value, request.before, request.reason)


def _cut_at(now: float, policy: RevocationPolicy) -> int:
    """The ``before`` of a cut-off made ``now``, and the latest that a caller may choose."""
    return math.ceil(now + policy.max_skew_s)


def _bounded_issuer(issuer: str) -> str:
    if len(issuer.encode()) > ENTRY_VALUE_BYTES_MAX:
        raise RequestRefused("issuer_too_long", f"an issuer has at most {ENTRY_VALUE_BYTES_MAX} bytes of UTF-8")
    return issuer


def _value(kind: str, value: str | None) -> str:
    if kind == "all":
        if value:
            raise RequestRefused("value_invalid", "kind all takes no value")
        return ""
    if not value:
        raise RequestRefused("value_invalid", f"kind {kind} needs a value")
    if kind == "tok" and (len(value) != 64 or set(value) - set("0123456789abcdef")):
        raise RequestRefused("value_invalid", "kind tok takes the SHA-256 of header.payload as 64 hex digits")
    return value


def _token_draft(token: str, entry_id: str, reason: str) -> Draft:
    """The identifiers of a token; raises :class:`RequestRefused` for what no verifier would accept either."""
    try:
        parsed = parse(token.strip())
        read_header(parsed.header)
        members = read_payload(parsed.payload)
    except InvalidToken as error:
        raise RequestRefused("token_malformed", f"not a token: {error.code}") from None
    issuer = members.get("iss", "")
    if not isinstance(issuer, str):
        raise RequestRefused("token_malformed", "not a token: claim iss is not a string")
    kind, value = identifier_of(members.get("jti"), parsed.signing_input)
    return Draft(entry_id, kind, _bounded_issuer(issuer), value, None, reason, _until(members.get("exp")))


def identifier_of(jti: Any, signing_input: bytes) -> tuple[str, str]:
    """Kind and value by which one token is revoked: its ``jti``, or the SHA-256 of ``header.payload``."""
    if isinstance(jti, str) and 0 < len(jti.encode()) <= ENTRY_VALUE_BYTES_MAX:
        return "jti", jti
    return "tok", hashlib.sha256(signing_input).hexdigest()


def _until(exp: Any) -> float | None:
    if isinstance(exp, bool) or not isinstance(exp, int | float) or not 0 <= exp < _TIME_MAX:
        return None
    return float(exp)


def sid_draft(sid: str, entry_id: str, until: float, policy: RevocationPolicy, reason: str = "") -> Draft:
    """The end of a session whose last token expires at ``until`` (Unix seconds)."""
    return Draft(entry_id, "sid", policy.issuer, sid, None, reason, until)


def entry_for(wanted: Draft, now: float, policy: RevocationPolicy) -> Entry:
    """The entry to append at ``now`` (Unix seconds), its ``at`` still open; raises :class:`RequestRefused`."""
    before = wanted.before
    if before is None and wanted.kind in CUTOFF_KINDS:
        before = _cut_at(now, policy)
    if wanted.kind == "kid":
        expires_at = NEVER_EXPIRES
    elif wanted.until is not None:
        expires_at = max(1, math.ceil(wanted.until))
    else:
        expires_at = math.ceil(max(now, before or 0) + _life_s(wanted.kind, policy))
    entry = Entry(
        wanted.id, wanted.kind, wanted.issuer, wanted.value, before, expires_at, wanted.reason, 0, policy.region
    )
    try:
        return entry.check()
    except FormatError as error:
        raise RequestRefused(error.code, str(error).partition(": ")[2]) from None


def _life_s(kind: str, policy: RevocationPolicy) -> float:
    """How long what an entry of this kind hits can live."""
    if kind in SESSION_KINDS:
        return max(policy.max_token_lifetime_s, policy.session_life_s)
    return policy.max_token_lifetime_s


class Stored(NamedTuple):
    """An entry and where it stands in the log; None while it stands in no log that was seen."""

    entry: Entry
    position: Position | None


class _Held(NamedTuple):
    entry: Entry
    position: Position
    reading: int


class EntryIndex:
    """Every entry of the log by id, in memory; the first one under an id stays. Safe to use from several threads.

    The log is read in passes, each from its first entry: only in the present one is a place known to be the entry's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_id: dict[str, _Held] = {}
        self._reading = 0

    def begin(self) -> None:
        """The log will be read from its first entry: places are to be found anew."""
        self._reading += 1

    def add(self, entries: Iterable[tuple[Position, Entry]]) -> None:
        """Take over entries as they are read; those already held get their place in this reading, the first one."""
        with self._lock:
            for position, entry in entries:
                if entry.kind == EPOCH_KIND:
                    continue
                held = self._by_id.get(entry.id)
                if held is None or (held.reading != self._reading and _same(held.entry, entry)):
                    self._by_id[entry.id] = _Held(entry, position, self._reading)

    def get(self, entry_id: str) -> Stored | None:
        """The entry under this id, or None."""
        held = self._by_id.get(entry_id)
        return None if held is None else Stored(held.entry, held.position)

    def place_of(self, entry: Entry) -> Position | None:
        """Where the entry stands in the log as it is read now, or None if it was not seen in it."""
        held = self._by_id.get(entry.id)
        seen = held is not None and held.reading == self._reading and _same(held.entry, entry)
        return held.position if held is not None and seen else None

    def __len__(self) -> int:
        return len(self._by_id)

    def newest(self, where: Callable[[Entry], bool]) -> Iterator[Stored]:
        """Entries that satisfy ``where``, the last appended first."""
        with self._lock:
            every = list(self._by_id.values())
        every.sort(key=lambda held: held.position[:2], reverse=True)
        return (Stored(held.entry, held.position) for held in every if where(held.entry))

    def drop_expired(self, limit: float) -> None:
        """Forget entries whose ``expires_at`` lies before ``limit`` (Unix seconds)."""
        with self._lock:
            self._by_id = {
                entry_id: held
                for entry_id, held in self._by_id.items()
                if held.entry.expires_at == NEVER_EXPIRES or held.entry.expires_at > limit
            }


def _same(a: Entry, b: Entry) -> bool:
    """Whether two entries are the same one, whenever a log took them."""
    return a == b or msgspec.structs.replace(a, at=b.at) == b
