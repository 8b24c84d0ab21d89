"""What must hold, each as an object of its own that can fail."""

from __future__ import annotations

from regions.model.parts import Region
from regions.model.server import Server
from regions.model.tails import MAX_SKEW_S
from regions.model.world import World

__all__ = [
    "BOUND_S",
    "EPOCHS_MAX",
    "Violation",
    "check_always",
    "check_healed",
    "check_opened",
    "check_quiet",
    "is_healed",
]

BOUND_S = 5.0
"""`max_staleness_s` of every verifier in the model."""

EPOCHS_MAX = 12
"""Epochs that may begin while everything heals: about two for each keeper that comes with news."""


class Violation(Exception):
    """A promise is broken. `promise` is the promise's name, the message says how."""

    def __init__(self, promise: str, message: str) -> None:
        self.promise = promise
        super().__init__(f"{promise}: {message}")


def check_always(world: World) -> None:
    """P3: a verifier that calls itself fresh enforces what was acknowledged longer ago than the bound and the skew."""
    for region in world.regions.values():
        verifier, horizon_ms = region.verifier, world.now_ms - BOUND_S * 1000 - _skew_ms(world, region)
        for acknowledged in world.acknowledged[verifier.enforced :]:
            if acknowledged.at_ms > horizon_ms:
                break
            if verifier.enforces(acknowledged.entry):
                verifier.enforced += 1  # and so it does for ever
            elif verifier.is_fresh(world.now_ms, BOUND_S):
                raise Violation("fresh and fooled", f"{region.name} is fresh without {acknowledged.entry.value}")
            else:
                break


def _skew_ms(world: World, region: Region) -> float:
    return max(MAX_SKEW_S * 1000, world.server_ms_max - region.wall_ms_min)


def check_opened(world: World) -> None:
    """P2: a log in an open epoch of the current primary holds everything acknowledged before it opened."""
    for region in world.regions.values():
        server = region.server
        epoch = server.data.epoch
        if server.upstream is not None or epoch is None or not epoch.open or not server.same_server(epoch):
            continue
        promised = max((r.disk.promise for r in world.regions.values() if r.disk.promise), default=None)
        if promised is not None and promised > (epoch.number, epoch.nonce):
            continue
        looked_at = (server.data.log, len(world.acknowledged))
        if server.looked_at[0] is looked_at[0] and server.looked_at[1] == looked_at[1]:
            continue
        server.looked_at = looked_at
        held = {entry.value for _, entry in server.data.log}
        for acknowledged in world.acknowledged:
            if acknowledged.entry.value not in held | server.deleted:
                raise Violation("acknowledged and lost", f"{server.region} opened without {acknowledged.entry.value}")


def check_healed(world: World, primary: Server) -> None:
    """After healing: an open epoch, everybody fresh, everything that is stored in the log, on every disk and enforced
    everywhere, none of it pending, and the voters that were chosen last.

    What was pending and was stored only by a keeper that lost its disk is gone: it was never acknowledged.
    """
    disks = world.disks().values()
    stored = {entry.value: entry for disk in disks for entry in disk.entries.values() if entry.kind == "jti"}
    owed = stored | {acknowledged.entry.value: acknowledged.entry for acknowledged in world.acknowledged}
    epoch = primary.data.epoch
    if epoch is None or not epoch.open:
        raise Violation("no progress", "no epoch has opened after healing")
    logged = {entry.value for _, entry in primary.data.log}
    for region in world.regions.values():
        missing = [e.value for e in owed.values() if not region.verifier.enforces(e) or e.value not in logged]
        missing += [
            e.value for digest, e in ((e.digest(), e) for e in owed.values()) if digest not in region.disk.entries
        ]
        if missing:
            lost = [a.entry.value for a in world.acknowledged if a.entry.value in missing]
            name = "acknowledged and lost" if lost else "no progress"
            raise Violation(name, f"{region.name} lacks {(lost or missing)[:3]} after healing")
        if not region.verifier.is_fresh(world.now_ms, BOUND_S):
            raise Violation("no progress", f"{region.name} is not fresh after healing")
    pending = [entry.value for region in world.regions.values() for entry in region.pending if entry.value in stored]
    if pending:
        raise Violation("no progress", f"still pending after healing: {pending[:3]}")


def check_voters(world: World, primary: Server) -> None:
    """The voters are those of the newest choice that ever opened, or of a later choice."""
    assert primary.data.epoch is not None
    newest = max((key for key in world.chosen if key in world.budget.opened), default=min(world.chosen))
    allowed = [dict(voters) for key, voters in world.chosen.items() if key >= newest]
    if dict(primary.data.epoch.chain[-1].voters) not in allowed:
        raise Violation("old voters", f"{dict(primary.data.epoch.chain[-1].voters)} after healing")


def check_quiet(world: World, primary: Server, begun: int) -> None:
    """Once everything has healed it stays so: no epoch begins for nothing."""
    more = len(world.budget.begun) - begun
    if more:
        raise Violation("no progress", f"{more} epochs began after healing was complete")
    check_healed(world, primary)
    check_voters(world, primary)


def is_healed(world: World, primary: Server) -> bool:
    """Whether healing is complete; nothing can be missed any more then."""
    try:
        check_healed(world, primary)
    except Violation:
        return False
    return True
