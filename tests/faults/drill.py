"""What tests of lost regions, links and clocks share: steady writers, who the primary is, and what a server holds.

Servers are asked from their own region, so no link has a say in the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import redis

from regions.cluster import Cluster
from regions.failover import connect
from regions.ledger import Revocation
from tests.faults.harness import AT_ONCE, FaultCluster
from verifier.log import EPOCH_KEY, Epoch

SHORT: dict[str, Any] = {"max_staleness_s": 2.0}
"""A verifier that is cut off says so soon, so a test need not be long to see it."""

PROMOTED_WITHIN_S = 180.0
"""A split vote costs an attempt of 8 s; a busy machine some more."""

POLL_S = 0.05


async def until(done: Callable[[], Any], what: str, within_s: float = 120.0) -> Any:
    """What `done` gives once that is true of it; it is called in a thread, because it may ask servers."""
    deadline = time.monotonic() + within_s
    while not (found := await asyncio.to_thread(done)):
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(POLL_S)
    return found


# -- writers -----------------------------------------------------------------------------------------------------------


class Writers:
    """Callers of every region revoke new tokens, each again and again until there is a receipt."""

    def __init__(self, faults: FaultCluster, regions: Sequence[str], every_s: float) -> None:
        self._faults = faults
        self._every_s = every_s
        self._stopping = asyncio.Event()
        self.made: dict[str, list[Revocation]] = {region: [] for region in regions}

    async def run(self, region: str) -> None:
        while not self._stopping.is_set():
            (name,) = self._faults.mint_offline(1)
            made: Revocation | None = None
            while made is None or (made.acknowledged_mono is None and not self._stopping.is_set()):
                made = await self._faults.revoke(name, via=region)
                self.made[region].append(made)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._every_s)

    def stop(self) -> None:
        self._stopping.set()

    async def more(self, count: int, *regions: str, within_s: float = 60.0) -> None:
        """Until each of these regions (default: all) has `count` more receipts, of either kind."""
        wanted = {region: self.acknowledged(region) + count for region in regions or self.made}
        await until(
            lambda: all(self.acknowledged(region) >= number for region, number in wanted.items()),
            f"{count} more receipts in each of {sorted(wanted)}",
            within_s,
        )

    def acknowledged(self, region: str) -> int:
        return sum(each.acknowledged_mono is not None for each in self.made[region])


@asynccontextmanager
async def writing(
    faults: FaultCluster, regions: Sequence[str] = "abc", *, every_s: float = 0.25, at_once: int = 2
) -> AsyncIterator[Writers]:
    """`at_once` callers a region revoke while inside; what they have begun they end."""
    writers = Writers(faults, regions, every_s)
    tasks = [asyncio.create_task(writers.run(region)) for region in regions for _ in range(at_once)]
    try:
        yield writers
    finally:
        writers.stop()
        await asyncio.gather(*tasks)


def acknowledged(revocations: Sequence[Revocation]) -> list[str]:
    """The ids of those that have a receipt."""
    return [each.id for each in revocations if each.acknowledged_mono is not None]


def durabilities(revocations: Sequence[Revocation]) -> set[str | None]:
    """What the first receipts said; None for one that has none."""
    return {each.durability for each in revocations}


# -- servers -----------------------------------------------------------------------------------------------------------


@contextmanager
def server(cluster: Cluster, region: str, user: str = "operator") -> Iterator[redis.Redis]:
    """A client of a region's server, from that region, as `operator`, `observer` or `verifier`."""
    urls = cluster.file.regions[region]
    with contextlib.closing(connect(getattr(urls, f"{user}_redis_url"), urls.bind_address, timeout_s=5.0)) as client:
        yield client


def epoch(cluster: Cluster, region: str) -> Epoch:
    """The epoch that a region's server is in."""
    with server(cluster, region, "verifier") as client:
        fields: Any = client.hgetall(EPOCH_KEY)
    return Epoch.decode(fields)


def stat(cluster: Cluster, region: str, name: str) -> int:
    """A counter of a region's server, for instance `sync_full`."""
    with server(cluster, region, "observer") as client:
        return int(client.info("stats")[name])


async def settled_primary(cluster: Cluster, *, other_than: str = "") -> str:
    """The region on whose server a majority of the Sentinels is settled as the primary."""

    def settled() -> str | None:
        region = cluster.sentinels.primary()
        return region.name if region is not None and region.name != other_than else None

    return str(await until(settled, f"a primary other than {other_than!r}", PROMOTED_WITHIN_S))


async def replicated(faults: FaultCluster, revocations: Sequence[Revocation], *, via: str, within_s: float) -> None:
    """Until all of these that have a receipt are replicated, as the key service of `via` says."""
    deadline = time.monotonic() + within_s
    while left := [each for each in revocations if each.acknowledged_mono and not each.replicated_mono]:
        assert time.monotonic() < deadline, f"{len(left)} still pending in {via}: {[each.id for each in left[:3]]}"
        for start in range(0, len(left), AT_ONCE):
            await asyncio.gather(*(_read_receipt(faults, each, via) for each in left[start : start + AT_ONCE]))
        await asyncio.sleep(POLL_S)


async def _read_receipt(faults: FaultCluster, revocation: Revocation, via: str) -> None:
    reply = await faults.callers[via].admin("GET", f"/admin/revocations/{revocation.id}")
    if reply.status_code == 200:
        receipt = reply.json()
        revocation.acknowledge(receipt["durability"], receipt["position"], time.monotonic())


async def healed(faults: FaultCluster, *, within_s: float = 120.0) -> str:
    """Once a primary is settled and everything with a receipt is replicated: all that is promised holds.

    Returns the primary's region. Every acknowledged revocation counts from then on, also what was pending.
    """
    primary = await settled_primary(faults.cluster)
    await replicated(faults, faults.ledger.revocations, via=primary, within_s=within_s)
    await faults.fresh_everywhere(within_s)
    await faults.assert_promises(log_region=await settled_primary(faults.cluster))
    return primary
