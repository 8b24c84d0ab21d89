"""From what an older system says about revoked tokens to requests of ``POST /admin/revocations``. Pure.

A message, or what a key says, is one of:

    eyJ….eyJ….c2ln             a compact JWS: its ``jti``, or else the SHA-256 of its ``header.payload``, is revoked
    {"token": …}               the same
    {"jti": …, "issuer": …}    one member names what is revoked: ``jti``, ``tok``, ``sid``, ``sub``, ``client``
    {"kind": …, "value": …}    the same in the words of the admin API
    f81d4fae-7dec…             anything else without blanks: an id of the kind that was set (``jti``)

* Of several members the narrowest counts: a dump of claims revokes that token, never the whole subject.
* ``kid`` and ``all`` are not bridged: whoever may publish on an old channel must not be able to end everything.
* An ``id`` is the digest of what is revoked, so that a repeated message, a scan that overlaps with messages and a retry
  are all the same request. A cut-off (``sub``, ``client``) is another one each time it is said, because a second
  log-out everywhere has to hit what was issued since the first; its id also holds the millisecond. A key does not say
  when it was set, so a cut-off in a key needs a ``before`` of its own.
* ``exp`` is not needed and not believed: the key service keeps an entry for as long as any token can live.
* Everything else is garbage: it has a stable code, and its content is never shown.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import msgspec

from verifier.errors import InvalidToken
from verifier.limits import ENTRY_REASON_BYTES_MAX, ENTRY_VALUE_BYTES_MAX, TOKEN_CHARS_MAX
from verifier.log import CUTOFF_KINDS
from verifier.token import parse, read_header, read_payload

from .revocation import identifier_of

__all__ = [
    "BRIDGED_KINDS",
    "Garbage",
    "Item",
    "KeyPattern",
    "Known",
    "Pending",
    "Rules",
    "Step",
    "Verdict",
    "after_answer",
    "body_of",
    "judge",
    "read",
]

BRIDGED_KINDS: Final = ("jti", "tok", "sid", "client", "sub")
"""From what hits one token to what hits most."""

MESSAGE_BYTES_MAX: Final = 2 * TOKEN_CHARS_MAX
"""A token and a few members beside it."""

_MEMBERS: Final = (("jti", "jti"), ("tok", "tok"), ("sid", "sid"), ("client", "client"), ("client_id", "client"))
"""Members that name what is revoked, in their order of precedence; ``sub`` comes last."""

PERMANENT: Final = frozenset(
    {
        "before_invalid",
        "expires_at_invalid",
        "id_invalid",
        "issuer_too_long",
        "kind_unknown",
        "reason_too_long",
        "request_ambiguous",
        "token_malformed",
        "value_invalid",
    }
)
"""Codes of one revocation that stay what they are however often it is sent; every other one is tried again."""


class Garbage(ValueError):
    """Nothing that can be revoked. ``code`` is stable; there is no message, because it could hold a token."""

    def __init__(self, code: str) -> None:
        self.code = code
        super().__init__(code)


@dataclass(frozen=True, slots=True)
class Rules:
    """``kind`` is that of an id that stands alone; ``issuers`` are assumed where none is said (None: the service's)."""

    kind: str = "jti"
    issuers: tuple[str | None, ...] = (None,)


@dataclass(frozen=True, slots=True)
class Item:
    """One revocation to ask for; ``body`` is its JSON, which may hold a token."""

    id: str
    body: bytes = field(repr=False)


# -- reading ----------------------------------------------------------------------------------------------------------


def read(raw: bytes, rules: Rules, now: float, *, key: bool = False) -> list[Item]:
    """What a message of ``now`` (Unix seconds) revokes, one item for each issuer; raises :class:`Garbage`.

    ``key``: it comes from a key, which may have been set at any time.
    """
    if len(raw) > MESSAGE_BYTES_MAX:
        raise Garbage("message_too_long")
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError:
        raise Garbage("message_not_utf8") from None
    if not text.startswith(("{", "[", '"')):
        return _plain(text, rules, now, key)
    try:
        said = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):  # brackets in brackets
        raise Garbage("json_invalid") from None
    if isinstance(said, str):
        return _plain(said.strip(), rules, now, key)
    if not isinstance(said, dict):
        raise Garbage("json_form_unknown")
    return _object(said, rules, now, key)


def _plain(text: str, rules: Rules, now: float, key: bool) -> list[Item]:
    if text.count(".") == 2:
        try:
            return [_token(text, "")]
        except Garbage:
            if text.startswith("ey"):  # the first bytes of every JOSE header; an id with two dots goes on as an id
                raise
    return _identified(rules.kind, text, rules.issuers, None, "", now if not key else None)


def _object(said: Mapping[str, Any], rules: Rules, now: float, key: bool) -> list[Item]:
    reason = _reason(said.get("reason"))
    for member in ("token", "access_token"):
        if isinstance(said.get(member), str):
            return [_token(said[member].strip(), reason)]
    kind, value = _named(said)
    issuer = said.get("issuer", said.get("iss"))
    issuers = (issuer,) if isinstance(issuer, str) else rules.issuers
    before = _before(said.get("before"), now) if kind in CUTOFF_KINDS else None
    return _identified(kind, value, issuers, before, reason, now if not key else None)


def _named(said: Mapping[str, Any]) -> tuple[str, str]:
    if "kind" in said:
        return str(said["kind"]), _text(said.get("value"))
    for member, kind in (*_MEMBERS, ("sub", "sub")):
        if said.get(member) is not None:
            return kind, _text(said[member])
    raise Garbage("identifier_missing")


def _text(value: Any) -> str:
    """Identifiers are strings in a token; older systems publish their numbers as numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Garbage("identifier_invalid")
    return value


def _reason(said: Any) -> str:
    """A reason that does not fit is left out: it must not cost the revocation."""
    return said if isinstance(said, str) and len(_bytes(said)) <= ENTRY_REASON_BYTES_MAX else ""


def _before(said: Any, now: float) -> int | None:
    """A time that cannot be one in Unix seconds is left out: the key service then cuts off later, and so more."""
    return said if isinstance(said, int) and not isinstance(said, bool) and 0 <= said <= now else None


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _identified(
    kind: str, value: str, issuers: tuple[str | None, ...], before: int | None, reason: str, now: float | None
) -> list[Item]:
    """``now`` is when it was said, None if that is not known."""
    if kind not in BRIDGED_KINDS:
        raise Garbage("kind_not_bridged")
    if not value:
        raise Garbage("identifier_missing")
    sizes = [len(_bytes(text)) for text in (value, *filter(None, issuers))]
    if max(sizes) > ENTRY_VALUE_BYTES_MAX or any(not char.isprintable() or char.isspace() for char in value):
        raise Garbage("identifier_invalid")
    if kind == "tok" and (len(value) != 64 or set(value) - set("0123456789abcdef")):
        raise Garbage("identifier_invalid")
    moment: int | None = None
    if kind in CUTOFF_KINDS:
        if before is None and now is None:
            raise Garbage("cutoff_in_a_key")
        moment = before if before is not None else int((now or 0) * 1000)
    request = {"kind": kind, "value": value, "issuer": None, "before": before, "reason": reason}
    return [_item((kind, issuer, value, moment), {**request, "issuer": issuer}) for issuer in issuers]


def _token(text: str, reason: str) -> Item:
    """A token travels whole, so that its ``exp`` counts; its id is that of what the key service will find in it."""
    try:
        parsed = parse(text)
        read_header(parsed.header)
        members = read_payload(parsed.payload)
    except InvalidToken:
        raise Garbage("token_malformed") from None
    issuer = members.get("iss", "")
    if not isinstance(issuer, str) or len(_bytes(issuer)) > ENTRY_VALUE_BYTES_MAX:
        raise Garbage("token_malformed")
    kind, value = identifier_of(members.get("jti"), parsed.signing_input)
    return _item((kind, issuer, value, None), {"token": text, "reason": reason})


def _item(digested: tuple[str, str | None, str, int | None], request: Mapping[str, Any]) -> Item:
    digest = hashlib.sha256(msgspec.json.encode(digested)).digest()
    entry_id = "br-" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    said = {name: value for name, value in request.items() if value not in (None, "") or name == "issuer"}
    if said.get("issuer", "") is None:
        del said["issuer"]
    return Item(entry_id, msgspec.json.encode({"id": entry_id, **said}))


@dataclass(frozen=True, slots=True)
class KeyPattern:
    """``PREFIX*SUFFIX``: what stands where the star is names the revoked thing."""

    prefix: bytes
    suffix: bytes

    @classmethod
    def parse(cls, text: str) -> KeyPattern:
        """Raises :class:`ValueError` unless there is one star, something beside it, and no other wildcard."""
        prefix, star, suffix = text.partition("*")
        if not star or not prefix + suffix or set(prefix + suffix) & set("*?[]\\"):
            raise ValueError("a pattern is PREFIX*SUFFIX with one star and no other wildcard")
        return cls(prefix.encode(), suffix.encode())

    @property
    def glob(self) -> bytes:
        return self.prefix + b"*" + self.suffix

    def inner(self, key: bytes) -> bytes:
        """What the star stands for in a key that matches."""
        return key[len(self.prefix) : len(key) - len(self.suffix)]


# -- what waits to be sent --------------------------------------------------------------------------------------------


class Pending:
    """Items that wait, each id once, bounded in number and bytes; the oldest goes first."""

    def __init__(self, items_max: int, bytes_max: int) -> None:
        self._items: dict[str, Item] = {}
        self._bytes = 0
        self._items_max, self._bytes_max = items_max, bytes_max

    def __len__(self) -> int:
        return len(self._items)

    def half_full(self) -> bool:
        """A scan, which can wait, leaves this much to messages, which cannot."""
        return 2 * len(self._items) >= self._items_max or 2 * self._bytes >= self._bytes_max

    def offer(self, item: Item) -> bool:
        """Take an item; False if there is no room for it."""
        if item.id in self._items:
            return True
        if len(self._items) >= self._items_max or self._bytes + len(item.body) > self._bytes_max:
            return False
        self._put(item)
        return True

    def put_back(self, items: Iterable[Item]) -> None:
        """Items that were taken and are still to be sent, however full it is by now: they were accepted once."""
        for item in items:
            if item.id not in self._items:
                self._put(item)

    def _put(self, item: Item) -> None:
        self._items[item.id] = item
        self._bytes += len(item.body)

    def take(self, items_max: int, bytes_max: int) -> list[Item]:
        """The oldest items that fit into one request."""
        taken: list[Item] = []
        size = 0
        for item in self._items.values():
            size += len(item.body) + 1
            if len(taken) == items_max or (taken and size > bytes_max):
                break
            taken.append(item)
        for item in taken:
            del self._items[item.id]
            self._bytes -= len(item.body)
        return taken


class Known:
    """Ids of which a majority of regions holds the entry, so that they need not be sent at every scan; the newest."""

    def __init__(self, ids_max: int) -> None:
        self._ids: dict[str, None] = {}
        self._ids_max = ids_max

    def __contains__(self, entry_id: str) -> bool:
        return entry_id in self._ids

    def add(self, ids: Iterable[str]) -> None:
        self._ids.update(dict.fromkeys(ids))
        while len(self._ids) > self._ids_max:
            del self._ids[next(iter(self._ids))]


# -- what the key service answered ------------------------------------------------------------------------------------


class Step(Enum):
    """What is done after an answer of the admin API."""

    RESULTS = "results"
    """It says for each item what became of it."""
    RETRY = "retry"
    """Later, with the same ids."""
    RENEW = "renew"
    """With a new token."""
    SPLIT = "split"
    """In smaller requests."""
    GIVE_UP = "give_up"
    """Trying again cannot help."""


def after_answer(status: int, code: str) -> Step:
    """The step after an HTTP status and the problem's code."""
    if status in (200, 202) or (status == 422 and code == "revocations_refused"):
        return Step.RESULTS
    if status == 401:
        return Step.RENEW
    if status == 413:
        return Step.SPLIT
    if status in (408, 425, 429) or status >= 500:
        return Step.RETRY
    return Step.GIVE_UP


@dataclass(slots=True)
class Verdict:
    """What became of the items of a request. ``refused`` counts codes; ``again`` is to be sent once more."""

    stored: int = 0
    replicated: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    again: list[Item] = field(default_factory=list)
    again_codes: Counter[str] = field(default_factory=Counter)


def judge(items: Sequence[Item], results: Any) -> Verdict:
    """Sort items by their results. A result that is missing or unreadable means that the item is sent once more.

    ``id_conflict`` counts as stored: an id is the digest of what is revoked, so that only the reason can differ.
    """
    verdict = Verdict()
    by_index = {
        result["index"]: result
        for result in (results if isinstance(results, list) else ())
        if isinstance(result, dict) and isinstance(result.get("index"), int)
    }
    for index, item in enumerate(items):
        result = by_index.get(index)
        code = "result_missing" if result is None else result.get("code")
        if code in PERMANENT:
            verdict.refused[code] += 1
        elif code is None or code == "id_conflict":
            verdict.stored += 1
            if result is not None and result.get("durability") == "replicated":
                verdict.replicated.append(item.id)
        else:
            verdict.again.append(item)
            verdict.again_codes[str(code)] += 1
    return verdict


def body_of(items: Iterable[Item]) -> bytes:
    """The body of a bulk request."""
    return b'{"revocations":[' + b",".join(item.body for item in items) + b"]}"
