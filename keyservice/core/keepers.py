"""The keeper rules: what makes an acknowledged revocation survive, and a fresh verifier right. Pure.

Redis may lose acknowledged writes at any failover or restart, so truth is not what a server holds but the union of what
the keepers hold: one per region, storing durably every entry that its region's replica shows. Revocations are a set
that only grows, so a union needs no order and no leader. An *epoch*, (number, nonce), is one server's history from the
moment that a writer opened it by compare-and-set; histories that do not know of each other never share a nonce.

A keeper's life in one epoch, from what its own replica shows:

    the log is in …                        the keeper …
    -------------------------------------  --------------------------------------------------------------------------
    an epoch older than its promise        stores what is new; opens a new epoch above the promise (``Bump``)
    an epoch it has not merged into        appends what it holds and the log lacks (``Add``); when nothing is lacking,
                                           *promises* the epoch, on disk, and from then on reports it as merged
    the epoch it has merged into           stores, and reports how far it holds the log and which beat it has seen

Before it merges it also makes sure of the voters: where it knows a newer epoch than the one before this, that this
history lacks and that had other voters, a log that lags behind has brought old voters back; it opens a new epoch with
the newer ones. On a server that holds no log at all it does the same, with the voters on its disk.

Rules, each of which a model shows to be needed (``regions model``):

1. An entry is *replicated* when the epoch is open and a majority of its voters, merged into it, hold the entry's
   position: counted within one nonce, never over epochs.
2. *Held p* means that everything from the log's first entry up to p is on disk, inherited entries included.
3. An epoch starts closed. It *opens* when majorities of its voters, and of every voter set that a merged keeper knows
   since the newest epoch known to have opened, have merged. Until then nothing is acknowledged or confirmed.
4. A beat counts for freshness once a later one says that a majority of the voters confirmed it, and only if it was
   issued in an open epoch: opening issues one anew, and nobody confirms in a closed epoch.
5. Merging is a promise: from then on the keeper reports nothing in an older epoch, by (number, nonce). It still stores
   what an older epoch shows, and adds it again.
6. A keeper confirms only beats that were issued after its own merge.

Why it holds: majorities of one voter set intersect. Take an entry acknowledged in epoch E and a later epoch N that
opened. Some keeper held the entry before it promised N, so it added it before N opened; and every beat that counts was
issued after that.

*Voters* are seats, one per region, each held by a keeper id; a vacant seat (an empty id) counts in the majority. A
failover keeps the voters. A keeper that lost its disk, or was restored from a copy, is another keeper: it takes a new
id, and is no voter until it is made one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import msgspec

from verifier.log import Beat, Entry, Epoch, EpochLink, Position

__all__ = [
    "Add",
    "Bump",
    "Disk",
    "EpochKey",
    "Keeper",
    "LogView",
    "Protocol",
    "Report",
    "Send",
    "Step",
    "majority",
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


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a keeper says of itself in ``{trust}:region:<r>``. Sent only once it is merged into the epoch.

    ``held`` is the position up to which everything is on disk. ``beat_*`` is the newest beat that it confirms, -1 for
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


@dataclass(frozen=True, slots=True)
class LogView:
    """What a replica shows at one moment. ``known`` are epochs that merged keepers know and this history lacks."""

    epoch: Epoch
    known: tuple[EpochLink, ...]
    log: Sequence[tuple[Position, Entry]]
    beat: Beat | None

    @property
    def links(self) -> tuple[EpochLink, ...]:
        """Every epoch that the log names."""
        return (*self.epoch.chain, *self.known)


# -- counting -------------------------------------------------------------------------------------------------------


def majority(voters: Voters) -> int:
    """How many of these voters make a majority."""
    return len(voters) // 2 + 1


class Protocol:
    """The decisions that are made by counting; one method a rule, so that a model can do without one."""

    def counts(self, report: Report, epoch: Epoch) -> bool:
        """Rule 1: evidence counts in the very epoch that it was given for."""
        return report.epoch == key_of(epoch)

    def holds(self, report: Report, position: Position) -> bool:
        """Whether this keeper has the position on disk."""
        return Position.parse(report.held)[:2] >= position[:2]

    def voters(self, epoch: Epoch) -> Voters:
        """The voters of the current epoch."""
        return epoch.chain[-1].voters

    def merged_ids(self, epoch: Epoch, reports: Iterable[Report]) -> frozenset[str]:
        """Keepers that are merged into the epoch."""
        return frozenset(report.keeper_id for report in reports if self.counts(report, epoch))

    def has_majority(self, voters: Voters, ids: frozenset[str]) -> bool:
        """Whether these keepers hold a majority of the seats."""
        return sum(keeper_id in ids for keeper_id in voters.values() if keeper_id) >= majority(voters)

    def electorates(self, epoch: Epoch, known: Iterable[EpochLink]) -> list[Voters]:
        """Rule 3: every voter set since the newest epoch known to have opened, that one's and this one's included.

        An epoch not known to have opened may have: whoever opened it may be out of reach.
        """
        links = sorted({key_of(link): link for link in (*known, *epoch.chain)}.values(), key=key_of)
        opened = [key_of(link) for link in links if link.opened and key_of(link) < key_of(epoch)]
        since = max(opened) if opened else key_of(links[0])
        return [link.voters for link in links if since <= key_of(link)]

    def may_open(self, epoch: Epoch, known: Iterable[EpochLink], reports: Iterable[Report]) -> bool:
        """Rule 3: whether enough keepers have merged."""
        ids = self.merged_ids(epoch, reports)
        return all(self.has_majority(voters, ids) for voters in self.electorates(epoch, known))

    def holders(self, position: Position, epoch: Epoch, reports: Iterable[Report]) -> frozenset[str]:
        """Keepers that are merged into the epoch and hold this position of its history."""
        return frozenset(r.keeper_id for r in reports if self.counts(r, epoch) and self.holds(r, position))

    def is_replicated(self, position: Position, epoch: Epoch, reports: Iterable[Report]) -> bool:
        """Rule 1: whether the entry at this position of the epoch's history may be acknowledged."""
        return epoch.open and self.has_majority(self.voters(epoch), self.holders(position, epoch, reports))

    def confirmed(self, epoch: Epoch, reports: Iterable[Report]) -> Report | None:
        """Rule 4: the report with the newest beat that a majority of the voters has reached, or None."""
        if not epoch.open:
            return None
        seats = set(self.voters(epoch).values()) - {""}
        reached = [r for r in reports if self.counts(r, epoch) and r.keeper_id in seats and r.beat_n >= 0]
        reached.sort(key=lambda report: report.beat_n, reverse=True)
        needed = majority(self.voters(epoch))
        return reached[needed - 1] if len(reached) >= needed else None


# -- one keeper -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Disk:
    """What a keeper has stored: every method is one durable write, complete or not made at all.

    ``entries`` by digest: a union keeps two different entries under one id.
    """

    keeper_id: str
    promise: EpochKey | None = None
    entries: dict[bytes, Entry] = field(default_factory=dict)
    links: dict[EpochKey, EpochLink] = field(default_factory=dict)
    commit: int = 0

    def store(self, entries: Iterable[Entry], links: Iterable[EpochLink]) -> None:
        """Keep what is new; an epoch once known to have opened stays so."""
        new = {digest: entry for entry in entries if (digest := entry.digest()) not in self.entries}
        newer = {key_of(link): link for link in links if link.opened or key_of(link) not in self.links}
        changed = {key: link for key, link in newer.items() if self.links.get(key) != link}
        if new or changed:
            self.entries.update(new)
            self.links.update(changed)
            self.commit += 1

    def make_promise(self, epoch: EpochKey) -> None:
        """Rule 5; a promise only moves forward."""
        if self.promise is None or epoch > self.promise:
            self.promise = epoch
            self.commit += 1


@dataclass(frozen=True, slots=True)
class Bump:
    """Open a new epoch above this number, after the one that was seen (None: on a server without a log)."""

    above: int
    seen: EpochKey | None
    voters: Voters


@dataclass(frozen=True, slots=True)
class Add:
    """Append these entries and name these epochs, in the epoch that was seen."""

    seen: EpochKey
    entries: tuple[Entry, ...]
    links: tuple[EpochLink, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Put this report in place, in the epoch that it names."""

    report: Report


Step = Bump | Add | Send


class Keeper:
    """One keeper. Only ``disk`` survives a crash. Whoever runs it carries its steps out.

    The order within one turn: :meth:`read`, then :meth:`next_step`; after an ``Add`` was carried out on the primary,
    :meth:`merged`. A step that fails is simply decided again.
    """

    def __init__(self, region: str, disk: Disk) -> None:
        self.region = region
        self.disk = disk
        self._merged: EpochKey | None = None
        self._merged_beat = -1
        self._added: set[bytes] = set()

    def read(self, view: LogView) -> None:
        """Store what the replica shows, whatever the epoch (rule 5)."""
        self.disk.store((entry for _, entry in view.log), view.links)

    def lacking(self, view: LogView) -> Add:
        """What is on disk and the log lacks, but for what was added already and is on its way to the replica."""
        shown = {entry.digest() for _, entry in view.log}
        if self._merged == key_of(view.epoch):
            shown |= self._added
        named = {key_of(link): link.opened for link in view.links}
        entries = tuple(entry for digest, entry in self.disk.entries.items() if digest not in shown)
        links = tuple(link for key, link in self.disk.links.items() if key not in named or link.opened > named[key])
        return Add(key_of(view.epoch), entries, links)

    def next_step(self, view: LogView | None) -> Step | None:
        """What to do about the log as it is shown (None: no log at all), after ``read`` of the same view."""
        if view is None:
            return self.bump_above(None) if self.disk.links else None
        seen = key_of(view.epoch)
        if self.is_outvoted(view) or self.has_newer_voters(view):
            return self.bump_above(seen)
        add = self.lacking(view)
        if self._merged != seen or add.entries:
            return add
        return Send(self.report(view))

    def is_outvoted(self, view: LogView) -> bool:
        """Whether the log fell back behind the promise. Without a new epoch a minority's would stall everybody."""
        return self.disk.promise is not None and key_of(view.epoch) < self.disk.promise

    def has_newer_voters(self, view: LogView) -> bool:
        """Whether a laggard log has brought old voters back."""
        history = {key_of(link) for link in view.epoch.chain}
        epoch = view.epoch.chain[-1]
        before = max((key for key in history if key < key_of(epoch)), default=EpochKey(0, ""))
        newer = [key for key in self.disk.links if before < key < key_of(epoch) and key not in history]
        return bool(newer) and dict(self.disk.links[max(newer)].voters) != dict(epoch.voters)

    def bump_above(self, seen: EpochKey | None) -> Bump:
        """A new epoch above everything known, with the voters of the newest one."""
        newest = max(key for key in self.disk.links if seen is None or key != seen or len(self.disk.links) == 1)
        numbers = [key.number for key in self.disk.links] + [self.disk.promise.number if self.disk.promise else 0]
        return Bump(max(numbers), seen, self.disk.links[newest].voters)

    def merged(self, add: Add, beat_n: int) -> None:
        """Everything held is in this epoch's log, as the primary has just said; ``beat_n`` is its newest beat.

        The promise is on disk before anything is reported.
        """
        if self.disk.promise is not None and add.seen < self.disk.promise:
            return
        self.disk.make_promise(add.seen)
        if self._merged != add.seen:
            self._merged, self._merged_beat, self._added = add.seen, beat_n, set()
        self._added.update(entry.digest() for entry in add.entries)

    def appended(self, epoch: EpochKey, entry: Entry) -> None:
        """A writer appended an intent of this keeper's in this epoch: it need not be added once more."""
        if self._merged == epoch:
            self._added.add(entry.digest())

    def report(self, view: LogView) -> Report:
        """Evidence for the epoch that is merged into: everything that the view shows is stored (rules 2, 6)."""
        last = view.log[-1][0]
        report = Report(
            region=self.region,
            keeper_id=self.disk.keeper_id,
            number=view.epoch.number,
            nonce=view.epoch.nonce,
            held=str(Position(last.epoch, last.seq, view.epoch.nonce)),
            commit=self.disk.commit,
        )
        beat = view.beat
        if beat is None or not self.confirms(beat, view):
            return report
        return msgspec.structs.replace(
            report, beat_n=beat.n, beat_at_ms=beat.at_ms, beat_position=beat.position.stream_id
        )

    def confirms(self, beat: Beat, view: LogView) -> bool:
        """Rules 4 and 6, and only once everything up to the beat is on disk."""
        last = view.log[-1][0]
        return (
            beat.nonce == view.epoch.nonce
            and view.epoch.open
            and beat.n > self._merged_beat
            and last[:2] >= beat.position[:2]
        )


def renewed(report: Report | None, newer: Report) -> Report:
    """The record after a report: within one nonce nothing moves back, and a beat once confirmed stays so."""
    if report is None or report.epoch != newer.epoch or report.keeper_id != newer.keeper_id:
        return newer
    if newer.beat_n < report.beat_n:
        newer = msgspec.structs.replace(
            newer, beat_n=report.beat_n, beat_at_ms=report.beat_at_ms, beat_position=report.beat_position
        )
    if Position.parse(newer.held)[:2] < Position.parse(report.held)[:2]:
        newer = msgspec.structs.replace(newer, held=report.held)
    return newer


def opened(epoch: Epoch) -> Epoch:
    """The epoch after it opened: its link in the chain says so."""
    last = msgspec.structs.replace(epoch.chain[-1], opened=True)
    return replace(epoch, open=True, chain=(*epoch.chain[:-1], last))
