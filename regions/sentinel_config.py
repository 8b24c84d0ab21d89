"""The configuration and the access rules of one region's Sentinel, as text. Pure.

Sentinels agree on which server is the primary and promote another when it is gone. One a region, from the server's own
binary; like the servers they listen on a unix socket and reach each other, and the servers, through the link proxy.

Every Sentinel is told at the start what it would otherwise learn within seconds (replicas, other Sentinels by fixed
identifiers), so one that starts while the primary is away knows whom to ask. The order of the lines matters: what is
said after `monitor` about announcing and about the Sentinels' own user is not applied to its first connections.

How many there are:

* One region has none: there is nobody to promote.
* Two have two, and a majority of two is two. So nothing is promoted when a whole region dies, which is on purpose: the
  one that is left cannot tell a dead region from a cut link. Planned failovers work, and clients still follow them.
* Three and more have one each; a minority of them may be gone.

They do not all lose patience at once (`down_after_ms`). Two that see a death within half a round trip of each other
both want to lead, each votes for itself, and the next attempt comes 8 s later. Of two that see it one after the other,
the second leads, and has the first one's vote.

Users of a Sentinel (`default` is off):

    peer       other Sentinels: their votes and hellos
    watcher    clients: asks who the primary and its replicas are, and hears of changes
    operator   also starts a failover
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from regions.server_config import ServerVersion, quoted
from regions.topology import Region, Topology

__all__ = [
    "DOWN_AFTER_MS",
    "FAILOVER_TIMEOUT_MS",
    "GROUP",
    "PACE",
    "SentinelCredentials",
    "down_after_ms",
    "new_ids",
    "quorum",
    "sentinel_acl_text",
    "sentinel_config_text",
    "sentinel_regions",
]

GROUP = "trust"
"""The name under which the Sentinels know the servers."""

DOWN_AFTER_MS = 1_500
"""Silence after which the first Sentinel takes a server for dead. Below 1,200, links of 90 ms cause needless ones."""

STAGGER_MS = 400
"""From one Sentinel's patience to the next one's: more than a ping's period, half a round trip and a timer's tick."""

STAGGER_MS_MAX = 800
"""Between the first and the last, however many there are: a death must not wait for the sixteenth."""

PACE = ("INFO-PERIOD", "1000", "PING-PERIOD", "200", "ASK-PERIOD", "2000")
"""Set on the running Sentinel (`SENTINEL DEBUG`), because there is no setting for it.

INFO every second (by itself: every 10 s), because it promotes by the offsets that it read last. A ping every 200 ms
(1 s), so that how soon a death is seen hangs on `down_after_ms` and not on chance. And it asks the others about a death
every 2 s only (1 s), so that it does not begin to lead just when a later one has.
"""

FAILOVER_TIMEOUT_MS = 4_000
"""How long an attempt may take; after twice this time another is made."""


@dataclass(frozen=True, slots=True)
class SentinelCredentials:
    """A password for each user of the Sentinels, fit for a URL. Hidden in `repr`."""

    peer: str = field(repr=False)
    watcher: str = field(repr=False)
    operator: str = field(repr=False)

    @classmethod
    def generate(cls) -> SentinelCredentials:
        return cls(**{user.name: secrets.token_urlsafe(32) for user in fields(cls)})


def sentinel_regions(topology: Topology) -> tuple[Region, ...]:
    """The regions that have a Sentinel: all, unless there is only one."""
    return topology.regions if len(topology.regions) > 1 else ()


def quorum(sentinels: int) -> int:
    """How many must agree that the primary is gone: a majority, so that no minority acts alone."""
    return sentinels // 2 + 1


def down_after_ms(index: int, sentinels: int) -> int:
    """How long the Sentinel of region `index` (from 1) waits for a silent server."""
    step = min(STAGGER_MS, STAGGER_MS_MAX // max(1, sentinels - 1))
    return DOWN_AFTER_MS + step * (index - 1)


def new_ids(topology: Topology) -> dict[str, str]:
    """An identifier for each region's Sentinel; one that returns keeps it, so the others do not count it twice."""
    return {region.name: secrets.token_hex(20) for region in sentinel_regions(topology)}


_ANY_CLIENT = "+ping +hello +client|setname +client|id +client|getname"
_WATCH = (
    "&+switch-master &+promoted-slave &+failover-state-reconf-slaves +subscribe +unsubscribe "
    "+sentinel|get-master-addr-by-name +sentinel|master +sentinel|replicas +sentinel|sentinels"
)
_RULES = {
    "peer": "&__sentinel__:hello +ping +publish +client|setname +sentinel|is-master-down-by-addr",
    "watcher": f"{_WATCH} {_ANY_CLIENT}",
    "operator": f"{_WATCH} +sentinel|failover +sentinel|debug +sentinel|ckquorum {_ANY_CLIENT}",
}


def sentinel_acl_text(credentials: SentinelCredentials, version: ServerVersion) -> str:
    """The content of the Sentinel's `aclfile`. Passwords stand in it as SHA-256 only."""
    lines = ["user default reset off"]
    for user in fields(credentials):
        digest = hashlib.sha256(getattr(credentials, user.name).encode()).hexdigest()
        rules = _RULES[user.name]
        if _ANY_CLIENT in rules and version.knows_client_setinfo:
            rules += " +client|setinfo"
        lines.append(f"user {user.name} reset on #{digest} resetchannels -@all {rules}")
    return "\n".join(lines) + "\n"


def sentinel_config_text(
    region: Region,
    *,
    data_dir: Path,
    acl_path: Path,
    uds: Path,
    server_password: str,
    credentials: SentinelCredentials,
    topology: Topology,
    ids: Mapping[str, str],
    primary: Region,
) -> str:
    """The content of the Sentinel's configuration file, which it then keeps by itself; `primary` is the present one."""
    port, redis_port = str(topology.ports["sentinel"]), str(topology.ports["redis"])
    before: list[tuple[str, ...]] = [
        ("port", "0"),
        ("unixsocket", str(uds)),
        ("unixsocketperm", "700"),
        ("dir", str(data_dir)),
        ("daemonize", "no"),
        ("logfile", ""),
        ("bind-source-addr", region.address),
        ("aclfile", str(acl_path)),
        ("sentinel", "myid", ids[region.name]),
        ("sentinel", "announce-ip", region.address),
        ("sentinel", "announce-port", port),
        ("sentinel", "sentinel-user", "peer"),
        ("sentinel", "sentinel-pass", credentials.peer),
    ]
    group: list[tuple[str, ...]] = [
        ("monitor", primary.address, redis_port, str(quorum(len(ids)))),
        ("auth-user", "sentinel"),
        ("auth-pass", server_password),
        ("down-after-milliseconds", str(down_after_ms(region.index, len(ids)))),
        ("failover-timeout", str(FAILOVER_TIMEOUT_MS)),
        ("parallel-syncs", "2"),
        *(("known-replica", other.address, redis_port) for other in _others(topology, primary)),
        *(("known-sentinel", other.address, port, ids[other.name]) for other in _others(topology, region)),
    ]
    lines = before + [("sentinel", name, GROUP, *values) for name, *values in group]
    return "".join(f"{name} {' '.join(quoted(value) for value in values)}\n" for name, *values in lines)


def _others(topology: Topology, region: Region) -> Iterable[Region]:
    return (other for other in topology.regions if other != region)
