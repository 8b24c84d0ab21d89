"""What each region of a running cluster is now: its server's role, epoch and link, and what its Sentinel says.

Every region is asked from its own address, all at one time; one that does not answer is `down`, which is no error.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import redis

from regions.cluster_file import ClusterFile, RegionUrls
from regions.errors import NoSentinel
from regions.failover import connect, connect_sentinel
from regions.sentinels import sighting
from verifier.log import EPOCH_KEY, Epoch, FormatError
from verifier.sentinel import Sighting

__all__ = ["RegionStatus", "read_status", "status_doubts", "status_lines"]

DOWN = "down"


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """One region. `role` is primary, replica or down; `sentinel` the region that its Sentinel names, down, or none."""

    region: str
    role: str = DOWN
    epoch: str | None = None
    """Number and nonce of the trust log's epoch as this server has it."""
    epoch_open: bool | None = None
    follows: str | None = None
    """Of a replica: the region that it follows."""
    link: str | None = None
    """Of a replica: up or down."""
    behind_bytes: int | None = None
    """Of a replica whose primary answers: how much of its primary's history it has not seen yet."""
    sentinel: str = DOWN
    sentinel_flags: str | None = None
    """How its Sentinel sees the primary: `master` where all is well."""


def read_status(cluster: ClusterFile) -> list[RegionStatus]:
    """Ask every region; in the topology's order."""
    with ThreadPoolExecutor(max_workers=len(cluster.regions)) as pool:
        asked = list(pool.map(partial(_ask, cluster), cluster.regions))
    written = {seen.region: offset for seen, offset in asked if seen.role == "primary"}
    return [_with_lag(seen, offset, written) for seen, offset in asked]


def _with_lag(seen: RegionStatus, offset: int, written: dict[str, int]) -> RegionStatus:
    if seen.role != "replica" or seen.follows not in written:
        return seen
    return replace(seen, behind_bytes=max(0, written[seen.follows] - offset))


def _ask(cluster: ClusterFile, region: str) -> tuple[RegionStatus, int]:
    """One region, and how far its server is in the history that it follows."""
    urls = cluster.regions[region]
    by_host = {urlsplit(other.redis_url).hostname: name for name, other in cluster.regions.items()}
    seen, offset = RegionStatus(region), 0
    with contextlib.suppress(redis.RedisError, OSError, FormatError):
        seen, offset = _ask_server(seen, urls, by_host)
    named, flags = _ask_sentinel(urls)
    where = DOWN if named is None else by_host.get(named.primary.address.host, str(named.primary.address))
    return replace(seen, sentinel=where if urls.sentinel_url else "none", sentinel_flags=flags), offset


def _ask_server(seen: RegionStatus, urls: RegionUrls, by_host: dict[str | None, str]) -> tuple[RegionStatus, int]:
    with contextlib.closing(connect(urls.verifier_redis_url, urls.bind_address)) as server:
        replication = server.info("replication")
        stored: Any = server.hgetall(EPOCH_KEY)
    epoch = Epoch.decode(stored) if stored else None
    seen = replace(
        seen,
        role="primary" if replication["role"] == "master" else "replica",
        epoch=None if epoch is None else f"{epoch.number}.{epoch.nonce}",
        epoch_open=None if epoch is None else epoch.open,
    )
    if seen.role == "primary":
        return seen, int(replication["master_repl_offset"])
    host = str(replication["master_host"])
    seen = replace(seen, follows=by_host.get(host, host), link=str(replication["master_link_status"]))
    return seen, int(replication["slave_repl_offset"])


def _ask_sentinel(urls: RegionUrls) -> tuple[Sighting | None, str | None]:
    try:
        with contextlib.closing(connect_sentinel(urls)) as sentinel:
            named = sighting(sentinel)
    except (NoSentinel, redis.RedisError, OSError):
        return None, None
    return named, None if named is None else ",".join(sorted(named.primary.flags))


_COLUMNS = ("region", "role", "epoch", "link", "its Sentinel says")


def status_lines(found: list[RegionStatus]) -> list[str]:
    """A table for people, of plain text: nothing in it is cut short, also in a pipe."""
    rows = [_COLUMNS, *(_row(seen) for seen in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(seen: RegionStatus) -> tuple[str, ...]:
    epoch = "-" if seen.epoch is None else seen.epoch.partition(".")[0]
    link = "-" if seen.link is None else seen.link
    if seen.behind_bytes is not None:
        link += f", {seen.behind_bytes} B behind"
    return seen.region, seen.role, epoch, link, seen.sentinel


def status_doubts(found: list[RegionStatus]) -> list[str]:
    """What is not as it should be, a line each."""
    doubts = [
        f"the Sentinel of {seen.region} sees the primary as {seen.sentinel_flags}"
        for seen in found
        if seen.sentinel_flags not in (None, "master")
    ]
    primaries = [seen.region for seen in found if seen.role == "primary"]
    if len(primaries) != 1:
        doubts.append(f"servers that are a primary: {', '.join(primaries) or 'none'}")
    if any(seen.epoch_open is False for seen in found if seen.role == "primary"):
        doubts.append("the epoch is closed: no majority of regions has merged into it yet")
    return doubts
