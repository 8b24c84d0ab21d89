"""The mirror of revocations: entries in, an immutable :class:`Snapshot` out. Pure.

Revocations are a set that only grows: folding is a union, so the order and repetition of entries do not matter. An
entry leaves only when every token it could hit has expired (:meth:`Mirror.drop_expired`).

State is held by issuer and kind, so that neither can be mistaken for another, and a kind without entries costs a
look-up nothing:

* ``jti``, ``tok`` and ``sid``, which may be millions, as :class:`Named`: the newest whole, the others as fingerprints
  (:mod:`verifier.fingerprints`), of which the entry's id is not kept.
* ``kid`` and cut-offs as :class:`Marks`, exactly, in tiers, newest and smallest first, merged geometrically like the
  levels of a log-structured store: a new entry copies little, a look-up visits few tiers.

Nothing is ever changed once a snapshot shows it. A snapshot is complete before it is published by one assignment, and
its identity is the version of everything a verification read from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from .fingerprints import Table, coarse_end, fingerprint, pack
from .log import EPOCH_KIND, NEVER_EXPIRES, Entry

__all__ = ["Hit", "Mirror", "Snapshot"]

TIER_RATIO: Final = 4
"""A tier is merged into the next one when that is less than this many times its size."""

TIER_MIN: Final = 256
"""And if it is smaller than this: copying it takes a few microseconds, and each tier is another look-up."""

RECENT_MAX: Final = 2_048
"""Entries of one issuer and kind that are kept whole: copying so many for each batch takes 10-20 microseconds."""

FOLD_MIN: Final = 128
"""A batch of so many goes to the fingerprints at once."""

BUCKETS_AN_ENTRY: Final = 256
"""Unless that copies a list of buckets more than so many times as long: for ten million it takes some milliseconds."""

FOLDED_KINDS: Final = frozenset({"jti", "tok", "sid"})

SWEEP_ALL: Final = 1 << 62


class Hit(NamedTuple):
    """Why a token is refused: the kind of the entry, and its id where that is still held."""

    kind: str
    entry_id: str | None


class Mark(NamedTuple):
    """What an exactly held entry leaves in the mirror. ``before`` is None for ``kid``."""

    entry_id: str
    before: int | None
    expires_at: int


_Recent = tuple[str, int, int]
"""An entry's id, its end, and when a primary took it (milliseconds)."""


class Named:
    """Revoked tokens or sessions of one issuer and kind: ``recent`` ones whole, by value, all others in ``table``."""

    __slots__ = ("_buckets", "_mask", "_split", "_wide", "folded", "kind", "recent", "table")

    def __init__(self, kind: str, recent: dict[str, _Recent], table: Table) -> None:
        self.kind, self.recent, self.table = kind, recent, table
        self.folded = Hit(kind, None)
        buckets, self._mask, self._split, self._wide = table.shape
        self._buckets = buckets if table.size else None

    def __len__(self) -> int:
        return len(self.recent) + self.table.size

    def find(self, value: str) -> Hit | None:
        """The entry that names this value. All in one function: every request comes through here."""
        held = self.recent.get(value)
        if held is not None:
            return Hit(self.kind, held[0])
        if self._buckets is None:
            return None
        mark = fingerprint(value)
        at = mark & self._mask
        if at < self._split:
            at = mark & self._wide
        return self.folded if pack(mark) in self._buckets[at] and self.table.end_of(mark) is not None else None

    def applied(self, entries: Sequence[Entry]) -> Named:
        """With these entries; itself if it holds them all."""
        recent = self.recent
        many = max(FOLD_MIN, len(self.table.buckets) // BUCKETS_AN_ENTRY)
        if len(entries) >= many and not recent:
            return self._folded((entry.value, entry.expires_at, entry.at) for entry in entries)
        fresh: dict[str, _Recent] = {}
        for entry in entries:
            value, expires_at = entry.value, entry.expires_at
            held = fresh.get(value) or recent.get(value)
            if held is None or held[1] < expires_at:
                fresh[value] = (entry.id, expires_at, entry.at)
        outlasted = len(fresh) >= many
        for value, mark in list(fresh.items()):
            end = None if value in recent else self.table.end_of(fingerprint(value))
            if end is not None and end >= mark[1]:
                del fresh[value]
            outlasted |= end is not None
        if not fresh:
            return self
        if outlasted or len(recent) + len(fresh) > RECENT_MAX:  # no value may be among the recent and in the table
            every = {**recent, **fresh}
            return self._folded((value, expires_at, at_ms) for value, (_, expires_at, at_ms) in every.items())
        return Named(self.kind, {**recent, **fresh}, self.table)

    def _folded(self, every: Iterable[tuple[str, int, int]]) -> Named:
        """With these and nothing else beside the table; itself if there were no recent ones, and it holds them all."""
        ends: dict[int, int] = {}
        records = []
        for value, expires_at, at_ms in every:
            end = ends.get(expires_at)
            if end is None:
                end = ends[expires_at] = coarse_end(expires_at, at_ms)
            records.append((fingerprint(value), end))
        table, raised = self.table.with_records(records)
        if not self.recent and not raised and table.size == self.table.size:
            return self
        return Named(self.kind, {}, table)

    def swept(self, limit: float, most: int) -> Named:
        """Without what ended at or before ``limit``, in so many buckets; itself if nothing did."""
        recent, table = self.recent, self.table
        if any(held[1] <= limit for held in recent.values()):
            recent = {value: held for value, held in recent.items() if held[1] > limit}
        table = table.swept(limit, most)
        same = recent is self.recent and table is self.table
        return self if same else Named(self.kind, recent, table)

    def is_due(self, limit: float) -> bool:
        """Whether :meth:`swept` has left something for another time."""
        return self.table.is_due(limit)


_Tier = Mapping[str, tuple[Mark, ...]]


class Marks:
    """Entries of one issuer and kind that are held exactly, by value."""

    __slots__ = ("size", "tiers")

    def __init__(self, tiers: tuple[_Tier, ...], size: int) -> None:
        self.tiers, self.size = tiers, size

    def __len__(self) -> int:
        return self.size

    def of(self, value: str) -> Iterator[Mark]:
        """Every mark under this value."""
        for tier in self.tiers:
            yield from tier.get(value, ())

    def applied(self, entries: Iterable[Entry]) -> Marks:
        """With these entries; itself if it holds them all."""
        fresh: dict[str, tuple[Mark, ...]] = {}
        for entry in entries:
            marks = (Mark(entry.id, entry.before, entry.expires_at),)
            same = fresh.get(entry.value)
            fresh[entry.value] = marks if same is None else _union(same, marks)
        fresh = {value: marks for value, marks in fresh.items() if not self._holds(value, marks)}
        if not fresh:
            return self
        count = self.size + sum(not any(value in tier for tier in self.tiers) for value in fresh)
        tiers: list[_Tier] = [fresh, *self.tiers]
        while len(tiers) > 1 and len(tiers[1]) < max(TIER_RATIO * len(tiers[0]), TIER_MIN):
            tiers[:2] = [_merge(tiers[1], tiers[0])]
        return Marks(tuple(tiers), count)

    def _holds(self, value: str, marks: tuple[Mark, ...]) -> bool:
        held = tuple(self.of(value))
        if marks[0].before is not None:
            return all(mark in held for mark in marks)
        return bool(held) and max(map(_lasts_longest, held)) >= max(map(_lasts_longest, marks))

    def swept(self, limit: float, most: int) -> Marks:
        """Without what ended at or before ``limit``; itself if nothing did. ``most`` does not bound it."""
        every = (mark for tier in self.tiers for marks in tier.values() for mark in marks)
        if all(_lasts_longest(mark) > limit for mark in every):
            return self
        kept: dict[str, tuple[Mark, ...]] = {}
        for tier in reversed(self.tiers):
            kept = _merge(kept, tier)
        live = {
            value: alive
            for value, marks in kept.items()
            if (alive := tuple(mark for mark in marks if _lasts_longest(mark) > limit))
        }
        return Marks((live,) if live else (), len(live))

    def is_due(self, limit: float) -> bool:
        """Nothing is ever left."""
        return False


def _merge(older: _Tier, newer: _Tier) -> dict[str, tuple[Mark, ...]]:
    merged = dict(older)
    for value, marks in newer.items():
        held = merged.get(value)
        merged[value] = marks if held is None else _union(held, marks)
    return merged


def _union(held: tuple[Mark, ...], marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
    if held[0].before is not None:  # each cut-off keeps its id, because a token's ``after`` names them one by one
        return held + tuple(mark for mark in marks if mark not in held)
    return (max(*held, *marks, key=_lasts_longest),)


def _lasts_longest(mark: Mark) -> float:
    return float("inf") if mark.expires_at == NEVER_EXPIRES else mark.expires_at


class _OfIssuer(NamedTuple):
    """What is revoked of one issuer's; None where nothing is."""

    kid: Marks | None = None
    jti: Named | None = None
    tok: Named | None = None
    sid: Named | None = None
    sub: Marks | None = None
    client: Marks | None = None
    all: Marks | None = None


_NOTHING: Final[Mapping[str, _OfIssuer]] = MappingProxyType({})


class Snapshot:
    """Every revocation known at one moment; immutable, compared by identity.

    ``entries`` counts the things that are revoked: two entries on one subject are one.
    """

    __slots__ = ("entries", "issuers")

    def __init__(self, issuers: Mapping[str, _OfIssuer] = _NOTHING, entries: int = 0) -> None:
        self.issuers = issuers
        self.entries = entries

    def find(
        self,
        *,
        issuer: str,
        jti: str | None = None,
        tok: str | None = None,
        sid: str | None = None,
        sub: str | None = None,
        client_id: str | None = None,
        kid: str | None = None,
        iat: float | None = None,
        after: Collection[str] = (),
    ) -> Hit | None:
        """The first entry that hits a token with these identifiers, or None.

        ``iat`` (Unix seconds) is compared with cut-offs, and a token without one is hit by every cut-off on it;
        ``after`` holds the ids of cut-offs that the issuer knew when it issued the token, which do not hit it.
        """
        return self.find_at(issuer, kid, jti, tok, sid, sub, client_id, iat, after)

    def find_at(
        self,
        issuer: str,
        kid: str | None,
        jti: str | None,
        tok: str | None,
        sid: str | None,
        sub: str | None,
        client_id: str | None,
        iat: float | None,
        after: Collection[str],
    ) -> Hit | None:
        """:meth:`find` for the path that every request takes: arguments by position cost less."""
        of = self.issuers.get(issuer)
        if of is None:
            return None
        kids, jtis, toks, sids, subs, clients, everyone = of
        if kids is not None and kid is not None:
            for tier in kids.tiers:
                if kid in tier:
                    return Hit("kid", tier[kid][0].entry_id)
        if jtis is not None and jti is not None and (hit := jtis.find(jti)) is not None:
            return hit
        if toks is not None and tok is not None and (hit := toks.find(tok)) is not None:
            return hit
        if sids is not None and sid is not None and (hit := sids.find(sid)) is not None:
            return hit
        return None if subs is clients is everyone else _cut_off(of, sub, client_id, iat, after)

    def live_cutoffs(self, issuer: str, sub: str | None, client_id: str | None, now: float) -> tuple[str, ...]:
        """Ids of the cut-offs that would hit a token issued ``now`` (Unix seconds): what its ``after`` must name."""
        of = self.issuers.get(issuer, _OfIssuer())
        asked = ((of.all, ""), (of.sub, sub), (of.client, client_id))
        return tuple(
            mark.entry_id
            for marks, value in asked
            if marks is not None and value is not None
            for mark in marks.of(value)
            if mark.before is not None and now <= mark.before + 1 and now < mark.expires_at
        )


def _cut_off(
    of: _OfIssuer, sub: str | None, client_id: str | None, iat: float | None, after: Collection[str]
) -> Hit | None:
    _, _, _, _, subs, clients, everyone = of
    if subs is not None and sub is not None:
        for tier in subs.tiers:
            if sub in tier and (hit := _caught("sub", tier[sub], iat, after)) is not None:
                return hit
    if clients is not None and client_id is not None:
        for tier in clients.tiers:
            if client_id in tier and (hit := _caught("client", tier[client_id], iat, after)) is not None:
                return hit
    for tier in () if everyone is None else everyone.tiers:
        if (hit := _caught("all", tier.get("", ()), iat, after)) is not None:
            return hit
    return None


def _caught(kind: str, marks: tuple[Mark, ...], iat: float | None, after: Collection[str]) -> Hit | None:
    for mark in marks:
        if (iat is None or mark.before is None or iat <= mark.before) and mark.entry_id not in after:
            return Hit(kind, mark.entry_id)
    return None


class Mirror:
    """Folds entries into snapshots. One thread writes; any thread reads ``snapshot``, which is one assignment.

    ``unswept``: the last :meth:`drop_expired` was bounded and has left something for the next.
    """

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self.unswept = False

    def apply(self, entries: Iterable[Entry]) -> bool:
        """Add entries; True if that made a new snapshot. Entries already held change nothing."""
        groups: dict[tuple[str, str], list[Entry]] = {}
        issuer = kind = None
        group: list[Entry] = []
        for entry in entries:
            if entry.kind is not kind or entry.issuer is not issuer:  # in a run of them, the very same texts
                issuer, kind = entry.issuer, entry.kind
                group = groups.setdefault((issuer, kind), [])
            group.append(entry)
        issuers, count = self.snapshot.issuers, self.snapshot.entries
        changed: dict[str, _OfIssuer] = {}
        for (issuer, kind), group in groups.items():
            if kind == EPOCH_KIND:
                continue
            of = changed.get(issuer) or issuers.get(issuer) or _OfIssuer()
            held: Named | Marks | None = getattr(of, kind)
            new = (_empty(kind) if held is None else held).applied(group)
            if new is not held:
                count += len(new) - (0 if held is None else len(held))
                changed[issuer] = of._replace(**{kind: new})  # type: ignore[arg-type]  # the kind says which
        if changed:
            self.snapshot = Snapshot({**issuers, **changed}, count)
        return bool(changed)

    def drop_expired(self, now: float, server_now: float, drop_grace_s: float, most: int = SWEEP_ALL) -> bool:
        """Forget entries that both clocks (Unix seconds) put past ``expires_at + drop_grace_s``; True if any went.

        The caller does not call this while stale: a clock alone must never bring a token back. ``most`` bounds how many
        buckets of each kind are looked at (16 entries each on average), and so how long it takes.
        """
        limit = min(now, server_now) - drop_grace_s
        held = self.snapshot.issuers
        kept = {issuer: _swept(of, limit, most) for issuer, of in held.items()}
        self.unswept = any(part.is_due(limit) for of in kept.values() for part in of if part is not None)
        if all(kept[issuer] is of for issuer, of in held.items()):
            return False
        kept = {issuer: of for issuer, of in kept.items() if any(part is not None for part in of)}
        self.snapshot = Snapshot(kept, sum(len(part) for of in kept.values() for part in of if part is not None))
        return True


def _swept(of: _OfIssuer, limit: float, most: int) -> _OfIssuer:
    """What is left of it; itself if that is everything."""
    changed: dict[str, Named | Marks | None] = {}
    for kind, held in zip(of._fields, of, strict=True):
        if held is not None and (left := held.swept(limit, most)) is not held:
            changed[kind] = left if len(left) else None
    return of._replace(**changed) if changed else of  # type: ignore[arg-type]  # the types are those of the fields


def _empty(kind: str) -> Named | Marks:
    return Named(kind, {}, Table()) if kind in FOLDED_KINDS else Marks((), 0)
