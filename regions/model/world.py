"""Regions, the connections between them, and who does what in a region: writer, keeper, verifier.

Everything here is one atomic step of somebody; `schedule` decides who is next. Times are virtual milliseconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import lru_cache

from keyservice.core.evidence import EpochKey, LogHead, Protocol, key_of
from keyservice.core.keepers import Add, Bump, Keeper, MemoryDisk, Register, Send, Step
from regions.model.server import Data, Refused, Server, StoredEntry
from verifier.freshness import Freshness
from verifier.log import Entry, Epoch, FormatError, Hole, Position
from verifier.reader import Reader, Reread
from verifier.revocations import Mirror

__all__ = ["ISSUER", "Acknowledged", "Region", "SimVerifier", "World"]

ISSUER = "https://id.model.test"
MAX_SKEW_S = 5.0
START_MS = 1_800_000_000_000


@lru_cache(maxsize=4096)
def _raw(position: Position, entry: Entry) -> tuple[bytes, dict[bytes, bytes]]:
    """An entry as the stream shows it."""
    return position.stream_id.encode(), {k.encode(): v.encode() for k, v in entry.encode().items()}


class Tail:
    """Somebody who follows the log without a gap, as `verifier.replica` does, over a server of the model."""

    def __init__(self) -> None:
        self.reader: Reader | None = None
        self.known_gaps: frozenset[Hole] = frozenset()
        self.held: Position | None = None

    def round(self, data: Data, now_ms: int) -> None:
        """One round of reading; whatever contradicts what was read makes it read again, and it keeps what it has."""
        if data.meta is None or data.epoch is None:
            self.reader = None
            return
        tolerant = False
        for _ in range(3):
            try:
                self._round(data, now_ms, tolerant)
                break
            except Reread as reread:
                if self.reader is not None:
                    next_epoch = reread.reason == "next_epoch"
                    self.known_gaps = self.reader.known_after() if next_epoch else self.reader.known
                    self.held = self.reader.held_after()
                self.reader = None
                tolerant = reread.reason in ("hole", "fork")
            except FormatError:
                self.reader = None

    def _round(self, data: Data, now_ms: int, tolerant: bool) -> None:
        assert data.meta is not None
        assert data.epoch is not None
        reader = self.reader or Reader(data.meta, data.epoch, tolerant, self.known_gaps, self.held)
        since = reader.position
        last = data.log[-1][0][:2]
        if since is None:
            self.begin()
        else:
            reader.check(data.meta, data.epoch, last, len(data.log))
        unread = data.log if since is None else [item for item in data.log if item[0][:2] > since[:2]]
        accepted = reader.accept(_raw(position, entry) for position, entry in unread)
        reader.tolerant = False
        self.reader = reader
        reader.check(data.meta, data.epoch, last, len(data.log))
        stored = {position[:2]: entry for position, entry in unread}  # the very objects, which know their digests
        self.take([(position, stored[position[:2]]) for position, _ in accepted], data, reader, now_ms)

    def begin(self) -> None:
        """The log is read from its first entry."""

    def take(self, accepted: list[tuple[Position, Entry]], data: Data, reader: Reader, now_ms: int) -> None:
        """New entries, and the state beside them."""
        raise AssertionError("a tail does something with what it reads")


class SimVerifier(Tail):
    """A verifier's mirror."""

    freshness_type = Freshness

    def __init__(self, wall_offset_ms: int) -> None:
        super().__init__()
        self.wall_offset_ms = wall_offset_ms
        self.mirror = Mirror()
        self.freshness = self.freshness_type(MAX_SKEW_S)

    def take(self, accepted: list[tuple[Position, Entry]], data: Data, reader: Reader, now_ms: int) -> None:
        """Enforce the entries, and hear the beat."""
        self.mirror.apply(entry for _, entry in accepted)
        assert data.epoch is not None
        self._hear(data, data.epoch, reader, now_ms)

    def _hear(self, data: Data, epoch: Epoch, reader: Reader, now_ms: int) -> None:
        assert data.meta is not None
        assert reader.position is not None
        state = replace(self.freshness, synced=True, holed_nonce=reader.holed_nonce)
        if data.beat is not None:
            now = (now_ms + self.wall_offset_ms) / 1000
            state = state.heard(data.beat, epoch, data.meta, now=now, mono=now_ms / 1000)
        self.freshness = state.reached(reader.position)

    def is_fresh(self, now_ms: int, bound_s: float) -> bool:
        """Whether it calls itself fresh."""
        now = (now_ms + self.wall_offset_ms) / 1000
        return self.freshness.staleness(now=now, mono=now_ms / 1000, max_staleness_s=bound_s).fresh

    def enforces(self, entry: Entry) -> bool:
        """Whether a token that the entry revokes is refused."""
        return self.mirror.snapshot.find(issuer=ISSUER, jti=entry.value) is not None


class KeeperTail(Tail):
    """A keeper's way to the log: what it reads goes to the keeper, and where it stands is kept for the next step."""

    def __init__(self, keeper: Keeper) -> None:
        super().__init__()
        self.keeper = keeper
        self.head: LogHead | None = None

    def round(self, data: Data, now_ms: int) -> None:
        """One round; ``head`` is None where it was not read to its end."""
        self.head = None
        super().round(data, now_ms)

    def begin(self) -> None:
        """Nothing on the keeper's disk was seen in this log yet."""
        self.keeper.begin()

    def take(self, accepted: list[tuple[Position, Entry]], data: Data, reader: Reader, now_ms: int) -> None:
        """Everything that is read is stored."""
        assert data.epoch is not None
        assert reader.position is not None
        self.keeper.read(accepted, (*data.epoch.chain, *data.epoch.known))
        self.head = LogHead(data.epoch, data.beat, reader.position, bool(reader.open_gaps))


@dataclass(frozen=True, slots=True)
class InFlight:
    """A keeper's step on its way to a server. It may arrive after the keeper that sent it has died."""

    step: Step
    server: str
    keeper: Keeper


@dataclass(slots=True)
class Region:
    """What one region runs. `primary` is whom its writer and keeper take for the primary, right or wrong."""

    name: str
    server: Server
    tail: KeeperTail
    verifier: SimVerifier
    primary: str
    keeper_up: bool = True
    seen: EpochKey | None = None
    pending: list[Entry] = field(default_factory=list)
    in_flight: InFlight | None = None

    @property
    def keeper(self) -> Keeper:
        """The region's keeper."""
        return self.tail.keeper

    @property
    def disk(self) -> MemoryDisk:
        """Its disk."""
        disk = self.tail.keeper.disk
        assert isinstance(disk, MemoryDisk)
        return disk


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """An entry that was acknowledged `replicated`, and when."""

    entry: Entry
    at_ms: int


class World:
    """All regions. `cut` holds the pairs that cannot reach each other."""

    def __init__(
        self,
        names: list[str],
        protocol: Protocol,
        rng: random.Random,
        *,
        keeper: type[Keeper] = Keeper,
        disk: type[MemoryDisk] = MemoryDisk,
        verifier: type[SimVerifier] = SimVerifier,
        server: type[Server] = Server,
        voters: list[str] | None = None,
    ) -> None:
        self.rng = rng
        self.protocol = protocol
        self.now_ms = START_MS
        self.cut: set[frozenset[str]] = set()
        self.acknowledged: list[Acknowledged] = []
        self.trace: list[str] | None = None
        self._keeper, self._disk = keeper, disk
        self._count = 0
        self.regions: dict[str, Region] = {}
        for name in names:
            offset = rng.randint(-1500, 1500)
            self.regions[name] = Region(
                name,
                server(name, protocol, self.fresh()),
                KeeperTail(keeper(name, disk(f"keeper-{name}-{self.fresh()}"))),
                verifier(offset),
                names[0],
            )
            self.regions[name].server.clock_offset_ms = rng.randint(-1500, 1500)
        home = self.regions[names[0]].server
        for region in list(self.regions.values())[1:]:
            region.server.upstream = home
        seats = {name: self.regions[name].disk.keeper_id for name in voters or names}
        home.bump(None, self.nonce(), above=0, voters=seats, now_ms=self.now_ms, region=names[0])
        assert home.data.epoch is not None
        for region in self.regions.values():  # first start: every seat's keeper has registered
            region.disk.store([], home.data.epoch.chain)

    def fresh(self) -> int:
        """A number that was never used before."""
        self._count += 1
        return self._count

    def nonce(self) -> str:
        """A random epoch nonce."""
        return f"{self.rng.getrandbits(64):016x}"

    def say(self, text: str) -> None:
        """A line of the trace."""
        if self.trace is not None:
            self.trace.append(f"{(self.now_ms - START_MS) / 1000:8.3f}  {text}")

    def reaches(self, a: str, b: str) -> bool:
        """Whether region `a` can talk to region `b`'s server."""
        return self.regions[b].server.alive and (a == b or frozenset((a, b)) not in self.cut)

    def primary_for(self, region: Region) -> Server | None:
        """The server that this region writes to, if it answers."""
        return self.regions[region.primary].server if self.reaches(region.name, region.primary) else None

    # -- steps ----------------------------------------------------------------------------------------------------

    def replicate(self, region: Region, *, fully: bool = False) -> None:
        """The region's server takes over more of its primary's history."""
        server, upstream = region.server, region.server.upstream
        if not server.alive or upstream is None or upstream.upstream is not None:
            return
        if not self.reaches(region.name, upstream.region):
            return
        newest = len(upstream.history) - 1
        same = server.followed is not None and server.followed[0] == upstream.replid
        oldest = server.followed[1] if same and server.followed is not None else newest
        server.follow(newest if fully else self.rng.randint(min(oldest, newest), newest))

    def write(self, region: Region) -> None:
        """Somebody revokes a token here: the intent is stored, then appended, unless the writer dies in between."""
        if not region.keeper_up:
            return
        value = f"e{self.fresh()}"
        taken = [entry.id for other in self.regions.values() for entry in other.pending]
        name = self.rng.choice(taken) if taken and self.rng.random() < 0.05 else value
        entry = StoredEntry(name, "jti", ISSUER, value, None, 4_000_000_000, "", self.now_ms, region.name)
        held_up_s = self.rng.choice((0, 0, 1, 5))
        region.keeper.intend([entry], self.now_ms / 1000 + held_up_s)
        region.pending.append(entry)
        if self.rng.random() < 0.95:
            self.append(region, entry)

    def append(self, region: Region, entry: Entry) -> None:
        """Try to append, with the reactions of a writer to each refusal."""
        server = self.primary_for(region)
        if server is None:
            return
        for _ in range(4):
            held = server.data.epoch
            region.seen = region.seen or (None if held is None else key_of(held))
            if region.seen is None:
                return
            try:
                server.append(region.seen, [entry])
                region.keeper.appended(region.seen, [entry])
                self.say(f"{region.name} appends {entry.value} on {server.region} in {_short(region.seen)}")
            except Refused as refused:
                if not self.react(region, server, str(refused)):
                    return
            else:
                return

    def react(self, region: Region, server: Server, refusal: str) -> bool:
        """What a writer does after a refusal; True to try again."""
        seen, region.seen = region.seen, None
        held = server.data.epoch
        if refusal == "TRUST_REPLID" and held is not None:
            voters = self.protocol.voters(held)
            made = server.bump(
                key_of(held), self.nonce(), above=0, voters=voters, now_ms=self.now_ms, region=region.name
            )
            self.say(f"{region.name} bumps on {server.region}: {_short(key_of(held))} -> {_short(made)}")
            return True
        return refusal == "TRUST_EPOCH" and seen is not None

    def beat(self, region: Region) -> None:
        """The region's key service beats."""
        server = self.primary_for(region)
        if server is None or server.data.epoch is None:
            return
        try:
            server.issue_beat(key_of(server.data.epoch), self.now_ms)
        except Refused as refused:
            region.seen = key_of(server.data.epoch)
            self.react(region, server, str(refused))

    def open(self, region: Region) -> None:
        """The region's key service opens the epoch if enough keepers have merged, says the primary or its replica."""
        server = self.primary_for(region)
        if server is None:
            return
        data = server.data if self.rng.random() < 0.7 else region.server.data
        epoch = data.epoch
        if epoch is None or epoch.open:
            return
        if self.protocol.may_open(epoch, data.reports.values()):
            try:
                server.open_epoch(key_of(epoch), self.now_ms)
                self.say(f"{region.name} opens {_short(key_of(epoch))} on {server.region}")
            except Refused:
                return

    def settle_receipts(self, region: Region) -> None:
        """The region's key service looks at its pending receipts, at the primary or at its own replica."""
        server = self.primary_for(region) if self.rng.random() < 0.5 else region.server
        if server is None or not server.alive or server.data.epoch is None:
            return
        data, epoch = server.data, server.data.epoch
        for entry in list(region.pending):
            place = next((position for position, held in data.log if held is entry), None)
            if place is not None and self.protocol.is_replicated(place, epoch, data.reports.values()):
                region.pending.remove(entry)
                self.acknowledged.append(Acknowledged(entry, self.now_ms))
                self.say(f"{region.name} acknowledges {entry.value} in {_short(key_of(epoch))}")

    def keep(self, region: Region, *, late: float = 0.0) -> None:
        """One turn of the region's keeper; its step arrives in a later turn with the probability `late`."""
        if not region.keeper_up or not region.server.alive:
            return
        tail, data = region.tail, region.server.data
        if region.in_flight is not None:
            if late and self.rng.random() < 0.5:
                tail.round(data, self.now_ms)
            self.arrive(region)
            return
        tail.round(data, self.now_ms)
        if data.epoch is not None and tail.head is None:
            return
        step = tail.keeper.next_step(tail.head, self.now_ms / 1000)
        if step is None or isinstance(step, Register):
            return
        region.in_flight = InFlight(step, region.primary, tail.keeper)
        if late == 0.0 or self.rng.random() >= late:
            self.arrive(region)

    def crash(self, region: Region) -> None:
        """The region's keeper dies: its step arrives without it later, or never does."""
        self.say(f"keeper {region.name} crashes")
        region.tail = KeeperTail(self._keeper(region.name, region.disk))
        if self.rng.random() < 0.5:
            region.in_flight = None

    def arrive(self, region: Region) -> None:
        """The region's step in flight reaches its server, or is lost."""
        sent, region.in_flight = region.in_flight, None
        if sent is None or not self.reaches(region.name, sent.server):
            return
        server = self.regions[sent.server].server
        try:
            self._carry_out(region, sent, server)
        except Refused as refused:
            if str(refused) == "TRUST_REPLID" and server.data.epoch is not None:
                region.seen = key_of(server.data.epoch)
                self.react(region, server, str(refused))

    def _carry_out(self, region: Region, sent: InFlight, server: Server) -> None:
        step = sent.step
        if isinstance(step, Bump):
            made = server.bump(
                step.seen, self.nonce(), above=step.above, voters=step.voters, now_ms=self.now_ms, region=region.name
            )
            self.say(f"keeper {region.name} bumps above {step.above - START_MS} on {server.region}: {_short(made)}")
        elif isinstance(step, Add):
            beat_n = server.append(step.seen, step.entries, step.links)
            self.say(f"keeper {region.name} adds {len(step.entries)} entries to {_short(step.seen)}")
            if region.keeper is sent.keeper:
                sent.keeper.added(step, beat_n, self.now_ms / 1000)
        elif isinstance(step, Send):
            server.put_report(step.report)

    def look(self, region: Region, *, torn: float = 0.0) -> None:
        """One round of the region's verifier; with the probability `torn` it read the log a little before the rest."""
        if not region.server.alive:
            return
        data, reader = region.server.data, region.verifier.reader
        if torn and self.rng.random() < torn:
            older = self.rng.choice(region.server.history[-6:])
            read = (0, 0) if reader is None or reader.position is None else reader.position[:2]
            if older.log and older.log[-1][0][:2] >= read:
                data = replace(data, log=older.log)
        region.verifier.round(data, self.now_ms)


def _short(key: EpochKey | None) -> str:
    return "lost the race" if key is None else f"{key.number - START_MS}.{key.nonce[:4]}"
