"""What may go wrong, each as a function of the schedule that draws it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from keyservice.core.evidence import key_of
from regions.model.parts import Region
from regions.model.server import NewEpoch, Refused
from regions.model.world import SKEW_MS, short

if TYPE_CHECKING:
    from regions.model.schedule import Schedule

__all__ = [
    "elect",
    "forget",
    "lead",
    "lose",
    "lose_disk",
    "of_flavour",
    "part",
    "point",
    "seat",
    "set_clock",
    "stray_to",
]

Fault = Callable[["Schedule"], None]

# -- servers ----------------------------------------------------------------------------------------------------------


def promote(schedule: Schedule) -> None:
    """The failover engine makes any server a primary, however far behind; the old one may not notice."""
    region, world = schedule.somebody(), schedule.world
    if region.server.upstream is None or not region.server.alive:
        return
    region.server.become_primary(world.fresh())
    schedule.latest = region.name
    world.say(region.name, "is promoted with", len(region.server.data.log), "entries")
    for other in world.regions.values():
        if schedule.rng.random() < 0.6:
            schedule.learn(other)
            if schedule.rng.random() < 0.7 and other is not region:
                point(other, region)


def point(region: Region, primary: Region) -> None:
    """A server becomes a replica, and loses what its new primary does not have."""
    region.server.upstream, region.server.followed = primary.server, None


def demote(schedule: Schedule) -> None:
    """A server hears of the latest promotion."""
    region, latest = schedule.somebody(), schedule.world.regions[schedule.latest]
    if region is not latest and schedule.world.reaches(region.name, schedule.latest):
        point(region, latest)
        schedule.world.say(region.name, "follows", schedule.latest)


def stray(schedule: Schedule) -> None:
    """A replica follows another primary than the latest, and its region takes that one for the primary."""
    stray_to(schedule, schedule.somebody(), schedule.somebody())


def stray_to(schedule: Schedule, region: Region, other: Region) -> None:
    """This replica follows that primary."""
    strays = other.server.upstream is None and region.server.upstream is not None
    if region is not other and strays and schedule.world.reaches(region.name, other.name):
        point(region, other)
        region.primary, region.seen = other.name, None
        schedule.world.say(region.name, "strays to", other.name)


def restart(schedule: Schedule) -> None:
    """A server comes back from its disk, which may be old."""
    region, rng = schedule.somebody(), schedule.rng
    newest = len(region.server.history) - 1
    version = newest if rng.random() < 0.5 else rng.randint(max(0, newest - 12), newest)
    region.server.restart(schedule.world.fresh(), version)
    schedule.world.say(f"{region.name}'s server restarts,", newest - version, "writes behind")


def wipe(schedule: Schedule) -> None:
    """A server comes back with nothing."""
    if schedule.rng.random() < 0.3:
        wipe_server(schedule, schedule.somebody())


def wipe_server(schedule: Schedule, region: Region) -> None:
    """This one comes back with nothing."""
    region.server.wipe(schedule.world.fresh())
    schedule.world.say(f"{region.name}'s server is wiped")


def flush(schedule: Schedule) -> None:
    """An operator empties a primary, and with it its replicas."""
    region = schedule.somebody()
    if region.server.upstream is None and region.server.alive:
        region.server.flush()
        schedule.world.say("an operator empties", f"{region.name}'s server")


def delete(schedule: Schedule) -> None:
    """An operator deletes an entry from a primary's log: a hole, unless it was the last one."""
    region, world = schedule.somebody(), schedule.world
    server, disks = region.server, world.disks()
    if server.upstream is not None or not server.alive or not world.budget.opened:
        return
    able = [
        position
        for position, entry in server.data.log[1:]
        if entry.digest() not in world.budget.owed or world.budget.is_carried(entry, disks)
    ]
    if able:
        position = schedule.rng.choice(able)
        server.delete(position)
        world.say(
            "an operator deletes", f"{position.epoch - server.data.log[0][0].epoch}-{position.seq} on {region.name}"
        )


def stop_server(schedule: Schedule) -> None:
    """A server is gone until it restarts."""
    region = schedule.somebody()
    region.server.alive = False
    schedule.world.say(f"{region.name}'s server stops")


def step_clock(schedule: Schedule) -> None:
    """A region's clocks are set, mostly within bounds."""
    rng = schedule.rng
    far = rng.choice((0, 0, 0, 8_000, 30_000, 3_600_000)) * rng.choice((-1, 1))
    server, wall = rng.randint(-SKEW_MS, SKEW_MS), rng.randint(-SKEW_MS, SKEW_MS)
    both = rng.random()
    set_clock(schedule, schedule.somebody(), server + (far if both < 0.6 else 0), wall + (far if both > 0.4 else 0))


def set_clock(schedule: Schedule, region: Region, server_ms: int, wall_ms: int) -> None:
    """The clocks of its server and of its verifier are this far ahead of the true time."""
    region.server.clock_offset_ms, region.verifier.wall_offset_ms = server_ms, wall_ms
    region.wall_ms_min = min(region.wall_ms_min, wall_ms)
    schedule.world.server_ms_max = max(schedule.world.server_ms_max, server_ms)
    schedule.world.say(f"{region.name}'s clocks: server", server_ms, "ms, verifier", wall_ms, "ms")


# -- connections ------------------------------------------------------------------------------------------------------


def cut_off(schedule: Schedule) -> None:
    """A region sees nobody, or few."""
    region = schedule.somebody()
    for other in schedule.world.regions:
        if other != region.name and schedule.rng.random() < 0.8:
            schedule.world.cut.add(frozenset((region.name, other)))
    schedule.world.say(region.name, "is cut off")


def split(schedule: Schedule) -> None:
    """Two sides that do not see each other."""
    names = sorted(schedule.world.regions)
    part(schedule, set(schedule.rng.sample(names, schedule.rng.randint(1, max(1, len(names) // 2)))))


def part(schedule: Schedule, side: set[str]) -> None:
    """These regions and the others do not see each other."""
    names = sorted(schedule.world.regions)
    schedule.world.cut = {frozenset((a, b)) for a in side for b in names if b not in side}
    schedule.world.say("split:", ", ".join(sorted(side)), "from the rest")


def elect(schedule: Schedule, *, laggard: bool = False) -> None:
    """Those who cannot reach the latest primary promote one of their own, and follow it."""
    cut_off = [r for r in schedule.world.regions.values() if not schedule.world.reaches(r.name, schedule.latest)]
    able = [r for r in cut_off if r.server.alive and r.server.upstream is not None]
    if not able:
        return
    chosen = min(able, key=lambda r: len(r.server.data.log)) if laggard else schedule.rng.choice(able)
    lead(schedule, chosen, cut_off)


def lead(schedule: Schedule, chosen: Region, followers: list[Region]) -> None:
    """A server becomes a primary, and those of the others that reach it follow it."""
    chosen.server.become_primary(schedule.world.fresh())
    schedule.latest = chosen.name
    schedule.world.say(chosen.name, "is elected with", len(chosen.server.data.log), "entries")
    for region in followers:
        if region is not chosen and schedule.world.reaches(region.name, chosen.name):
            point(region, chosen)
        schedule.learn(region)


def join(schedule: Schedule) -> None:
    """Some of the links come back."""
    for pair in sorted(schedule.world.cut, key=sorted):
        if schedule.rng.random() < 0.5:
            schedule.world.cut.discard(pair)


def calm(schedule: Schedule) -> None:
    """Somebody repairs what is broken, and for a while all goes well: there is something to lose again."""
    world = schedule.world
    world.cut.clear()
    latest = world.regions[schedule.latest]
    latest.server.upstream = None
    for region in world.regions.values():
        region.keeper_up = True
        if not region.server.alive:
            region.server.restart(world.fresh(), len(region.server.history) - 1)
        if region is not latest:
            point(region, latest)
        schedule.learn(region)
    world.say("repairs")
    schedule.rounds(schedule.rng.randint(2, 6))


# -- keepers and verifiers ---------------------------------------------------------------------------------------------


def crash_keeper(schedule: Schedule) -> None:
    """A keeper's process dies and starts again."""
    schedule.world.crash(schedule.somebody())


def keeper_down_or_up(schedule: Schedule) -> None:
    """A keeper stops, or comes back."""
    region = schedule.somebody()
    region.keeper_up = not region.keeper_up
    schedule.world.say("keeper", region.name, "comes back" if region.keeper_up else "stops")


def restart_verifier(schedule: Schedule) -> None:
    """A verifier starts over."""
    schedule.world.restart_verifier(schedule.somebody())


def lose_disk(schedule: Schedule) -> None:
    """A keeper loses its disk, or gets an older copy of it, if P2 allows for one more."""
    lose(schedule, schedule.somebody(), 0.7)


def lose(schedule: Schedule, region: Region, with_server: float) -> None:
    """With the probability `with_server` the host is gone, and its server's data too."""
    world, rng = schedule.world, schedule.rng
    if not world.budget.may_lose(region.disk.keeper_id, world.disks()):
        return
    schedule.losses += 1
    if not (rng.random() < 0.6 and _put_back(schedule, region)):
        take_disk(schedule, region)
        if rng.random() < with_server and region.server.upstream is not None:
            wipe_server(schedule, region)


def take_disk(schedule: Schedule, region: Region) -> None:
    """A disk is gone: another keeper starts on an empty one."""
    old = region.disk.keeper_id
    schedule.world.put_disk(region, schedule.world.parts.disk(f"keeper-{region.name}-{schedule.world.fresh()}"))
    region.copies.clear()
    schedule.world.say("keeper", region.name, "loses its disk:", old, "is", region.disk.keeper_id, "now")


def take_copy(schedule: Schedule, region: Region) -> None:
    """A copy of a keeper's disk, which may be put back one day."""
    region.copies.append(schedule.world.copy_of(region.disk, region.disk.keeper_id))


def _put_back(schedule: Schedule, region: Region) -> bool:
    """An older copy takes a disk's place: told so it takes a new id, else it finds out from what it had reported."""
    world = schedule.world
    older = [copy for copy in region.copies if copy.keeper_id == region.disk.keeper_id]
    if not older:
        return False
    copy = schedule.rng.choice(older)
    report = region.server.data.reports.get(region.name)
    shows = region.server.alive and report is not None and report.keeper_id == copy.keeper_id
    told = not (shows and report is not None and report.commit > copy.commit) or schedule.rng.random() < 0.3
    keeper_id = f"keeper-{region.name}-{world.fresh()}" if told else copy.keeper_id
    world.say("keeper", region.name, "is put back from a copy,", "told so" if told else "in silence")
    put_back = world.copy_of(copy, keeper_id)
    put_back.promise = copy.promise
    world.put_disk(region, put_back)
    region.copies.clear()
    if not told:
        world.identify(region)  # before anything else, with its own server in reach
    return True


# -- operators --------------------------------------------------------------------------------------------------------


def change_voters(schedule: Schedule) -> None:
    """An operator gives seats to the keepers that now run in all regions, or in some of them."""
    names, rng = sorted(schedule.world.regions), schedule.rng
    some = sorted(rng.sample(names, min(rng.choice((1, 2, 3, 3, 3)), len(names))))
    seat(schedule, schedule.somebody(), names if rng.random() < 0.6 else some)


def seat(schedule: Schedule, region: Region, seats: list[str]) -> None:
    """An operator in this region gives the seats to the keepers that now run in these regions."""
    voters = {name: schedule.world.regions[name].disk.keeper_id for name in seats}
    _choose(schedule, region, NewEpoch(voters), f"gives seats to {', '.join(seats)}")


def forget(schedule: Schedule, region: Region, *, replace: bool = False) -> None:
    """An operator in this region gives up all keepers with a seat whose disk is gone, and may replace them at once."""
    server = schedule.world.primary_for(region)
    epoch = None if server is None else server.data.epoch
    if epoch is None:
        return
    left = schedule.world.disks()
    seats = {keeper_id for link in (*epoch.chain, *epoch.known) for keeper_id in link.voters.values() if keeper_id}
    gone = seats - left.keys()
    voters = {name: "" if keeper_id in gone else keeper_id for name, keeper_id in epoch.chain[-1].voters.items()}
    if replace:
        voters = {name: schedule.world.regions[name].disk.keeper_id for name in voters}
    new = NewEpoch(voters, forgotten=tuple(sorted(gone)))
    _choose(schedule, region, new, f"forgets {', '.join(sorted(gone)) or 'nobody'}")


def _choose(schedule: Schedule, region: Region, new: NewEpoch, what: str) -> None:
    world, server = schedule.world, schedule.world.primary_for(region)
    if server is None or server.data.epoch is None:
        return
    try:
        seen = key_of(server.checked(key_of(server.data.epoch)))
    except Refused:
        return
    made = world.begin(region.name, server, seen, new)
    if made is not None:
        world.chosen[made] = dict(new.voters)
    world.say("an operator", f"{what}:", short(made), "on", server.region)


# -- how often --------------------------------------------------------------------------------------------------------

COMMON: list[Fault] = [
    calm,
    calm,
    calm,
    calm,
    promote,
    promote,
    demote,
    demote,
    stray,
    restart,
    wipe,
    stop_server,
    cut_off,
    split,
    join,
    join,
    crash_keeper,
    keeper_down_or_up,
    lose_disk,
    change_voters,
    restart_verifier,
    step_clock,
    delete,
]

MORE: dict[str, list[Fault]] = {
    "members": [*[change_voters] * 8, *[promote] * 3],
    "growth": [*[change_voters] * 4, *[promote] * 3, *[split] * 6, *[elect] * 6],
    "disks": [*[calm] * 6, *[lose_disk] * 8, *[change_voters] * 4, *[split] * 4, *[elect] * 5],
    "flapping": [*[promote] * 5, *[stray] * 8, *[demote] * 3],
    "operators": [*[delete] * 8, *[flush] * 2, *[restart_verifier] * 4, *[step_clock] * 6],
}


def of_flavour(flavour: str) -> list[Fault]:
    """What may go wrong, as often as it is named; the flavour names one kind more often."""
    return COMMON + MORE.get(flavour, [])
