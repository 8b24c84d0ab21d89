"""Schedules whose course is given and whose timing and sides are drawn: faults that chance seldom brings together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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
    schedule.part(rng.choice(({laggard}, side)))
    schedule.seat(world.regions[schedule.latest], _seats(schedule, names))
    schedule.rounds(rng.randint(1, 6))
    schedule.part(side)
    schedule.rounds(rng.randint(0, 4))
    if rng.random() < 0.6:
        _go_on(schedule)
        schedule.rounds(rng.randint(1, 6))
    schedule.elect(laggard=rng.random() < 0.8)
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
        schedule.lead(rng.choice(side), side)
    else:
        schedule.seat(primary, sorted(region.name for region in side))


def restored(schedule: Schedule) -> None:
    """A laggard; then the primary is out of reach, a keeper loses its disk or gets an old copy, the laggard leads."""
    rng, world = schedule.rng, schedule.world
    names = [name for name in sorted(world.regions) if name != schedule.latest]
    victim, *laggards = rng.sample(names, len(names) // 2 + 1)
    schedule.rounds(rng.randint(2, 5))
    schedule.part(set(laggards))
    schedule.rounds(rng.randint(3, 6))
    schedule.live(rng.randint(0, 30))
    schedule.part({victim, *laggards})
    schedule.lose_keeper_of(world.regions[victim], 0.9)
    schedule.live(rng.randint(0, 15))
    schedule.elect(laggard=rng.random() < 0.8)
    schedule.rounds(rng.randint(3, 6))
    schedule.live(rng.randint(0, 40), rng.choice((0.0, 0.05)))


def strays(schedule: Schedule) -> None:
    """A primary that was replaced goes on, and a replica comes back to it, or goes to and fro."""
    rng, world = schedule.rng, schedule.world
    old = schedule.latest
    names = sorted(world.regions)
    schedule.rounds(rng.randint(2, 5))
    side = rng.sample([name for name in names if name != old], len(names) // 2 + 1)
    schedule.part(set(side))
    schedule.elect()
    schedule.rounds(rng.randint(2, 6))
    world.cut.clear()
    for _ in range(rng.randint(1, 3)):
        schedule.stray_to(world.regions[rng.choice(side)], world.regions[rng.choice((old, old, schedule.latest))])
        schedule.rounds(rng.randint(1, 5))
        schedule.live(rng.randint(0, 20), rng.choice((0.0, 0.05)))


def replaced(schedule: Schedule) -> None:
    """One disk after the other is lost, and its keeper replaced; another server leads in between."""
    rng, world = schedule.rng, schedule.world
    for _ in range(3):
        schedule.rounds(rng.randint(2, 5))
        schedule.lose_keeper()
        if rng.random() < 0.6:
            schedule.split()
            schedule.elect(laggard=rng.random() < 0.5)
            schedule.rounds(rng.randint(0, 4))
        schedule.seat(world.regions[schedule.latest], sorted(world.regions))
        schedule.rounds(rng.randint(1, 4))
        world.cut.clear()
        for region in world.regions.values():
            if region.name != schedule.latest and rng.random() < 0.8:
                schedule.point(region, world.regions[schedule.latest])
                schedule.learn(region)


SKELETONS: dict[str, Callable[[Schedule], None]] = {
    "sides": sides,
    "restored": restored,
    "strays": strays,
    "replaced": replaced,
}
"""By flavour."""
