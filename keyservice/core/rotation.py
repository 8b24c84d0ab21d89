"""The life of a signing key, decided from stored times. Pure: records and ``now`` in, changed records out.

    prepared ──► published ──► active ──► retiring ──► removed          compromised: from any state before removed
                     (in every JWKS from here ... to here)

* prepared: the wrapped private key is stored, nobody has seen the public half.
* published: in every region's JWKS; signs nothing. One such standby per region is always there.
* active: signs. Every region has one; the others verify.
* retiring: signs no more, still verifies what it signed.
* removed, compromised: in no JWKS, for good.

Rules:

1. A state only moves forward, and a key leaves the JWKS only because its record says so.
2. A standby becomes active by plan only when ``publish_lead_s`` has passed since it was published, and ``serve_lead_s``
   since every region was seen to serve it (:class:`Serving`), so that everybody who reads a JWKS has seen it. A region
   that gave no sign of life for the partition budget (and what clocks and its last reports may be apart) is excused, by
   name: by then it serves no key set at all. Where a
   region has no active key (its very first, or a revoked one), waiting would only add an outage to it: the oldest
   standby becomes active at once.
3. A retiring key is removed only when the last token that it can have signed has expired everywhere.
4. A key whose private half is missing is never activated, and never replaced by a new one: that is for an operator.
5. The decision is idempotent: applied, it decides nothing more but to create a missing standby.
6. A clock that is not to be trusted moves nothing by time: no rotation, no removal. What is revoked is replaced. A time
   that such a clock left in the future of a right one is set to now, and waited for anew.
7. What a retiring key signed last, it signed when its region heard of that: removal counts from then, too.

Times are integer Unix seconds, rounded up, so that rounding never shortens a wait.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

__all__ = [
    "FINAL_STATES",
    "PUBLISHED_STATES",
    "SIGNING_STATES",
    "Decision",
    "Gate",
    "KeyRecord",
    "Policy",
    "Serving",
    "State",
    "compromised",
    "decide",
    "gate",
    "live",
    "merge",
    "prepare",
]

State = Literal["prepared", "published", "active", "retiring", "removed", "compromised"]
STATES: Final[tuple[State, ...]] = ("prepared", "published", "active", "retiring", "removed", "compromised")
PUBLISHED_STATES: Final[frozenset[State]] = frozenset({"published", "active", "retiring"})
"""The states in which a key is in the JWKS."""

FINAL_STATES: Final[frozenset[State]] = frozenset({"removed", "compromised"})
"""The states in which the private half is deleted."""

SIGNING_STATES: Final[frozenset[State]] = frozenset({"prepared", "published", "active"})
"""The states in which the private half is needed: it signs, or will."""

_LIVE: Final = ("prepared", "published", "active", "retiring")
_PASSED: Final = ("prepared_at", "published_at", "active_at", "retiring_at")

_FUTURE_S: Final = 60.0
"""A time so far ahead, and four times the skew, was not written by a right clock of another instance."""

_LAST_SIGNS_S: Final = 5.0
"""A region may hear a beat, and so serve its key set, for so much longer than its last report reached the primary."""


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The public record of a key, as it stands in ``{trust}:keys``. Times are Unix seconds, None until they happen."""

    v: int = 1
    kid: str
    region: str
    alg: str
    jwk: dict[str, str]
    state: State
    rev: int
    prepared_at: int | None = None
    published_at: int | None = None
    active_at: int | None = None
    retiring_at: int | None = None
    removed_at: int | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Of two records of one key, the greater one is the later."""
        return STATES.index(self.state), self.rev


@dataclass(frozen=True, slots=True)
class Policy:
    """When things happen, in seconds. ``removal_delay_s`` counts from ``retiring_at``.

    ``serve_lead_s`` is how long a client may go on with a key set that it read just before a region served a newer one.
    """

    rotation_interval_s: float
    publish_lead_s: float
    removal_delay_s: float
    serve_lead_s: float = 0.0
    partition_budget_s: float = 3_600.0
    max_skew_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What regions serve, as far as they have said so: evidence for rule 2. Times are Unix seconds of the primary.

    ``since`` says, per region, since when it serves each kid in the present epoch, ``heard_at`` when it last gave a
    sign of life, and ``regions`` whose evidence is asked for.
    """

    regions: tuple[str, ...] = ()
    since: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    heard_at: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether a standby may become active by plan, and what that waits for.

    ``opens_at`` (Unix seconds) is None while a region in ``waiting_for`` has yet to serve it; those in ``excused`` have
    been silent for longer than the partition budget.
    """

    opens_at: int | None
    waiting_for: tuple[str, ...] = ()
    excused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """``changes`` are whole new records, to be written all at once; ``create`` asks for one new prepared key.

    ``gate`` is that of the standby that is due to become active, or became so by it; None where none is due.
    """

    changes: tuple[KeyRecord, ...] = ()
    create: bool = False
    gate: Gate | None = None


_NOTHING_ASKED: Final = Serving()


def prepare(kid: str, region: str, alg: str, jwk: dict[str, str], now: float) -> KeyRecord:
    """The record of a new key."""
    return KeyRecord(kid=kid, region=region, alg=alg, jwk=jwk, state="prepared", rev=0, prepared_at=math.ceil(now))


def merge(held: Mapping[str, KeyRecord], read: Iterable[KeyRecord]) -> dict[str, KeyRecord]:
    """The union of two sets: of each key the furthest state, then the higher ``rev``."""
    merged = dict(held)
    for record in read:
        known = merged.get(record.kid)
        if known is None or record.order > known.order:
            merged[record.kid] = record
    return merged


def live(records: Mapping[str, KeyRecord]) -> int:
    """How many keys of all regions are in the JWKS or on their way into it."""
    return sum(record.state in _LIVE for record in records.values())


def _moved(record: KeyRecord, state: State, now: float) -> KeyRecord:
    moved = msgspec.structs.replace(record, state=state, rev=record.rev + 1)
    stamp = f"{state}_at"
    return msgspec.structs.replace(moved, **{stamp: math.ceil(now)}) if stamp in record.__struct_fields__ else moved


def compromised(record: KeyRecord, now: float) -> KeyRecord:
    """The record of a key that was taken out of use."""
    return _moved(record, "compromised", now)


@dataclass(slots=True)
class _Keys:
    """One region's records while a decision is made."""

    now: float
    held: dict[str, KeyRecord]
    before: dict[str, KeyRecord] = field(init=False)

    def __post_init__(self) -> None:
        self.before = dict(self.held)

    def of(self, *states: State) -> list[KeyRecord]:
        """The keys in these states, the one that got there first in front."""
        found = [record for record in self.held.values() if record.state in states]
        return sorted(found, key=lambda record: (record.published_at or record.prepared_at or 0, record.kid))

    def move(self, record: KeyRecord, state: State) -> None:
        self.held[record.kid] = _moved(record, state, self.now)

    def changes(self) -> tuple[KeyRecord, ...]:
        return tuple(record for kid, record in self.held.items() if record != self.before[kid])


def decide(
    records: Mapping[str, KeyRecord],
    region: str,
    now: float,
    policy: Policy,
    *,
    usable: Collection[str],
    revoked: Collection[str] = (),
    rotate_kid: str | None = None,
    serving: Serving = _NOTHING_ASKED,
    retired: Mapping[str, float] | None = None,
    clock_sound: bool = True,
) -> Decision:
    """What the rotator of ``region`` does at ``now`` (Unix seconds).

    ``usable`` are the kids whose private half is at hand, ``revoked`` those that the trust log revokes,
    ``rotate_kid`` is the active key that somebody asked to replace before its time, ``serving`` the evidence of who
    serves what, ``retired`` says since when the region itself knows which keys to be retiring (Unix seconds; None if
    that does not matter), and ``clock_sound`` whether ``now`` agrees with the primary's clock.
    """
    keys = _Keys(now, {kid: record for kid, record in records.items() if record.region == region})
    if clock_sound:
        _set_right(keys, now + 4 * policy.max_skew_s + _FUTURE_S)
    for record in keys.of(*_LIVE):
        if record.kid in revoked:
            keys.move(record, "compromised")
    for record in keys.of("retiring"):
        if clock_sound and now >= _retired_at(record, retired) + policy.removal_delay_s:
            keys.move(record, "removed")
    for record in keys.of("prepared"):
        keys.move(record, "published")
    _keep_one_active(keys)
    _replace_missing(keys, usable)
    opened = _activate(keys, policy, usable, rotate_kid, serving) if clock_sound else None
    return Decision(keys.changes(), not keys.of("published"), opened)


def _set_right(keys: _Keys, latest: float) -> None:
    for record in keys.of(*_LIVE):
        wrong = {name: math.ceil(keys.now) for name in _PASSED if (getattr(record, name) or 0) > latest}
        if wrong:
            keys.held[record.kid] = msgspec.structs.replace(record, rev=record.rev + 1, **wrong)


def _retired_at(record: KeyRecord, retired: Mapping[str, float] | None) -> float:
    """Since when nobody signs with it."""
    known_at = 0.0 if retired is None else retired.get(record.kid, math.inf)
    return max(record.retiring_at or 0, known_at)


def _keep_one_active(keys: _Keys) -> None:
    """Two can be active only after a merge of two histories: the newest goes on."""
    active = sorted(keys.of("active"), key=lambda record: (record.active_at or 0, record.kid))
    for record in active[:-1]:
        keys.move(record, "retiring")


def _activate(
    keys: _Keys, policy: Policy, usable: Collection[str], rotate_kid: str | None, serving: Serving
) -> Gate | None:
    """Rule 2; the gate of the standby that is due, open or not."""
    active = keys.of("active")
    if not active:
        return None
    standbys = [record for record in keys.of("published") if record.kid in usable]
    current = active[0]
    due = current.kid == rotate_kid or keys.now >= (current.active_at or 0) + policy.rotation_interval_s
    if not due or not standbys:
        return None
    gates = [(record, gate(record, serving, keys.now, policy)) for record in standbys]
    for record, opened in gates:
        if opened.opens_at is not None and keys.now >= opened.opens_at:
            keys.move(record, "active")
            keys.move(current, "retiring")
            return opened
    return gates[0][1]


def _replace_missing(keys: _Keys, usable: Collection[str]) -> None:
    """Where nothing signs, the oldest standby does, at once."""
    standbys = [record for record in keys.of("published") if record.kid in usable]
    if standbys and not keys.of("active"):
        keys.move(standbys[0], "active")


def gate(record: KeyRecord, serving: Serving, now: float, policy: Policy) -> Gate:
    """When this standby may become active by plan, as far as is known at ``now`` (Unix seconds)."""
    published_at = record.published_at or 0
    silent_since = {region: serving.heard_at.get(region, published_at) for region in serving.regions}
    budget_s = policy.partition_budget_s + 2 * policy.max_skew_s + _LAST_SIGNS_S
    excused = tuple(r for r, since in silent_since.items() if now - since > budget_s)
    asked = [region for region in serving.regions if region not in excused]
    waiting_for = tuple(region for region in asked if record.kid not in serving.since.get(region, {}))
    if waiting_for:
        return Gate(None, waiting_for, excused)
    served_since = [serving.since[region][record.kid] + policy.serve_lead_s for region in asked]
    return Gate(math.ceil(max([published_at + policy.publish_lead_s, *served_since])), (), excused)
