"""What keepers say of themselves, and what follows when enough of them say it: rules 1, 3 and 4. Pure.

The rules themselves stand in :mod:`keyservice.core.keepers`. Each is one method of :class:`Protocol`, so that a model
can do without one and see what breaks. ``beat.lua`` counts confirmed beats by the same rule inside the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import msgspec

from verifier.log import Beat, Epoch, EpochLink, Hole, Position, parse_stream_id

__all__ = [
    "Electorate",
    "EpochKey",
    "LogHead",
    "Protocol",
    "Report",
    "Voters",
    "chosen_in",
    "key_of",
    "majority",
    "opened",
    "renewed",
]

Voters = Mapping[str, str]
"""Region to keeper id; an empty id is a vacant seat."""


class EpochKey(NamedTuple):
    """An epoch's identity, in the order of promises."""

    number: int
    nonce: str


def key_of(epoch: Epoch | EpochLink) -> EpochKey:
    """The identity of an epoch or of a link of its chain."""
    return EpochKey(epoch.number, epoch.nonce)


def chosen_in(link: EpochLink) -> EpochKey:
    """The epoch for which its voters were chosen."""
    return key_of(link) if link.chosen is None else EpochKey(*link.chosen)


class LogHead(NamedTuple):
    """How far a log was read, and what stood beside it afterwards.

    ``holed``: the log lacks an entry that it must have had, and this epoch does not say so. ``trimmed_to`` is the
    stream id up to which it was trimmed on purpose, ``gaps`` are all the holes in it. ``at_end``: the log ended at
    ``position`` when the rest was read.
    """

    epoch: Epoch
    beat: Beat | None
    position: Position
    holed: bool = False
    trimmed_to: tuple[int, int] | None = None
    gaps: frozenset[Hole] = frozenset()
    at_end: bool = True

    @property
    def is_of_epoch(self) -> bool:
        """Whether what was read is this epoch's history: another one may have taken its place meanwhile."""
        return self.position.nonce == self.epoch.nonce

    @property
    def links(self) -> tuple[EpochLink, ...]:
        """The epochs that stood beside the log, for a keeper to store with what it read.

        Whoever says of an epoch that it has opened must hold what was acknowledged before that: so only a log that was
        read to its end, and has no hole, teaches it.
        """
        links = (*self.epoch.chain, *self.epoch.known)
        if self.at_end and not self.holed:
            return links
        return tuple(msgspec.structs.replace(link, opened=False) for link in links)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a keeper says of itself in ``{trust}:region:<r>``. Sent only once it is merged into the epoch.

    ``held`` is the stream id up to which everything is on disk. ``beat_*`` is the newest beat that it confirms, -1 for
    none yet. ``commit`` counts its disk's commits, to tell a restored copy from the original.
    """

    region: str
    keeper_id: str
    number: int
    nonce: str
    held: str
    commit: int
    beat_n: int = -1
    beat_at_ms: int = 0
    beat_position: str = ""

    @property
    def epoch(self) -> EpochKey:
        """The epoch that this is evidence for."""
        return EpochKey(self.number, self.nonce)


def majority(voters: Voters) -> int:
    """How many of these voters make a majority."""
    return len(voters) // 2 + 1


class Electorate(NamedTuple):
    """Keepers of whom so many must have merged."""

    keepers: frozenset[str]
    needed: int

    @classmethod
    def of(cls, voters: Voters) -> Electorate:
        """A majority of these seats; nobody sits in a vacant one."""
        return cls(frozenset(voters.values()) - {""}, majority(voters))

    @property
    def able(self) -> bool:
        """Whether there are enough of them at all."""
        return len(self.keepers) >= self.needed

    def without(self, forgotten: frozenset[str]) -> Electorate:
        """The same seats, but for keepers that were given up."""
        left = self.keepers - forgotten
        return Electorate(left, min(self.needed, len(left)))

    def missing(self, ids: frozenset[str]) -> int:
        """How many more of them must merge."""
        return max(0, self.needed - len(self.keepers & ids))

    def agrees(self, ids: frozenset[str]) -> bool:
        """Whether enough of them are among these."""
        return self.missing(ids) == 0


class Protocol:
    """The decisions that are made by counting; one method a rule."""

    def is_copy(self, report: Report | None, keeper_id: str, commit: int) -> bool:
        """Whether a disk is older than what was reported from it: a copy was put back, and is another keeper's."""
        return report is not None and report.keeper_id == keeper_id and report.commit > commit

    def counts(self, report: Report, epoch: Epoch) -> bool:
        """Rule 1: evidence counts in the very epoch that it was given for."""
        return report.epoch == key_of(epoch)

    def holds(self, report: Report, position: Position) -> bool:
        """Whether this keeper has the position on disk."""
        return parse_stream_id(report.held) >= position[:2]

    def voters(self, epoch: Epoch) -> Voters:
        """The voters of the current epoch."""
        return epoch.chain[-1].voters

    def merged_ids(self, epoch: Epoch, reports: Iterable[Report]) -> frozenset[str]:
        """Keepers that are merged into the epoch."""
        return frozenset(report.keeper_id for report in reports if self.counts(report, epoch))

    def has_majority(self, voters: Voters, ids: frozenset[str]) -> bool:
        """Whether these keepers hold a majority of the seats."""
        return Electorate.of(voters).agrees(ids)

    def electorates(self, epoch: Epoch) -> list[Electorate]:
        """Rule 3: every voter set since the newest epoch known to have opened, that one's and this one's included.

        An epoch not known to have opened may have: whoever opened it may be out of reach. One with too few keepers in
        its seats cannot have, nor one whose voters were chosen before those of an epoch that did open: a majority of
        them knows the newer choice, and merges into none with an older one. Nobody waits for a keeper that an operator
        gave up for good; of those that are left every single one is asked, up to the majority: one alone may hold what
        was acknowledged.
        """
        links = sorted({key_of(link): link for link in (*epoch.known, *epoch.chain)}.values(), key=key_of)
        opened = [link for link in links if link.opened and key_of(link) < key_of(epoch)] or links[:1]
        since, chosen = key_of(opened[-1]), max(map(chosen_in, opened))
        forgotten = frozenset(keeper_id for link in links for keeper_id in link.forgotten)
        before = [link for link in links if since <= key_of(link) < key_of(epoch) and chosen_in(link) >= chosen]
        asked = [voters.without(forgotten) for voters in (Electorate.of(link.voters) for link in before) if voters.able]
        return [*asked, Electorate.of(epoch.chain[-1].voters)]

    def may_open(self, epoch: Epoch, reports: Iterable[Report]) -> bool:
        """Rule 3: whether enough keepers have merged."""
        ids = self.merged_ids(epoch, reports)
        return all(voters.agrees(ids) for voters in self.electorates(epoch))

    def holders(self, position: Position, epoch: Epoch, reports: Iterable[Report]) -> frozenset[str]:
        """Keepers that are merged into the epoch and hold this position of its history."""
        return frozenset(r.keeper_id for r in reports if self.counts(r, epoch) and self.holds(r, position))

    def is_replicated(self, position: Position, epoch: Epoch, reports: Iterable[Report]) -> bool:
        """Rule 1: whether the entry at this position of the epoch's history may be acknowledged."""
        held = self.replicated_to(epoch, reports)
        return held is not None and held >= position[:2]

    def replicated_to(self, epoch: Epoch, reports: Iterable[Report]) -> tuple[int, int] | None:
        """Rule 1: the stream id up to which a majority of the voters holds the epoch's history; None while closed."""
        if not epoch.open:
            return None
        seats = set(self.voters(epoch).values()) - {""}
        held = [parse_stream_id(r.held) for r in reports if self.counts(r, epoch) and r.keeper_id in seats]
        held.sort(reverse=True)
        needed = majority(self.voters(epoch))
        return held[needed - 1] if len(held) >= needed else None

    def confirmed(self, epoch: Epoch, reports: Iterable[Report]) -> Report | None:
        """Rule 4: the report with the newest beat that a majority of the voters has reached, or None."""
        if not epoch.open:
            return None
        seats = set(self.voters(epoch).values()) - {""}
        reached = [r for r in reports if self.counts(r, epoch) and r.keeper_id in seats and r.beat_n >= 0]
        reached.sort(key=lambda report: report.beat_n, reverse=True)
        needed = majority(self.voters(epoch))
        return reached[needed - 1] if len(reached) >= needed else None


def renewed(report: Report | None, newer: Report) -> Report:
    """The record after a report: within one nonce nothing moves back, and a beat once confirmed stays so."""
    if report is None or report.epoch != newer.epoch or report.keeper_id != newer.keeper_id:
        return newer
    if newer.beat_n < report.beat_n:
        newer = msgspec.structs.replace(
            newer, beat_n=report.beat_n, beat_at_ms=report.beat_at_ms, beat_position=report.beat_position
        )
    if parse_stream_id(newer.held) < parse_stream_id(report.held):
        newer = msgspec.structs.replace(newer, held=report.held)
    return msgspec.structs.replace(newer, commit=max(newer.commit, report.commit))


def opened(epoch: Epoch) -> Epoch:
    """The epoch after it opened: its link in the chain says so."""
    last = msgspec.structs.replace(epoch.chain[-1], opened=True)
    return replace(epoch, open=True, chain=(*epoch.chain[:-1], last))
