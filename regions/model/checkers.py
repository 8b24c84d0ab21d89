"""What must hold, each as an object of its own that can fail."""

from __future__ import annotations

from regions.model.world import MAX_SKEW_S, World

__all__ = ["Violation", "check_always", "check_healed", "check_opened", "is_healed"]

BOUND_S = 5.0
"""`max_staleness_s` of every verifier in the model."""


class Violation(Exception):
    """A promise is broken. `promise` is the promise's name, the message says how."""

    def __init__(self, promise: str, message: str) -> None:
        self.promise = promise
        super().__init__(f"{promise}: {message}")


def check_always(world: World) -> None:
    """P3: a verifier that calls itself fresh enforces what was acknowledged longer ago than the bound and the skew."""
    horizon_ms = world.now_ms - (BOUND_S + MAX_SKEW_S) * 1000
    for region in world.regions.values():
        if region.verifier.is_fresh(world.now_ms, BOUND_S):
            for acknowledged in world.acknowledged:
                if acknowledged.at_ms <= horizon_ms and not region.verifier.enforces(acknowledged.entry):
                    raise Violation("fresh and fooled", f"{region.name} is fresh without {acknowledged.entry.value}")


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
        held = {entry.value for _, entry in server.data.log}
        for acknowledged in world.acknowledged:
            if acknowledged.entry.value not in held:
                raise Violation("acknowledged and lost", f"{server.region} opened without {acknowledged.entry.value}")


def check_healed(world: World) -> None:
    """After healing: an open epoch, everybody fresh, everything that is stored enforced everywhere, none of it pending.

    What was pending and was stored only by a keeper that lost its disk is gone: it was never acknowledged.
    """
    disks = [region.disk for region in world.regions.values()]
    stored = {entry.value: entry for disk in disks for entry in disk.entries.values() if entry.kind == "jti"}
    owed = stored | {acknowledged.entry.value: acknowledged.entry for acknowledged in world.acknowledged}
    for region in world.regions.values():
        missing = [entry.value for entry in owed.values() if not region.verifier.enforces(entry)]
        if missing:
            lost = [a.entry.value for a in world.acknowledged if a.entry.value in missing]
            name = "acknowledged and lost" if lost else "no progress"
            raise Violation(name, f"{region.name} does not enforce {(lost or missing)[:3]} after healing")
        if not region.verifier.is_fresh(world.now_ms, BOUND_S):
            raise Violation("no progress", f"{region.name} is not fresh after healing")
    pending = [entry.value for region in world.regions.values() for entry in region.pending if entry.value in stored]
    if pending:
        raise Violation("no progress", f"still pending after healing: {pending[:3]}")


def is_healed(world: World) -> bool:
    """Whether healing is complete; nothing can be missed any more then."""
    try:
        check_healed(world)
    except Violation:
        return False
    return True
