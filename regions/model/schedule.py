"""One seed, one schedule: faults at random (safety), then healing and a demand for progress (liveness).

What P2 promises where disks are lost is the rule of :mod:`regions.model.budget`; schedules lose a disk whenever that
allows one more to go, and never else. Servers are promoted, restarted from old state, wiped and emptied without any
limit, because truth is what keepers hold. An operator deletes single entries from a log only where the newest open
epoch carries them: an entry that has just come over from an older epoch has only its log to bring it to the others.

The flavour ``disaster`` is beyond the promise: more disks are lost than that, and an operator says so (``forget``).
Then only what a voter that is left still holds is owed, and progress as always.

P3 is held against ``max_staleness_s`` and the larger of ``max_skew_s`` and how far the clock of any primary was ever
ahead of the verifier's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from regions.model import faults
from regions.model.checkers import (
    BOUND_S,
    EPOCHS_MAX,
    Violation,
    check_always,
    check_healed,
    check_opened,
    check_quiet,
    is_healed,
)
from regions.model.mutants import HEALTHY, Mutant
from regions.model.parts import Region
from regions.model.skeletons import SKELETONS
from regions.model.world import World

__all__ = ["FLAVOURS", "Outcome", "Schedule", "run_schedule"]

STEPS = 200
TORN = 0.3
"""How often a round is no single moment's."""

LATE = 0.2
"""How often a keeper's step is not carried out at once."""

DIES = 0.01
"""How often a keeper dies while it stores what it read."""

FLAVOURS = ["mixed", "members", "growth", "disks", "flapping", "operators", *SKELETONS]
HEAL_ROUNDS = 60
QUIET_ROUNDS = 5
SET_MS = 1_000
"""How far clocks are off after healing: the difference counts as staleness."""
SOME = [1, 3, 3, 3, 4, 5]
NAMES = ["a", "b", "c", "d", "e"]
GROWING = ("growth", "sides", "reverted", "thin", "carried")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a schedule came to: `violation` is None if everything held."""

    seed: int
    flavour: str
    regions: int
    acknowledged: int
    epochs: int
    violation: Violation | None
    healing_epochs: int = 0
    losses: int = 0
    trace: tuple[str, ...] = field(default=(), repr=False)


class Schedule:
    """Draws what happens next. All chance comes from one generator, so a seed is a schedule."""

    def __init__(self, seed: int, mutant: Mutant) -> None:
        self.rng = random.Random(seed)
        self.flavour = self.rng.choice(FLAVOURS)
        grows = self.flavour in GROWING
        few = [3, 4, 5, 5] if self.flavour == "disaster" else [3, 3, 3, 5] if self.flavour in SKELETONS else SOME
        self.count = 5 if grows else self.rng.choice(few)
        names = NAMES[: self.count]
        self.voters = names[:3] if grows else names
        self.world = World(names, self.voters, mutant.parts, self.rng)
        self.harshness = self.rng.choice([0.03, 0.08, 0.15])
        self.latest = names[0]
        self.losses = 0
        self.healing_epochs = 0
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
            self.rounds(self.rng.randint(2, 6))
            self.live(STEPS, self.harshness)
        else:
            skeleton(self)
        self.heal()

    def live(self, steps: int, harshness: float = 0.0) -> None:
        """So many steps of somebody, each a fault with the probability `harshness`."""
        world = self.world
        kinds = faults.of_flavour(self.flavour) if harshness else []
        for _ in range(steps):
            world.now_ms += self.rng.choice((5, 20, 60, 150, 400))
            if self.rng.random() < harshness:
                self.rng.choice(kinds)(self)
            else:
                self.rng.choices(self.everyday, self.weights)[0](self.somebody())
                self.check()

    def check(self) -> None:
        """What must hold all the time."""
        check_always(self.world)
        check_opened(self.world)

    def somebody(self) -> Region:
        """Any region."""
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
            self.check()

    weights = (7, 3, 9, 7, 4, 4, 4, 1)

    def look(self, region: Region) -> None:
        """A round of its verifier."""
        self.world.look(region, torn=TORN)

    def keep(self, region: Region) -> None:
        """A turn of its keeper."""
        self.world.keep(region, late=LATE, torn=TORN, dies=DIES)
        if self.rng.random() < 0.1:
            faults.take_copy(self, region)

    def learn(self, region: Region) -> None:
        """A region hears of the latest promotion, if it can reach that server."""
        if self.world.reaches(region.name, self.latest):
            region.primary, region.seen = self.latest, None

    # -- liveness -------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Everything runs and reaches everything; one primary. Then progress is owed."""
        world = self.world
        world.say_state(BOUND_S)
        world.say("everything heals")
        world.cut.clear()
        latest = world.regions[self.latest]
        for region in world.regions.values():
            if not region.server.alive:
                region.server.restart(world.fresh(), len(region.server.history) - 1)
            region.keeper_up, region.primary, region.seen = True, self.latest, None
            faults.set_clock(self, region, self.rng.randint(-SET_MS, SET_MS), self.rng.randint(-SET_MS, SET_MS))
            if region is not latest:
                faults.point(region, latest)
        latest.server.upstream = None
        begun = len(world.budget.begun)
        for count in range(1, HEAL_ROUNDS + 1):
            self.full_round()
            if self.flavour == "disaster" and count % 10 == 0:
                faults.forget(self, latest, replace=True)
            if count % 3 == 0 and is_healed(world, latest.server):
                break
        check_healed(world, latest.server)
        self.healing_epochs = len(world.budget.begun) - begun
        if self.healing_epochs > EPOCHS_MAX and self.flavour != "disaster":
            raise Violation("no progress", f"{self.healing_epochs} epochs began while everything healed")
        begun = len(world.budget.begun)
        for _ in range(QUIET_ROUNDS):
            self.full_round()
        check_quiet(world, latest.server, begun)

    def full_round(self) -> None:
        """200 ms in which everybody does everything, in any order."""
        world = self.world
        world.now_ms += 200
        regions = list(world.regions.values())
        self.rng.shuffle(regions)
        for region in regions:
            world.replicate(region, fully=True)
            for step in (world.keep, world.open, world.beat, world.settle_receipts, world.look):
                step(region)
        self.check()


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
        world.say_state(BOUND_S)
        world.say(found)
    return Outcome(
        seed=seed,
        flavour=schedule.flavour,
        regions=schedule.count,
        acknowledged=len(world.acknowledged),
        epochs=len(world.budget.begun),
        violation=violation,
        healing_epochs=schedule.healing_epochs,
        losses=schedule.losses,
        trace=tuple(world.trace or ()),
    )
