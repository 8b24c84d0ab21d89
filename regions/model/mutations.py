"""The parts with one rule left out each, which :mod:`regions.model.mutants` puts together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec

from keyservice.core.evidence import Electorate, EpochKey, LogHead, Protocol, Report, key_of
from keyservice.core.keepers import Add, Bump, Keeper, MemoryDisk, Send, Step
from regions.model.server import NewEpoch, Server
from regions.model.tails import KeeperTail, SimVerifier
from verifier.freshness import Freshness
from verifier.log import Beat, Entry, Epoch, EpochLink, Meta, Position
from verifier.reader import Reader

__all__ = [
    "AcknowledgesClosed",
    "AddsNothing",
    "AnyBeatCounts",
    "AsksEveryEpoch",
    "AsksMostOfTheRest",
    "AsksOnlyTheOpened",
    "AsksTheImpossible",
    "AsksThePredecessor",
    "AsksTheSuperseded",
    "BreaksPromises",
    "ClosedBeatCounts",
    "ConfirmsClosed",
    "CountsAnyBeat",
    "CountsClosed",
    "CountsClosedBeats",
    "CountsOverEpochs",
    "ForkBlind",
    "HoleBlind",
    "IgnoresHoles",
    "LearnsAtOnce",
    "LeavesIntents",
    "NamesEpochsFirst",
    "NamesNoEpochs",
    "NamesNoHoles",
    "NeverACopy",
    "NumberIsIdentity",
    "OneEntryAnId",
    "OpensAtOnce",
    "OverlooksForks",
    "OverlooksHoles",
    "ReportsUnmerged",
    "SameNumbers",
    "SkipsInherited",
    "TakesAnyLog",
    "TakesOldVoters",
    "TrustsItsDisk",
    "WaitsForOthers",
    "WaitsForTheForgotten",
]

# -- verifiers --------------------------------------------------------------------------------------------------------


class AnyBeatCounts(Freshness):
    __slots__ = ()

    def reached(self, position: Position) -> Freshness:
        state = Freshness.reached(self, position)
        return replace(state, confirmed=state.applied, epoch_open=True)


class CountsAnyBeat(SimVerifier):
    freshness_type = AnyBeatCounts


class ClosedBeatCounts(Freshness):
    """Takes what a closed epoch confirms."""

    __slots__ = ()

    def heard(self, beat: Beat, epoch: Epoch, meta: Meta, *, now: float, mono: float) -> Freshness:
        return Freshness.heard(self, beat, replace(epoch, open=True), meta, now=now, mono=mono)


class CountsClosedBeats(SimVerifier):
    freshness_type = ClosedBeatCounts


class NumberIsIdentity(SimVerifier):
    """Takes the nonce of whatever epoch it already holds the number of."""

    def _round(self, entries_from: Any, data: Any, now_ms: int, tolerant: bool) -> None:
        held = self.reader
        if held is not None and held.position is not None:
            nonce = data.epoch.nonce_of(held.position.epoch)
            held.position = held.position if nonce is None else held.position._replace(nonce=nonce)
        super()._round(entries_from, data, now_ms, tolerant)


class HoleBlind(Reader):
    """Takes whatever comes next."""

    def _gap(self, reason: str, number: int, seq: int) -> str:
        return self.epoch.nonce_of(number) or "0" * 16


class OverlooksHoles(SimVerifier):
    reader_type = HoleBlind


# -- servers ----------------------------------------------------------------------------------------------------------


class SameNumbers(Server):
    """Draws the number from the one before alone, as if no clock were there."""

    def bump(self, seen: EpochKey | None, nonce: str, new: NewEpoch, *, now_ms: int, region: str) -> EpochKey | None:
        return super().bump(seen, nonce, new, now_ms=0, region=region)


class TrustsItsDisk(Server):
    """A server that came back goes on in its epoch."""

    def same_server(self, epoch: Epoch) -> bool:
        return True


# -- counting ---------------------------------------------------------------------------------------------------------


class CountsOverEpochs(Protocol):
    def counts(self, report: Report, epoch: Epoch) -> bool:
        return True


class OpensAtOnce(Protocol):
    def may_open(self, epoch: Epoch, reports: Iterable[Report]) -> bool:
        return True


class AcknowledgesClosed(Protocol):
    def is_replicated(self, position: Position, epoch: Epoch, reports: Iterable[Report]) -> bool:
        return self.has_majority(self.voters(epoch), self.holders(position, epoch, reports))


class CountsClosed(Protocol):
    """Lets beats of a closed epoch count."""

    def confirmed(self, epoch: Epoch, reports: Iterable[Report]) -> Report | None:
        return super().confirmed(replace(epoch, open=True), reports)


class AsksThePredecessor(Protocol):
    def electorates(self, epoch: Epoch) -> list[Electorate]:
        return [Electorate.of(link.voters) for link in epoch.chain[-2:]]


class AsksOnlyTheOpened(Protocol):
    """Skips epochs that may have opened, though nobody here knows."""

    def electorates(self, epoch: Epoch) -> list[Electorate]:
        links = sorted({key_of(link): link for link in (*epoch.known, *epoch.chain)}.values(), key=key_of)
        opened = [link for link in links if link.opened and key_of(link) < key_of(epoch)]
        return [Electorate.of(link.voters) for link in (*opened[-1:], epoch.chain[-1])]


class AsksEveryEpoch(Protocol):
    """Takes no notice of what has opened since: nobody's seat is ever given up."""

    def electorates(self, epoch: Epoch) -> list[Electorate]:
        closed = [msgspec.structs.replace(link, opened=False) for link in epoch.known]
        chain = [msgspec.structs.replace(link, opened=False) for link in epoch.chain]
        return super().electorates(replace(epoch, known=tuple(closed), chain=tuple(chain)))


class AsksTheImpossible(Protocol):
    """Waits also for voter sets that never had enough keepers to open anything."""

    def electorates(self, epoch: Epoch) -> list[Electorate]:
        links = sorted({key_of(link): link for link in (*epoch.known, *epoch.chain)}.values(), key=key_of)
        gone = {keeper_id for link in links for keeper_id in link.forgotten}
        opened = [key_of(link) for link in links if link.opened and key_of(link) < key_of(epoch)]
        since = max(opened) if opened else key_of(links[0])
        asked = [Electorate.of(link.voters) for link in links if since <= key_of(link) < key_of(epoch)]
        left = [voters.without(frozenset(gone)) if voters.able else voters for voters in asked]
        return [*left, Electorate.of(epoch.chain[-1].voters)]


class AsksTheSuperseded(Protocol):
    """Waits also for voters that were chosen before those of an epoch that has opened."""

    def electorates(self, epoch: Epoch) -> list[Electorate]:
        chain = [msgspec.structs.replace(link, chosen=None) for link in epoch.chain]
        known = [msgspec.structs.replace(link, chosen=None) for link in epoch.known]
        return super().electorates(replace(epoch, chain=tuple(chain), known=tuple(known)))


class WaitsForTheForgotten(Protocol):
    def electorates(self, epoch: Epoch) -> list[Electorate]:
        chain = [msgspec.structs.replace(link, forgotten=()) for link in epoch.chain]
        known = [msgspec.structs.replace(link, forgotten=()) for link in epoch.known]
        return super().electorates(replace(epoch, chain=tuple(chain), known=tuple(known)))


class AsksMostOfTheRest(Protocol):
    """Counts a majority of those that an operator has left, as if there had never been others."""

    def electorates(self, epoch: Epoch) -> list[Electorate]:
        return [
            Electorate(voters.keepers, min(voters.needed, len(voters.keepers) // 2 + 1))
            for voters in super().electorates(epoch)
        ]


class NeverACopy(Protocol):
    def is_copy(self, report: Report | None, keeper_id: str, commit: int) -> bool:
        return False


# -- disks ------------------------------------------------------------------------------------------------------------


class OneEntryAnId(MemoryDisk):
    def store(self, entries: Iterable[Entry], links: Iterable[EpochLink]) -> None:
        ids = {entry.id for entry in self.entries.values()}
        super().store((entry for entry in entries if entry.id not in ids), links)


# -- keepers ----------------------------------------------------------------------------------------------------------


class AddsNothing(Keeper):
    def lacking(self, head: LogHead, mono: float) -> Add:
        return replace(super().lacking(head, mono), entries=(), complete=True)

    def _lacking(self, seen: EpochKey, mono: float) -> list[bytes]:
        return []


class WaitsForOthers(Keeper):
    def is_outvoted(self, head: LogHead) -> bool:
        return False

    def next_step(self, head: LogHead | None, mono: float) -> Step | None:
        if head is not None and Keeper.is_outvoted(self, head):
            return None
        return super().next_step(head, mono)


class NamesNoEpochs(Keeper):
    def lacking(self, head: LogHead, mono: float) -> Add:
        return replace(super().lacking(head, mono), links=())

    def has_newer_voters(self, head: LogHead) -> bool:
        return False


class TakesOldVoters(Keeper):
    def has_newer_voters(self, head: LogHead) -> bool:
        return False


class NamesEpochsFirst(Keeper):
    """Names epochs with the first of the entries, not with the last."""

    def lacking(self, head: LogHead, mono: float) -> Add:
        add = super().lacking(head, mono)
        return replace(add, links=tuple(self.disk.links.values()))


class SkipsInherited(Keeper):
    """Stores an epoch's own entries only, and reports the position all the same."""

    disk: MemoryDisk

    def read(self, items: Iterable[tuple[Position, Entry]], links: Iterable[EpochLink] = ()) -> None:
        newest = max((key.number for key in self.disk.links), default=0)
        own = [item for item in items if item[0].epoch >= newest or item[1].digest() in self.disk.entries]
        super().read(own, links)


class BreaksPromises(Keeper):
    """Goes on reporting in older epochs."""

    disk: MemoryDisk

    def is_outvoted(self, head: LogHead) -> bool:
        return False

    def added(self, add: Add, beat_n: int, mono: float) -> None:
        self.disk.promise = None
        super().added(add, beat_n, mono)


class ConfirmsClosed(Keeper):
    """Confirms beats of a closed epoch, which then count at once when it opens."""

    def confirms(self, beat: Beat, head: LogHead) -> bool:
        return super().confirms(beat, head._replace(epoch=replace(head.epoch, open=True)))


class TakesAnyLog(Keeper):
    """Takes what it read for the history of the epoch that it saw afterwards."""

    def next_step(self, head: LogHead | None, mono: float) -> Step | None:
        if head is not None and not head.is_of_epoch:
            head = head._replace(position=head.position._replace(nonce=head.epoch.nonce))
        return super().next_step(head, mono)


class IgnoresHoles(Keeper):
    def next_step(self, head: LogHead | None, mono: float) -> Step | None:
        return super().next_step(None if head is None else head._replace(holed=False), mono)


class NamesNoHoles(Keeper):
    """Answers a hole with an epoch that does not say so."""

    def next_step(self, head: LogHead | None, mono: float) -> Step | None:
        step = super().next_step(head, mono)
        return replace(step, holes=frozenset()) if isinstance(step, Bump) else step


class LeavesIntents(Keeper):
    """Takes an intent for an entry that the log has shown: it is the writer's to append, whatever becomes of him."""

    def _lacking(self, seen: EpochKey, mono: float) -> list[bytes]:
        return [digest for digest in super()._lacking(seen, mono) if digest not in self._intents]


class ReportsUnmerged(Keeper):
    """Reports an epoch before its merge."""

    def next_step(self, head: LogHead | None, mono: float) -> Step | None:
        step = super().next_step(head, mono)
        if isinstance(step, Add) and head is not None and not step.entries:
            return Send(self.report(head))
        return step


class LearnsAtOnce(KeeperTail):
    """Stores which epochs have opened before everything is read that stands in front of that."""

    def beside(self, data: Any, reader: Reader, at_end: bool, now_ms: int) -> None:
        super().beside(data, reader, at_end, now_ms)
        self.keeper.read((), (*data.epoch.chain, *data.epoch.known))


class ForkBlind(Reader):
    """Holds what it read for a part of whatever history it is shown afterwards."""

    def check(self, meta: Any, epoch: Epoch, last_id: Any, length: int | None = None) -> None:
        here = 0 if self.position is None else self.position.epoch
        super().check(meta, replace(epoch, chain=tuple(k for k in epoch.chain if k.number <= here)), last_id, length)
        self.epoch = epoch


class OverlooksForks(KeeperTail):
    reader_type = ForkBlind
