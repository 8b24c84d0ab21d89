"""The mirror of revocations: entries in, an immutable :class:`Snapshot` out. Pure.

Revocations are a set that only grows: folding is a union, so the order and repetition of entries do not matter. An
entry leaves only when every token it could hit has expired (:meth:`Mirror.drop_expired`).

State is held in tiers, newest and smallest first, merged geometrically like the levels of a log-structured store: a
new entry copies little, a look-up visits few tiers, and no tier is ever changed once a snapshot shows it. A snapshot is
complete before it is published, and its identity is the version of everything a verification read from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

from .log import CUTOFF_KINDS, EPOCH_KIND, NEVER_EXPIRES, Entry

__all__ = ["Hit", "Mirror", "Snapshot"]

TIER_RATIO: Final = 4
"""A tier is merged into the next one when that is less than this many times its size."""

_Key = tuple[str, str, str]


class Mark(NamedTuple):
    """What an entry leaves in the mirror. ``before`` is None for kinds that name one thing."""

    entry_id: str
    before: int | None
    expires_at: int


_Tier = Mapping[_Key, tuple[Mark, ...]]


class Hit(NamedTuple):
    """Why a token is refused: the kind of the entry and its id."""

    kind: str
    entry_id: str


class Snapshot:
    """Every revocation known at one moment; immutable, compared by identity.

    ``entries`` counts the things that are revoked: two entries on one subject are one.
    """

    __slots__ = ("entries", "tiers")

    def __init__(self, tiers: tuple[_Tier, ...] = (), entries: int = 0) -> None:
        self.tiers = tiers
        self.entries = entries

    def marks_of(self, key: _Key) -> Iterable[Mark]:
        """Every mark under one (kind, issuer, value)."""
        for tier in self.tiers:
            yield from tier.get(key, ())

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
        if not self.tiers:
            return None
        for kind, value in (("kid", kid), ("jti", jti), ("tok", tok), ("sid", sid)):
            if value is not None and (hit := self._exact(kind, issuer, value)) is not None:
                return hit
        for kind, value in (("sub", sub), ("client", client_id), ("all", "")):
            if value is not None and (hit := self._cutoff(kind, issuer, value, iat, after)) is not None:
                return hit
        return None

    def _exact(self, kind: str, issuer: str, value: str) -> Hit | None:
        key = (kind, issuer, value)
        for tier in self.tiers:
            if key in tier:
                return Hit(kind, tier[key][0].entry_id)
        return None

    def _cutoff(self, kind: str, issuer: str, value: str, iat: float | None, after: Collection[str]) -> Hit | None:
        key = (kind, issuer, value)
        for tier in self.tiers:
            if key in tier:
                for mark in tier[key]:
                    caught = iat is None or mark.before is None or iat <= mark.before
                    if caught and mark.entry_id not in after:
                        return Hit(kind, mark.entry_id)
        return None

    def live_cutoffs(self, issuer: str, sub: str | None, client_id: str | None, now: float) -> tuple[str, ...]:
        """Ids of the cut-offs that would hit a token issued ``now`` (Unix seconds): what its ``after`` must name."""
        keys = [("all", issuer, "")]
        keys += [("sub", issuer, sub)] if sub is not None else []
        keys += [("client", issuer, client_id)] if client_id is not None else []
        return tuple(
            mark.entry_id
            for key in keys
            for mark in self.marks_of(key)
            if mark.before is not None and now <= mark.before + 1 and now < mark.expires_at
        )


def _merge(older: _Tier, newer: _Tier) -> dict[_Key, tuple[Mark, ...]]:
    merged = dict(older)
    for key, marks in newer.items():
        held = merged.get(key)
        merged[key] = marks if held is None else _union(key[0], held, marks)
    return merged


def _union(kind: str, held: tuple[Mark, ...], marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
    if kind in CUTOFF_KINDS:  # each keeps its id, because a token's ``after`` names cut-offs one by one
        return held + tuple(mark for mark in marks if mark not in held)
    return (max(*held, *marks, key=_lasts_longest),)


def _lasts_longest(mark: Mark) -> float:
    return float("inf") if mark.expires_at == NEVER_EXPIRES else mark.expires_at


class Mirror:
    """Folds entries into snapshots. One thread writes; any thread reads ``snapshot``, which is one assignment."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()

    def apply(self, entries: Iterable[Entry]) -> bool:
        """Add entries; True if that made a new snapshot. Entries already held change nothing."""
        fresh: dict[_Key, tuple[Mark, ...]] = {}
        for entry in entries:
            if entry.kind == EPOCH_KIND:
                continue
            key = (entry.kind, entry.issuer, entry.value)
            marks = (Mark(entry.id, entry.before, entry.expires_at),)
            same = fresh.get(key)
            fresh[key] = marks if same is None else _union(entry.kind, same, marks)
        fresh = {key: marks for key, marks in fresh.items() if not self._holds(key, marks)}
        if not fresh:
            return False
        held = self.snapshot.tiers
        count = self.snapshot.entries + sum(not any(key in tier for tier in held) for key in fresh)
        tiers: list[_Tier] = [fresh, *held]
        while len(tiers) > 1 and len(tiers[1]) < TIER_RATIO * len(tiers[0]):
            tiers[:2] = [_merge(tiers[1], tiers[0])]
        self.snapshot = Snapshot(tuple(tiers), count)
        return True

    def _holds(self, key: _Key, marks: tuple[Mark, ...]) -> bool:
        held = tuple(self.snapshot.marks_of(key))
        if key[0] in CUTOFF_KINDS:
            return all(mark in held for mark in marks)
        return bool(held) and max(map(_lasts_longest, held)) >= max(map(_lasts_longest, marks))

    def drop_expired(self, now: float, server_now: float, drop_grace_s: float) -> bool:
        """Forget entries that both clocks (Unix seconds) put past ``expires_at + drop_grace_s``; True if any went.

        The caller does not call this while stale: a clock alone must never bring a token back.
        """
        limit = min(now, server_now) - drop_grace_s
        kept: dict[_Key, tuple[Mark, ...]] = {}
        for tier in reversed(self.snapshot.tiers):
            kept = _merge(kept, tier)
        count = sum(map(len, kept.values()))
        live = {
            key: alive
            for key, marks in kept.items()
            if (alive := tuple(mark for mark in marks if _lasts_longest(mark) > limit))
        }
        if sum(map(len, live.values())) == count:
            return False
        self.snapshot = Snapshot((live,) if live else (), len(live))
        return True
