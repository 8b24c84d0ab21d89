"""What is decided about primaries: on whom the Sentinels are settled, and whether a failover may be asked for. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from regions.errors import AlreadyPrimary, NotAReplica, PrimaryDown, ReplicaDown
from regions.sentinel_config import quorum
from verifier.sentinel import Address, ServerSeen, Sighting

__all__ = ["check_target", "not_following", "settled_primary"]

_DOWN = frozenset({"s_down", "o_down", "disconnected"})
_UNSETTLED = _DOWN | {"failover_in_progress"}


def settled_primary(sightings: Sequence[Sighting], sentinels: int) -> Address | None:
    """The primary that the Sentinels agree on; None while they do not.

    Wanted is a majority of all `sentinels`, in one configuration epoch, none of them in doubt about it: a server that
    returns must not follow one that is about to be replaced.
    """
    newest = max((seen.config_epoch for seen in sightings), default=0)
    agreed = [seen for seen in sightings if seen.config_epoch == newest and not seen.primary.flags & _UNSETTLED]
    addresses = {seen.primary.address for seen in agreed}
    if len(addresses) != 1 or len(agreed) < quorum(sentinels):
        return None
    return addresses.pop()


def check_target(target: Address, region: str, primary: ServerSeen, replicas: Sequence[ServerSeen]) -> None:
    """Whether the server of `region` can be promoted now. Raises a `FailoverError`, by name."""
    if target == primary.address:
        raise AlreadyPrimary(f"{region} is the primary already")
    seen = next((replica for replica in replicas if replica.address == target), None)
    if seen is None:
        raise NotAReplica(f"the Sentinels know no replica in {region}")
    if seen.flags & _DOWN:
        raise ReplicaDown(f"the server of {region} does not answer: start it again first")
    if not seen.link_ok:
        raise ReplicaDown(f"the server of {region} has no link to the primary: wait until it has caught up")
    if primary.flags & _UNSETTLED:
        raise PrimaryDown("the primary is down, or a failover is under way: the Sentinels see to it")


def not_following(replication: Mapping[str, object], primary: Address) -> str | None:
    """Why the server with this `INFO replication` may not have its address opened yet, or None.

    A server that returns is let in only as a replica that has its primary's data.
    """
    if replication.get("role") != "slave":
        return f"it is a {replication.get('role')}"
    if (str(replication.get("master_host")), str(replication.get("master_port"))) != (primary.host, str(primary.port)):
        return f"it follows {replication.get('master_host')}, not {primary.host}"
    if replication.get("master_link_status") != "up" or replication.get("master_sync_in_progress") not in (0, "0"):
        return "it has not caught up with its primary"
    return None
