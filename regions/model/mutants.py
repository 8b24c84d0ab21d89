"""The rules, left out one at a time. A rule that the model cannot show to be needed would be a rule too many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from keyservice.core.evidence import EpochKey, LogHead, Protocol, Report, Voters
from keyservice.core.keepers import Add, Keeper, MemoryDisk, Step
from regions.model.server import Server
from regions.model.world import KeeperTail, Region, SimVerifier, World
from verifier.freshness import Freshness
from verifier.log import Beat, Entry, Epoch, EpochLink, Meta, Position

__all__ = ["HEALTHY", "KEPT_SEEDS", "MUTANTS", "Mutant", "by_name"]

LOST = "acknowledged and lost"
FOOLED = "fresh and fooled"
STUCK = "no progress"


def lose_disk(world: World, region: Region) -> None:
    """What must happen: whoever lost a disk, or found an old copy, is a new keeper."""
    copy = world.rng.random() < 0.5
    old = region.disk
    disk = type(old)(f"keeper-{region.name}-{world.fresh()}")
    if copy:  # an old copy: some of the entries are there
        disk.store([entry for entry in old.entries.values() if world.rng.random() < 0.5], [])
    region.tail = KeeperTail(type(region.keeper)(region.name, disk))


@dataclass(frozen=True, slots=True)
class Mutant:
    """A system with one rule less; the defaults are the system as it is. `breaks` is the promise that falls first."""

    name: str
    rule: str
    breaks: str = LOST
    protocol: type[Protocol] = Protocol
    keeper: type[Keeper] = Keeper
    disk: type[MemoryDisk] = MemoryDisk
    verifier: type[SimVerifier] = SimVerifier
    server: type[Server] = Server
    lose: Callable[[World, Region], None] = lose_disk


HEALTHY = Mutant("healthy", "all of them")


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

    def _round(self, data: object, now_ms: int, tolerant: bool) -> None:
        held = self.reader
        if held is not None and held.position is not None:
            held.position = self._renamed(held.position, data)
        super()._round(data, now_ms, tolerant)  # type: ignore[arg-type]  # Data

    def _renamed(self, position: Position, data: object) -> Position:
        epoch: Epoch = data.epoch  # type: ignore[attr-defined]  # Data
        nonce = epoch.nonce_of(position.epoch)
        return position if nonce is None else Position(position.epoch, position.seq, nonce)


class SameNumbers(Server):
    """Draws the number from the one before alone, as if no clock were there."""

    def bump(
        self, seen: EpochKey | None, nonce: str, *, above: int, voters: Voters, now_ms: int, region: str
    ) -> EpochKey | None:
        return super().bump(seen, nonce, above=above, voters=voters, now_ms=0, region=region)


class AddsNothing(Keeper):
    def lacking(self, head: LogHead, mono: float) -> Add:
        return replace(super().lacking(head, mono), entries=(), complete=True)

    def _lacking(self, seen: EpochKey, mono: float) -> list[bytes]:
        return []


class TrustsItsDisk(Server):
    """A server that came back goes on in its epoch."""

    def same_server(self, epoch: Epoch) -> bool:
        return True


class CountsOverEpochs(Protocol):
    def counts(self, report: Report, epoch: Epoch) -> bool:
        return True


class OpensAtOnce(Protocol):
    def may_open(self, epoch: Epoch, reports: Iterable[Report]) -> bool:
        return True


class WaitsForOthers(Keeper):
    def is_outvoted(self, head: LogHead) -> bool:
        return False

    def next_step(self, head: LogHead | None, mono: float) -> Step | None:
        if head is not None and Keeper.is_outvoted(self, head):
            return None
        return super().next_step(head, mono)


class AcknowledgesClosed(Protocol):
    def is_replicated(self, position: Position, epoch: Epoch, reports: Iterable[Report]) -> bool:
        return self.has_majority(self.voters(epoch), self.holders(position, epoch, reports))


class AsksThePredecessor(Protocol):
    def electorates(self, epoch: Epoch) -> list[Voters]:
        return [link.voters for link in epoch.chain[-2:]]


class ForgetsEpochs(MemoryDisk):
    def store(self, entries: Iterable[Entry], links: Iterable[EpochLink]) -> None:
        super().store(entries, list(links)[-1:])
        self.links = {key: link for key, link in self.links.items() if key == max(self.links)}


class NamesNoEpochs(Keeper):
    def lacking(self, head: LogHead, mono: float) -> Add:
        return replace(super().lacking(head, mono), links=())

    def has_newer_voters(self, head: LogHead) -> bool:
        return False


def keep_id(world: World, region: Region) -> None:
    """A copy is put back under its old id."""
    old = region.disk
    disk = type(old)(old.keeper_id)
    disk.links = dict(old.links)
    region.tail = KeeperTail(type(region.keeper)(region.name, disk))


class SkipsInherited(Keeper):
    """Stores an epoch's own entries only, and reports the position all the same."""

    disk: MemoryDisk

    def read(self, items: Iterable[tuple[Position, Entry]], links: Iterable[EpochLink] = ()) -> None:
        links = list(links)
        newest = max((link.number for link in links), default=0)
        own = [item for item in items if item[0].epoch >= newest or item[1].digest() in self.disk.entries]
        super().read(own, links)


class OneEntryAnId(MemoryDisk):
    def store(self, entries: Iterable[Entry], links: Iterable[EpochLink]) -> None:
        ids = {entry.id for entry in self.entries.values()}
        super().store((entry for entry in entries if entry.id not in ids), links)


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


class CountsClosed(Protocol):
    """Lets beats of a closed epoch count."""

    def confirmed(self, epoch: Epoch, reports: Iterable[Report]) -> Report | None:
        return super().confirmed(replace(epoch, open=True), reports)


MUTANTS = (
    Mutant("zombie-stays-fresh", "a beat counts once a majority confirmed it", FOOLED, verifier=CountsAnyBeat),
    Mutant(
        "one-number-two-histories",
        "an epoch is a number and a nonce",
        FOOLED,
        verifier=NumberIsIdentity,
        server=SameNumbers,
    ),
    Mutant("laggard-promoted", "keepers add again what a log lacks", keeper=AddsNothing),
    Mutant("restart-from-old-state", "another replication id needs another epoch", server=TrustsItsDisk),
    Mutant("acknowledged-over-epochs", "evidence counts within one nonce", protocol=CountsOverEpochs),
    Mutant("opened-without-merge", "an epoch opens when majorities have merged", protocol=OpensAtOnce),
    Mutant("minority-bump-stalls", "a keeper bumps above its promise", STUCK, keeper=WaitsForOthers),
    Mutant("acknowledged-while-closed", "nothing is acknowledged in a closed epoch", protocol=AcknowledgesClosed),
    Mutant("voters-of-unopened-epoch", "old voters are those since an epoch that opened", protocol=AsksThePredecessor),
    Mutant("laggard-brings-old-voters", "keepers hold the chain of epochs", keeper=NamesNoEpochs),
    Mutant("restored-under-old-id", "a restored keeper is a new one", lose=keep_id),
    Mutant("held-without-inherited", "held means from the first entry", keeper=SkipsInherited),
    Mutant("one-entry-an-id", "a union keeps two entries under one id", disk=OneEntryAnId),
    Mutant(
        "closed-beats-confirmed",
        "no beat of a closed epoch counts",
        FOOLED,
        CountsClosed,
        keeper=ConfirmsClosed,
        verifier=CountsClosedBeats,
    ),
    Mutant("promise-broken", "a keeper reports nothing older than its promise", keeper=BreaksPromises),
)
"""Each must be found by its kept seed."""

KEPT_SEEDS = {
    "zombie-stays-fresh": 36,
    "one-number-two-histories": 10,
    "laggard-promoted": 0,
    "restart-from-old-state": 9,
    "acknowledged-over-epochs": 9,
    "opened-without-merge": 0,
    "minority-bump-stalls": 39,
    "acknowledged-while-closed": 75,
    "voters-of-unopened-epoch": 76,
    "laggard-brings-old-voters": 36,
    "restored-under-old-id": 0,
    "held-without-inherited": 2028,
    "one-entry-an-id": 36,
    "closed-beats-confirmed": 186,
    "promise-broken": 9,
}
"""Seeds at which the mutant of that name breaks its promise. They belong to the schedules as they are drawn now."""


def by_name(name: str) -> Mutant | None:
    """The mutant of that name, or the healthy system."""
    return next((mutant for mutant in (HEALTHY, *MUTANTS) if mutant.name == name), None)
