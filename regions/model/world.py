"""Regions, the connections between them, and who does what in a region: writer, keeper, verifier.

Everything here is one atomic step of somebody; `schedule` decides who is next. Times are virtual milliseconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from keyservice.core.evidence import EpochKey, Voters, chosen_in, key_of
from keyservice.core.keepers import Add, Bump, Keeper, MemoryDisk, Register, Send
from regions.model.budget import Budget
from regions.model.parts import Acknowledged, InFlight, Parts, Region
from regions.model.server import Data, NewEpoch, Refused, Server, StoredEntry
from regions.model.tails import ISSUER, Died
from verifier.log import Entry

__all__ = ["SKEW_MS", "START_MS", "World", "short"]

START_MS = 1_800_000_000_000
SKEW_MS = 2_500
"""How far a clock is off at most where all is well: two of them by `MAX_SKEW_S`."""

CHUNKS = (1, 2, 1000)
"""Entries that one script call takes: a merge may need several of them."""

REPLY_LOST = 0.05


class World:
    """All regions. `cut` holds the pairs that cannot reach each other."""

    def __init__(self, names: list[str], voters: list[str], parts: Parts, rng: random.Random) -> None:
        self.rng, self.parts = rng, parts
        self.protocol = parts.protocol()
        self.now_ms = START_MS
        self.cut: set[frozenset[str]] = set()
        self.acknowledged: list[Acknowledged] = []
        self.forgiven: set[bytes] = set()
        self.chosen: dict[EpochKey, Voters] = {}
        self.budget = Budget()
        self.trace: list[str] | None = None
        self._chunk = rng.choice(CHUNKS)
        self._count = 0
        self.server_ms_max = SKEW_MS
        self.regions: dict[str, Region] = {}
        for name in names:
            disk = parts.disk(f"keeper-{name}-{self.fresh()}")
            verifier = parts.verifier(rng.randint(-SKEW_MS, SKEW_MS))
            server = parts.server(name, self.protocol, self.fresh())
            server.clock_offset_ms = rng.randint(-SKEW_MS, SKEW_MS)
            self.regions[name] = Region(name, server, parts.tail(self.keeper(name, disk)), verifier, names[0])
            self.regions[name].wall_ms_min = -SKEW_MS
        self._start(names[0], {name: self.regions[name].disk.keeper_id for name in voters})

    def _start(self, home: str, seats: Voters) -> None:
        """The first epoch, once every seat's keeper has registered."""
        first = self.regions[home].server
        for region in self.regions.values():
            region.server.upstream = None if region.name == home else first
        key = self.begin(home, first, None, NewEpoch(seats))
        assert key is not None
        assert first.data.epoch is not None
        self.chosen[key] = seats
        for region in self.regions.values():
            region.disk.store([], first.data.epoch.chain)

    def keeper(self, region: str, disk: MemoryDisk) -> Keeper:
        """A keeper's process."""
        return self.parts.keeper(region, disk, add_entries_max=self._chunk)

    def fresh(self) -> int:
        """A number that was never used before."""
        self._count += 1
        return self._count

    def say(self, *text: object) -> None:
        """A line of the trace."""
        if self.trace is not None:
            said = " ".join(part for part in map(str, text) if part)
            self.trace.append(f"{(self.now_ms - START_MS) / 1000:9.3f}  {said}")

    def reaches(self, a: str, b: str) -> bool:
        """Whether region `a` can talk to region `b`'s server."""
        return self.regions[b].server.alive and (a == b or frozenset((a, b)) not in self.cut)

    def primary_for(self, region: Region) -> Server | None:
        """The server that this region writes to, if it answers."""
        return self.regions[region.primary].server if self.reaches(region.name, region.primary) else None

    def disks(self) -> dict[str, MemoryDisk]:
        """All that are left, by keeper id."""
        return {region.disk.keeper_id: region.disk for region in self.regions.values()}

    def begin(self, who: str, server: Server, seen: EpochKey | None, new: NewEpoch) -> EpochKey | None:
        """A new epoch by compare-and-set; None if somebody was faster. Raises `Refused`."""
        nonce = f"{self.rng.getrandbits(64):016x}"
        made = server.bump(seen, nonce, new, now_ms=self.now_ms, region=who)
        if made is not None:
            assert server.data.epoch is not None
            self.budget.begun[made] = server.data.epoch.chain[-1]
        return made

    def forgive(self, base: EpochKey) -> None:
        """More disks are gone than P2 allows for: what no voter is sure to bring back is owed no longer."""
        known = {e.digest() for r in self.regions.values() for e in r.pending}
        known |= {e.digest() for r in self.regions.values() for _, e in r.server.data.log} | self.budget.owed.keys()
        disks = self.disks()
        self.forgiven |= {digest for digest in known if not self.budget.is_owed_still(digest, base, disks)}
        lost = [a for a in self.acknowledged if a.entry.digest() in self.forgiven]
        self.acknowledged = [a for a in self.acknowledged if a not in lost]
        for region in self.regions.values():
            region.verifier.enforced = 0
        self.say("beyond the promise; no longer owed:", *(a.entry.value for a in lost))

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
        """Somebody revokes a token here: the intent is stored, then appended; or late, or never."""
        if region.unsent and self.rng.random() < 0.5:
            self.append(region, region.unsent.pop())
            return
        if not region.keeper_up:
            return
        value = f"e{self.fresh()}"
        taken = [entry.id for other in self.regions.values() for entry in other.pending]
        name = self.rng.choice(taken) if taken and self.rng.random() < 0.05 else value
        entry = StoredEntry(name, "jti", ISSUER, value, None, 4_000_000_000, "", self.now_ms, region.name)
        self.say(region.name, "stores", value, "" if name == value else f"under the id {name}")
        region.keeper.intend([entry], self.now_ms / 1000 + self.rng.choice((0, 0, 1, 5)))
        region.pending.append(entry)
        chance = self.rng.random()
        if chance < 0.9:
            self.append(region, entry)
        elif chance < 0.95:
            region.unsent.append(entry)

    def append(self, region: Region, entry: Entry) -> None:
        """Try to append, with the reactions of a writer to each refusal."""
        server = self.primary_for(region)
        if server is None:
            region.keeper.given_up([entry])
            return
        for _ in range(4):
            held = server.data.epoch
            region.seen = region.seen or (None if held is None else key_of(held))
            if region.seen is None:
                return
            try:
                server.append(region.seen, [entry])
                self.say(region.name, "appends", entry.value, "on", server.region, "in", short(region.seen))
                if self.rng.random() >= REPLY_LOST:
                    region.keeper.appended(region.seen, [entry])
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
            made = self.begin(
                region.name,
                server,
                key_of(held),
                NewEpoch(self.protocol.voters(held), chosen=chosen_in(held.chain[-1])),
            )
            self.say(region.name, "begins", short(made), "after", short(key_of(held)), "on", server.region)
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
        if epoch is None or epoch.open or not self.protocol.may_open(epoch, data.reports.values()):
            return
        try:
            server.open_epoch(key_of(epoch), self.now_ms)
        except Refused:
            return
        merged = sorted(self.protocol.merged_ids(epoch, data.reports.values()))
        self.say(region.name, "opens", short(key_of(epoch)), "on", f"{server.region}; merged:", *merged)
        assert server.data.epoch is not None
        self.budget.opened[key_of(epoch)] = server.data.epoch.chain[-1]
        self.budget.see(server.data)

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
                self.say(region.name, "acknowledges", entry.value, "in", short(key_of(epoch)))
                if entry.digest() not in self.forgiven:
                    self.acknowledged.append(Acknowledged(entry, self.now_ms))

    # -- keepers --------------------------------------------------------------------------------------------------

    def keep(self, region: Region, *, late: float = 0.0, torn: float = 0.0, dies: float = 0.0) -> None:
        """One turn of the region's keeper: what is on its way may arrive, it reads, it decides.

        With the probability `late` a step arrives in a later turn, maybe overtaken by others; with `torn` the entries
        that it read are older than what stood beside them; with `dies` it dies while it stores them.
        """
        if not region.keeper_up or not region.server.alive:
            return
        for sent in self.rng.sample(region.in_flight, len(region.in_flight)):
            if late == 0.0 or self.rng.random() < 0.5:
                self.arrive(region, sent, reply_lost=REPLY_LOST if late else 0.0)
        if not region.identified:
            self.identify(region)
        tail, data = region.tail, region.server.data
        if self.rng.random() < dies:
            tail.dies_after = self.rng.randint(0, 3)
        try:
            tail.round(self.entries_seen(region.server, torn), data, self.now_ms)
        except Died:
            self.crash(region)
            return
        step = tail.next_step(self.now_ms)
        if step is None or isinstance(step, Register):
            return
        under_way = [s for s in region.in_flight if s.keeper is tail.keeper and not isinstance(s.step, Send)]
        if under_way and not isinstance(step, Send):
            return
        sent = InFlight(step, region.primary, tail.keeper)
        region.in_flight.append(sent)
        if late == 0.0 or self.rng.random() >= late:
            self.arrive(region, sent)

    def entries_seen(self, server: Server, torn: float) -> Data:
        """Where a round reads its entries: with the probability `torn` the server's state of a moment before."""
        return self.rng.choice(server.history[-6:]) if torn and self.rng.random() < torn else server.data

    def identify(self, region: Region) -> None:
        """A keeper that has just started looks whether its disk is the one that it was, wherever it can."""
        for server in (region.server, self.primary_for(region)):
            report = None if server is None else server.data.reports.get(region.name)
            if self.protocol.is_copy(report, region.disk.keeper_id, region.disk.commit):
                old = region.disk
                self.put_disk(region, self.copy_of(old, f"keeper-{region.name}-{self.fresh()}"))
                self.say(
                    "keeper", region.name, "finds itself a copy of", f"{old.keeper_id}: now", region.disk.keeper_id
                )
        region.identified = True

    def copy_of(self, disk: MemoryDisk, keeper_id: str) -> MemoryDisk:
        """What a disk holds, under another id."""
        return self.parts.disk(keeper_id, None, dict(disk.entries), dict(disk.links), disk.commit)

    def put_disk(self, region: Region, disk: MemoryDisk) -> None:
        """A keeper starts on this disk."""
        region.tail = self.parts.tail(self.keeper(region.name, disk))
        region.identified = False

    def crash(self, region: Region) -> None:
        """The region's keeper dies and starts anew: what it had sent arrives without it later, or never does."""
        self.say("keeper", region.name, "crashes")
        self.put_disk(region, region.disk)
        region.in_flight = [sent for sent in region.in_flight if self.rng.random() < 0.5]
        for entry in region.unsent:
            region.keeper.given_up([entry])

    def arrive(self, region: Region, sent: InFlight, *, reply_lost: float = 0.0) -> None:
        """The region's step in flight reaches its server, or is lost."""
        region.in_flight.remove(sent)
        if not self.reaches(region.name, sent.server):
            return
        server = self.regions[sent.server].server
        steps: dict[type, Callable[[], None]] = {
            Bump: lambda: self._bump(region, sent, server),
            Add: lambda: self._add(region, sent, server, reply_lost),
            Send: lambda: self._report(region, sent, server),
        }
        try:
            steps[type(sent.step)]()
        except Refused as refused:
            if str(refused) == "TRUST_REPLID" and server.data.epoch is not None:
                region.seen = key_of(server.data.epoch)
                self.react(region, server, str(refused))

    def _bump(self, region: Region, sent: InFlight, server: Server) -> None:
        step = sent.step
        assert isinstance(step, Bump)
        made = self.begin(
            region.name, server, step.seen, NewEpoch(step.voters, step.above, (), step.holes, step.chosen)
        )
        why = f"for {len(step.holes)} holes" if step.holes else f"above {step.above - START_MS}"
        self.say("keeper", region.name, "begins", short(made), why, "on", f"{server.region}; voters", *step.voters)

    def _add(self, region: Region, sent: InFlight, server: Server, reply_lost: float) -> None:
        step = sent.step
        assert isinstance(step, Add)
        beat_n = server.append(step.seen, step.entries, step.links)
        what = [entry.value for entry in step.entries] or ["nothing"]
        named = f"and names {len(step.links)} epochs" if step.links else ""
        self.say("keeper", region.name, "adds", *what, named, "in", short(step.seen), "" if step.complete else "so far")
        if region.keeper is sent.keeper and self.rng.random() >= reply_lost:
            before = sent.keeper.merged
            sent.keeper.added(step, beat_n, self.now_ms / 1000)
            if sent.keeper.merged != before:
                self.say("keeper", region.name, "promises", short(step.seen))

    def _report(self, region: Region, sent: InFlight, server: Server) -> None:
        step = sent.step
        assert isinstance(step, Send)
        server.put_report(step.report)
        self.budget.see(server.data)

    def say_state(self, bound_s: float) -> None:
        """Lines of the trace: where everybody stands."""
        if self.trace is None:
            return
        for region in self.regions.values():
            server, epoch = region.server, region.server.data.epoch
            role = "primary" if server.upstream is None else f"replica of {server.upstream.region}"
            where = "no epoch" if epoch is None else f"{short(key_of(epoch))}, {'open' if epoch.open else 'closed'}"
            held = f"{len(region.disk.entries)} entries, promise {short(region.disk.promise, 'none')}"
            fresh = "fresh" if region.verifier.is_fresh(self.now_ms, bound_s) else "not fresh"
            up = ", ".join(("up" if server.alive else "down", f"log of {len(server.data.log)}"))
            self.say(f"  {region.name}: {role} ({up}) in {where}; {region.disk.keeper_id}: {held}; verifier {fresh}")

    # -- verifiers ------------------------------------------------------------------------------------------------

    def look(self, region: Region, *, torn: float = 0.0) -> None:
        """One round of the region's verifier."""
        if region.server.alive:
            region.verifier.round(self.entries_seen(region.server, torn), region.server.data, self.now_ms)

    def restart_verifier(self, region: Region) -> None:
        """It starts over with nothing."""
        region.verifier = self.parts.verifier(region.verifier.wall_offset_ms)
        self.say("verifier", region.name, "restarts")


def short(key: EpochKey | None, none: str = "nothing (somebody was faster)") -> str:
    """An epoch as traces name it: its number less the start, and the beginning of its nonce."""
    return none if key is None else f"{key.number - START_MS}.{key.nonce[:4]}"
