"""One seed, one schedule: faults at random (safety), then healing and a demand for progress (liveness)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from keyservice.core.evidence import key_of
from regions.model.checkers import Violation, check_always, check_healed, check_opened, is_healed
from regions.model.mutants import HEALTHY, Mutant
from regions.model.server import Refused
from regions.model.skeletons import SKELETONS
from regions.model.world import Region, World, _short

__all__ = ["Outcome", "Schedule", "run_schedule"]

STEPS = 260
TORN = 0.3
"""How often a verifier's round is no single moment's."""

LATE = 0.2
"""How often a keeper's step is not carried out at once."""

FLAVOURS = ["mixed", "members", "growth", "disks", "flapping", *SKELETONS]
HEAL_ROUNDS = 60
NAMES = ["a", "b", "c", "d", "e"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a schedule came to: `violation` is None if everything held."""

    seed: int
    flavour: str
    regions: int
    acknowledged: int
    epochs: int
    violation: Violation | None
    trace: tuple[str, ...] = ()


class Schedule:
    """Draws what happens next. All chance comes from one generator, so a seed is a schedule."""

    def __init__(self, seed: int, mutant: Mutant) -> None:
        self.rng = random.Random(seed)
        self.flavour = self.rng.choice(FLAVOURS)
        grows = self.flavour in ("growth", "sides")
        self.count = 5 if grows else self.rng.choice([3, 3, 3, 5] if self.flavour in SKELETONS else [1, 3, 3, 3, 3, 5])
        names = NAMES[: self.count]
        self.voters = names[:3] if grows else names
        self.world = World(
            names,
            mutant.protocol(),
            self.rng,
            keeper=mutant.keeper,
            disk=mutant.disk,
            verifier=mutant.verifier,
            server=mutant.server,
            voters=self.voters,
        )
        self.mutant = mutant
        self.harshness = self.rng.choice([0.03, 0.08, 0.15])
        self.losses_left = (min(3, self.count) - 1) // 2
        self.latest = names[0]
        world = self.world
        self.everyday: list[Callable[[Region], None]] = [
            world.replicate,
            world.write,
            self.keep,
            world.beat,
            world.open,
            world.settle_receipts,
            self.look,
            self.learn,
        ]

    # -- safety ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises `Violation`."""
        skeleton = SKELETONS.get(self.flavour)
        if skeleton is None:
            self.live(STEPS, self.harshness)
        else:
            skeleton(self)
        self.heal()

    def live(self, steps: int, harshness: float = 0.0) -> None:
        """So many steps of somebody, each a fault with the probability `harshness`."""
        world = self.world
        faults = self.faults() if harshness else []
        for _ in range(steps):
            world.now_ms += self.rng.choice((5, 20, 60, 150, 400))
            if self.rng.random() < harshness:
                self.rng.choice(faults)()
            else:
                self.rng.choices(self.everyday, self.weights)[0](self.somebody())
                check_always(world)
                check_opened(world)

    def somebody(self) -> Region:
        return self.rng.choice(list(self.world.regions.values()))

    def rounds(self, count: int, pace_ms: tuple[int, ...] = (60, 150, 400)) -> None:
        """So many rounds in which most of everybody's work gets done, in any order, and somebody may write."""
        world = self.world
        for _ in range(count):
            world.now_ms += self.rng.choice(pace_ms)
            regions = list(world.regions.values())
            self.rng.shuffle(regions)
            for region in regions:
                if self.rng.random() < 0.7:
                    world.replicate(region, fully=self.rng.random() < 0.7)
                for step in (world.write, self.keep, world.open, world.beat, world.settle_receipts, self.look):
                    if self.rng.random() < (0.1 if step == world.write else 0.7):
                        step(region)
            check_always(world)
            check_opened(world)

    weights = (5, 3, 8, 8, 2, 4, 4, 1)

    def look(self, region: Region) -> None:
        self.world.look(region, torn=TORN)

    def keep(self, region: Region) -> None:
        self.world.keep(region, late=LATE)

    def faults(self) -> list[Callable[[], None]]:
        """What may go wrong, as often as it is named; the flavour names one kind more often."""
        common = [
            self.promote,
            self.promote,
            self.demote,
            self.demote,
            self.stray,
            self.restart,
            self.wipe,
            self.stop_server,
            self.cut_off,
            self.split,
            self.join,
            self.join,
            self.crash_keeper,
            self.keeper_down_or_up,
            self.lose_keeper,
            self.change_voters,
        ]
        more: dict[str, list[Callable[[], None]]] = {
            "mixed": [],
            "members": [self.change_voters] * 8 + [self.promote] * 3,
            "growth": [self.change_voters] * 4 + [self.promote] * 3 + [self.split] * 6 + [self.elect] * 6,
            "disks": [self.lose_keeper] * 5 + [self.split] * 4 + [self.elect] * 5,
            "flapping": [self.promote] * 5 + [self.stray] * 8 + [self.demote] * 3,
        }
        return common + more.get(self.flavour, [])

    def learn(self, region: Region) -> None:
        """A region hears of the latest promotion, if it can reach that server."""
        if self.world.reaches(region.name, self.latest):
            region.primary, region.seen = self.latest, None

    def promote(self) -> None:
        """The failover engine makes any server a primary, however far behind; the old one may not notice."""
        region = self.somebody()
        if region.server.upstream is None or not region.server.alive:
            return
        region.server.become_primary(self.world.fresh())
        self.latest = region.name
        self.world.say(f"{region.name} is promoted with {len(region.server.data.log)} entries")
        for other in self.world.regions.values():
            if self.rng.random() < 0.6:
                self.learn(other)
                if self.rng.random() < 0.7 and other is not region:
                    self.point(other, region)

    def point(self, region: Region, primary: Region) -> None:
        """A server becomes a replica, and loses what its new primary does not have."""
        region.server.upstream, region.server.followed = primary.server, None

    def demote(self) -> None:
        region, latest = self.somebody(), self.world.regions[self.latest]
        if region is not latest and self.world.reaches(region.name, self.latest):
            self.point(region, latest)
            self.world.say(f"{region.name} follows {self.latest}")

    def stray(self) -> None:
        """A replica follows another primary than the latest, and its region takes that one for the primary."""
        self.stray_to(self.somebody(), self.somebody())

    def stray_to(self, region: Region, other: Region) -> None:
        strays = other.server.upstream is None and region.server.upstream is not None
        if region is not other and strays and self.world.reaches(region.name, other.name):
            self.point(region, other)
            region.primary, region.seen = other.name, None
            self.world.say(f"{region.name} strays to {other.name}")

    def restart(self) -> None:
        """A server comes back from its disk, which may be old."""
        region = self.somebody()
        newest = len(region.server.history) - 1
        version = newest if self.rng.random() < 0.5 else self.rng.randint(max(0, newest - 12), newest)
        region.server.restart(self.world.fresh(), version)
        self.world.say(f"{region.name} restarts, {newest - version} writes behind")

    def wipe(self) -> None:
        region = self.somebody()
        if self.rng.random() < 0.3:
            region.server.wipe(self.world.fresh())
            self.world.say(f"{region.name}'s server is wiped")

    def stop_server(self) -> None:
        region = self.somebody()
        region.server.alive = False
        self.world.say(f"{region.name}'s server stops")

    def cut_off(self) -> None:
        region = self.somebody()
        for other in self.world.regions:
            if other != region.name and self.rng.random() < 0.8:
                self.world.cut.add(frozenset((region.name, other)))
        self.world.say(f"{region.name} is cut off")

    def split(self) -> None:
        """Two sides that do not see each other."""
        names = sorted(self.world.regions)
        self.part(set(self.rng.sample(names, self.rng.randint(1, max(1, len(names) // 2)))))

    def part(self, side: set[str]) -> None:
        """These regions and the others do not see each other."""
        names = sorted(self.world.regions)
        self.world.cut = {frozenset((a, b)) for a in side for b in names if b not in side}
        self.world.say(f"split: {', '.join(sorted(side))} from the rest")

    def elect(self, *, laggard: bool = False) -> None:
        """Those who cannot reach the latest primary promote one of their own, and follow it."""
        cut_off = [r for r in self.world.regions.values() if not self.world.reaches(r.name, self.latest)]
        able = [r for r in cut_off if r.server.alive and r.server.upstream is not None]
        if not able:
            return
        chosen = min(able, key=lambda r: len(r.server.data.log)) if laggard else self.rng.choice(able)
        self.lead(chosen, cut_off)

    def lead(self, chosen: Region, followers: list[Region]) -> None:
        """A server becomes a primary, and those of the others that reach it follow it."""
        chosen.server.become_primary(self.world.fresh())
        self.latest = chosen.name
        self.world.say(f"{chosen.name} is elected with {len(chosen.server.data.log)} entries")
        for region in followers:
            if region is not chosen and self.world.reaches(region.name, chosen.name):
                self.point(region, chosen)
            self.learn(region)

    def join(self) -> None:
        for pair in sorted(self.world.cut, key=sorted):
            if self.rng.random() < 0.5:
                self.world.cut.discard(pair)

    def crash_keeper(self) -> None:
        self.world.crash(self.somebody())

    def keeper_down_or_up(self) -> None:
        region = self.somebody()
        region.keeper_up = not region.keeper_up

    def lose_keeper(self) -> None:
        """A keeper loses its disk, or is put back from a copy: another keeper from then on."""
        if self.losses_left == 0 and not self.is_whole():
            return
        self.lose_keeper_of(self.somebody(), 0.7)

    def is_whole(self) -> bool:
        """Whether one more disk may be lost: all voters are there, merged, and hold everything acknowledged."""
        epoch = self.world.regions[self.latest].server.data.epoch
        if epoch is None or not epoch.open or len(self.world.protocol.voters(epoch)) < 3:
            return False
        key, disks = key_of(epoch), {r.disk.keeper_id: r.disk for r in self.world.regions.values()}
        owed = {acknowledged.entry.digest() for acknowledged in self.world.acknowledged}
        voters = [disks.get(keeper_id) for keeper_id in self.world.protocol.voters(epoch).values()]
        return all(
            disk is not None and disk.promise == key and disk.links[key].opened and owed <= disk.entries.keys()
            for disk in voters
        )

    def lose_keeper_of(self, region: Region, with_server: float) -> None:
        """With the probability `with_server` the host is gone, and its server's data too."""
        self.losses_left = 0
        self.mutant.lose(self.world, region)
        if self.rng.random() < with_server and region.server.upstream is not None:
            region.server.wipe(self.world.fresh())
        self.world.say(f"keeper {region.name} lost its disk; it is {region.disk.keeper_id} now")

    def change_voters(self) -> None:
        """An operator gives seats to the keepers that now run in all regions, or in three of them."""
        names = sorted(self.world.regions)
        seats = names if self.rng.random() < 0.6 else sorted(self.rng.sample(names, min(3, len(names))))
        self.seat(self.somebody(), seats)

    def seat(self, region: Region, seats: list[str]) -> None:
        """An operator in this region gives the seats to the keepers that now run in these regions."""
        server = self.world.primary_for(region)
        if server is None or server.data.epoch is None:
            return
        voters = {name: self.world.regions[name].disk.keeper_id for name in seats}
        try:
            seen = key_of(server.checked(key_of(server.data.epoch)))
        except Refused:
            return
        made = server.bump(
            seen, self.world.nonce(), above=0, voters=voters, now_ms=self.world.now_ms, region=region.name
        )
        self.world.say(f"an operator changes the voters on {server.region}: {_short(made)}, {', '.join(seats)}")
        if len(seats) < 3:  # two voters tolerate no loss
            self.losses_left = 0

    # -- liveness -------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Everything runs and reaches everything; one primary. Then progress is owed."""
        world = self.world
        world.say("everything heals")
        world.cut.clear()
        latest = world.regions[self.latest]
        for region in world.regions.values():
            if not region.server.alive:
                region.server.restart(world.fresh(), len(region.server.history) - 1)
            region.keeper_up, region.primary, region.seen = True, self.latest, None
            if region is not latest:
                self.point(region, latest)
        latest.server.upstream = None
        for count in range(1, HEAL_ROUNDS + 1):
            world.now_ms += 200
            for region in world.regions.values():
                self.full_turn(region)
            check_always(world)
            check_opened(world)
            if count % 5 == 0 and is_healed(world):
                break
        check_healed(world)

    def full_turn(self, region: Region) -> None:
        world = self.world
        world.replicate(region, fully=True)
        for step in (world.keep, world.open, world.beat, world.settle_receipts, world.look):
            step(region)


def run_schedule(seed: int, mutant: Mutant = HEALTHY, *, trace: bool = False) -> Outcome:
    """Run one seed to its end or to the first violation."""
    schedule = Schedule(seed, mutant)
    world = schedule.world
    world.trace = [] if trace else None
    violation = None
    try:
        schedule.run()
    except Violation as found:
        violation = found
        world.say(str(found))
    epochs = max(len(r.server.data.epoch.chain) if r.server.data.epoch else 0 for r in world.regions.values())
    lines = tuple(world.trace or ())
    return Outcome(seed, schedule.flavour, schedule.count, len(world.acknowledged), epochs, violation, lines)
