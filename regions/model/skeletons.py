"""Schedules whose course is given and whose timing and sides are drawn: faults that chance seldom brings together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from keyservice.core.evidence import majority
from regions.model import faults

if TYPE_CHECKING:
    from regions.model.schedule import Schedule

__all__ = ["SKELETONS"]

SLOW_MS = (400, 800, 1500)
"""A pace at which few rounds take longer than a verifier may be stale."""


def sides(schedule: Schedule) -> None:
    """A laggard; voters change without it; a split; each side goes on, the laggard's under a primary of its own."""
    rng, world = schedule.rng, schedule.world
    names = sorted(world.regions)
    laggard, *others = rng.sample([name for name in names if name != schedule.latest], len(names) - 1)
    side = {laggard, *others[: rng.randint(0, 2)]}
    if rng.random() < 0.5:  # the old voters but for the primary's
        side = set(schedule.voters) - {schedule.latest}
        laggard = rng.choice(sorted(side))
    schedule.rounds(rng.randint(4, 8))
    faults.part(schedule, rng.choice(({laggard}, side)))
    faults.seat(schedule, world.regions[schedule.latest], _seats(schedule, names))
    schedule.rounds(rng.randint(1, 6))
    faults.part(schedule, side)
    schedule.rounds(rng.randint(0, 4))
    if rng.random() < 0.6:
        _go_on(schedule)
        schedule.rounds(rng.randint(1, 6))
    faults.elect(schedule, laggard=rng.random() < 0.8)
    schedule.rounds(rng.randint(2, 8))
    schedule.rounds(rng.choice((0, 15)), SLOW_MS)
    schedule.live(rng.randint(0, 40), rng.choice((0.0, 0.05)))


def _seats(schedule: Schedule, names: list[str]) -> list[str]:
    """All regions, or three; the primary's mostly with those that sit nowhere yet."""
    if schedule.rng.random() < 0.4:
        return names
    if schedule.rng.random() < 0.6:
        return sorted({schedule.latest, *names[-2:]})
    return sorted(schedule.rng.sample(names, 3))


def _go_on(schedule: Schedule) -> None:
    """Another epoch on the primary's side: it restarts, is replaced, or its voters change once more."""
    rng, world = schedule.rng, schedule.world
    primary = world.regions[schedule.latest]
    side = [region for region in world.regions.values() if world.reaches(region.name, primary.name)]
    chance = rng.random()
    if chance < 0.4:
        primary.server.restart(world.fresh(), len(primary.server.history) - 1)
        world.say(f"{primary.name} restarts")
    elif chance < 0.7:
        faults.lead(schedule, rng.choice(side), side)
    else:
        faults.seat(schedule, primary, sorted(region.name for region in side))


def restored(schedule: Schedule) -> None:
    """A laggard; then the primary is out of reach, a keeper loses its disk or gets an old copy, the laggard leads."""
    rng, world = schedule.rng, schedule.world
    names = [name for name in sorted(world.regions) if name != schedule.latest]
    victim, *laggards = rng.sample(names, len(names) // 2 + 1)
    schedule.rounds(rng.randint(2, 5))
    faults.take_copy(schedule, world.regions[victim])
    faults.part(schedule, set(laggards))
    schedule.rounds(rng.randint(3, 6))
    schedule.live(rng.randint(0, 30))
    faults.part(schedule, {victim, *laggards})
    faults.lose(schedule, world.regions[victim], 0.9)
    schedule.live(rng.randint(0, 15))
    faults.elect(schedule, laggard=rng.random() < 0.8)
    schedule.rounds(rng.randint(3, 6))
    schedule.live(rng.randint(0, 40), rng.choice((0.0, 0.05)))


def resynced(schedule: Schedule) -> None:
    """A laggard leads, and a replica that was further takes over its history between two reads of its keeper."""
    rng, world = schedule.rng, schedule.world
    names = [name for name in sorted(world.regions) if name != schedule.latest]
    victim, *laggards = rng.sample(names, len(names) // 2 + 1)
    schedule.rounds(rng.randint(3, 5))
    faults.part(schedule, set(laggards))
    for _ in range(rng.randint(1, 4)):
        world.write(world.regions[rng.choice((schedule.latest, victim))])
    schedule.rounds(rng.randint(2, 5))
    faults.part(schedule, {victim, *laggards})
    faults.elect(schedule, laggard=True)
    for _ in range(rng.randint(1, 4)):
        world.now_ms += 60
        world.beat(world.regions[schedule.latest])
        world.replicate(world.regions[victim], fully=True)
        world.keep(world.regions[victim], torn=0.8)
        world.keep(world.regions[victim], torn=0.8)
    schedule.rounds(rng.randint(2, 6))


def strays(schedule: Schedule) -> None:
    """A primary that was replaced goes on, and a replica comes back to it, or goes to and fro."""
    rng, world = schedule.rng, schedule.world
    old = schedule.latest
    names = sorted(world.regions)
    schedule.rounds(rng.randint(2, 5))
    side = rng.sample([name for name in names if name != old], len(names) // 2 + 1)
    faults.part(schedule, set(side))
    faults.elect(schedule)
    schedule.rounds(rng.randint(2, 6))
    world.cut.clear()
    for _ in range(rng.randint(1, 3)):
        faults.stray_to(
            schedule, world.regions[rng.choice(side)], world.regions[rng.choice((old, old, schedule.latest))]
        )
        schedule.rounds(rng.randint(1, 5))
        schedule.live(rng.randint(0, 20), rng.choice((0.0, 0.05)))


def replaced(schedule: Schedule) -> None:
    """One disk after the other is lost, and its keeper replaced; another server leads in between."""
    rng, world = schedule.rng, schedule.world
    for _ in range(3):
        schedule.rounds(rng.randint(2, 5))
        faults.lose_disk(schedule)
        if rng.random() < 0.6:
            faults.split(schedule)
            faults.elect(schedule, laggard=rng.random() < 0.5)
            schedule.rounds(rng.randint(0, 4))
        faults.seat(schedule, world.regions[schedule.latest], sorted(world.regions))
        schedule.rounds(rng.randint(1, 4))
        world.cut.clear()
        _follow(schedule)


def _follow(schedule: Schedule) -> None:
    """Most of those that can see the latest primary follow it."""
    for region in schedule.world.regions.values():
        if region.name != schedule.latest and schedule.rng.random() < 0.8:
            faults.point(region, schedule.world.regions[schedule.latest])
            schedule.learn(region)


def reverted(schedule: Schedule) -> None:
    """New voters; a laggard that has never heard of them leads, and begins several epochs before a keeper looks."""
    rng, world = schedule.rng, schedule.world
    names = sorted(world.regions)
    laggard = rng.choice([name for name in names if name != schedule.latest])
    schedule.rounds(rng.randint(2, 5))
    faults.part(schedule, {laggard})
    faults.seat(schedule, world.regions[schedule.latest], _seats(schedule, names))
    schedule.rounds(rng.randint(3, 8))
    chosen = world.regions[laggard]
    faults.lead(schedule, chosen, [chosen])
    for _ in range(rng.randint(1, 3)):
        world.beat(chosen)
        chosen.server.restart(world.fresh(), len(chosen.server.history) - 1)
        world.say(f"{laggard}'s server restarts")
    world.cut.clear()
    _follow(schedule)
    schedule.rounds(rng.randint(0, 5))


def thin(schedule: Schedule) -> None:
    """Voters change between a burst of revocations and the death of the primary that has just collected them."""
    rng, world = schedule.rng, schedule.world
    names = sorted(world.regions)
    schedule.rounds(rng.randint(2, 4))
    for _ in range(rng.randint(3, 8)):
        world.write(schedule.somebody())
    schedule.rounds(rng.randint(1, 3))
    dead = schedule.latest
    if rng.random() < 0.7:
        faults.part(schedule, {dead})
        faults.elect(schedule, laggard=rng.random() < 0.7)
        schedule.rounds(rng.randint(0, 1))
        world.cut.clear()
    faults.seat(schedule, world.regions[schedule.latest], sorted(rng.sample(names, rng.choice((3, 3, 5)))))
    schedule.rounds(rng.randint(1, 4), (20, 60))
    _burn(schedule, schedule.latest)
    schedule.rounds(rng.randint(2, 6))
    schedule.live(rng.randint(0, 30), rng.choice((0.0, 0.05)))


def carried(schedule: Schedule) -> None:
    """What was acknowledged comes over into an epoch with other voters by one keeper, and its server dies at once."""
    rng, world = schedule.rng, schedule.world
    home = world.regions[schedule.latest]
    names = [name for name in sorted(world.regions) if name != home.name]
    away = rng.choice([name for name in schedule.voters if name != home.name])
    schedule.rounds(rng.randint(4, 6))
    older = len(home.server.history) - 1
    faults.part(schedule, set(names) - {away})
    for _ in range(rng.randint(2, 5)):
        world.write(home)
    schedule.rounds(rng.randint(3, 5))
    faults.part(schedule, {away})
    home.server.restart(world.fresh(), older)
    world.say(f"{home.name}'s server restarts from old state")
    world.beat(home)
    faults.seat(schedule, home, [name for name in names if name != away])
    others = [world.regions[name] for name in names if name != away]
    for _ in range(rng.randint(2, 4)):
        world.now_ms += 100
        for region in others:
            world.replicate(region, fully=True)
            if rng.random() < 0.8:
                world.keep(region)
    for _ in range(rng.randint(3, 12)):
        world.now_ms += 20
        world.keep(home)
        world.open(home)
    for region in others:
        if rng.random() < 0.4:
            world.replicate(region, fully=True)
            world.keep(region, torn=0.7)
    _burn(schedule, home.name)
    world.cut.clear()
    faults.point(home, world.regions[schedule.latest])
    schedule.learn(home)
    schedule.rounds(rng.randint(4, 8))


def _burn(schedule: Schedule, name: str) -> None:
    """A primary's server is gone with all it holds, and another one leads."""
    rng, world = schedule.rng, schedule.world
    faults.part(schedule, {name})
    faults.elect(schedule, laggard=rng.random() < 0.8)
    faults.wipe_server(schedule, world.regions[name])
    if rng.random() < 0.7:
        world.cut.clear()


def disaster(schedule: Schedule) -> None:
    """Disks are lost, mostly more than P2 allows for, and an operator says so. What a voter still holds is owed."""
    rng, world = schedule.rng, schedule.world
    schedule.rounds(rng.randint(3, 8))
    seats = sorted(schedule.voters)
    spare = len(seats) - majority(dict.fromkeys(seats, ""))
    behind = set(rng.sample([name for name in seats if name != schedule.latest], spare))
    if rng.random() < 0.7:
        faults.part(schedule, behind)
        for _ in range(rng.randint(1, 4)):
            world.write(world.regions[schedule.latest])
        schedule.rounds(rng.randint(2, 4))
    base = world.budget.base(world.disks())
    if base is None:
        return
    dead = rng.sample(seats, rng.randint(1, max(len(seats) - 1, 1)))
    if rng.random() < 0.5:
        dead = rng.sample([name for name in seats if name not in behind], spare)
    with_servers = rng.random() < 0.7
    for name in dead:
        faults.take_disk(schedule, world.regions[name])
        if with_servers:
            faults.wipe_server(schedule, world.regions[name])
    world.forgive(base)
    if rng.random() < 0.7:
        faults.part(schedule, behind if rng.random() < 0.7 else set(rng.sample(seats, max(spare, 1))))
        faults.elect(schedule, laggard=rng.random() < 0.7)
        schedule.rounds(rng.randint(0, 4))
        world.cut.clear()
        _follow(schedule)
    faults.forget(schedule, world.regions[schedule.latest], replace=rng.random() < 0.5)
    if rng.random() < 0.5:  # those that hold it are out of reach
        faults.part(schedule, set(seats) - behind - set(dead) - {schedule.latest})
    schedule.rounds(rng.randint(0, 5))
    faults.seat(schedule, world.regions[schedule.latest], sorted(world.regions))
    schedule.rounds(rng.randint(2, 6))


SKELETONS: dict[str, Callable[[Schedule], None]] = {
    "sides": sides,
    "restored": restored,
    "resynced": resynced,
    "strays": strays,
    "replaced": replaced,
    "reverted": reverted,
    "thin": thin,
    "carried": carried,
    "disaster": disaster,
}
"""By flavour."""
