"""A cluster whose servers know a user with every right, and revocations that go on while something is done to it.

    with operated(topology, directory) as cluster:
        root = Root(cluster)
        async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
            with faults.fault("FLUSHALL", "redis-a"), root.at("a") as server:
                server.flushall()
            await traffic.flows()

`revoking_everywhere` ends with the whole verdict: everything acknowledged is replicated, everybody is fresh, and no
promise was broken. The cluster's Sentinels are patient: these are faults of a server that keeps its address, and who
is promoted when one loses it is another matter.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from regions import cluster as cluster_module
from regions import embedded, sentinel_config, server_config
from regions.access import Unexpected
from regions.cluster import Cluster
from regions.ledger import Durability
from regions.server_config import Credentials, ServerVersion
from regions.topology import Topology
from tests.faults.harness import REPLICATED, FaultCluster
from verifier.log import EPOCH_KEY, LOG_KEY, META_KEY, Epoch, parse_stream_id

WITHIN_S = 60.0
PATIENCE_MS = 120_000
"""Longer than any of these tests leaves a server silent."""

ROOT = "root"
ROOT_PASSWORD = uuid.uuid4().hex

MAX_STALENESS_S = 2.0
MAX_SKEW_S = 1.0

AHEAD = 10
"""Tokens of a region that are watched before their turn to be revoked comes."""


@contextmanager
def operated(topology: Topology, directory: Path, **settings: str) -> Iterator[Cluster]:
    """A cluster as always, but for the user `root` and patient Sentinels; `settings` are the key services' own."""
    acl_text, config_text = server_config.acl_text, server_config.config_text
    base_environment = cluster_module._base_environment

    def acl_with_root(credentials: Credentials, version: ServerVersion) -> str:
        return f"{acl_text(credentials, version)}user {ROOT} reset on >{ROOT_PASSWORD} ~* &* +@all\n"

    def config_with_debug(*args: Any, **kwargs: Any) -> str:
        return f"{config_text(*args, **kwargs)}enable-debug-command yes\n"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "acl_text", acl_with_root)
        patch.setattr(embedded, "config_text", config_with_debug)
        patch.setattr(sentinel_config, "DOWN_AFTER_MS", PATIENCE_MS)
        patch.setattr(cluster_module, "_base_environment", lambda: {**base_environment(), **settings})
        with Cluster(topology, directory) as cluster:
            yield cluster


class Root:
    """An operator at the servers' own sockets."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    @contextmanager
    def at(self, region: str, *, timeout_s: float = 10.0) -> Iterator[Any]:
        """A `redis.Redis` that sends everything once; Any, because its types do not say what comes back."""
        with redis.Redis(
            unix_socket_path=str(self.cluster.servers[region].files.uds),
            username=ROOT,
            password=ROOT_PASSWORD,
            socket_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
        ) as client:
            yield client

    def epoch(self, region: str = "a") -> Epoch | None:
        """The epoch that a region's server shows, None if it shows none."""
        with self.at(region) as server:
            fields = server.hgetall(EPOCH_KEY)
        return Epoch.decode(fields) if fields else None

    def open_epoch(self, region: str = "a") -> Epoch:
        """Wait for an open epoch."""
        found: Epoch = until(lambda: _open(self.epoch(region)), "an open epoch")
        return found

    def opened_after(self, before: Epoch, region: str = "a") -> Epoch:
        """Wait for an open epoch that is newer."""
        found: Epoch = until(
            lambda: _open(self.epoch(region), above=before.number), f"an open epoch after {before.number}"
        )
        return found

    def incarnation(self, region: str = "a") -> str:
        with self.at(region) as server:
            told: bytes = server.hget(META_KEY, "incarnation") or b""
        return told.decode()

    def log(self, region: str = "a") -> list[tuple[bytes, Mapping[bytes, bytes]]]:
        """The whole log as it stands."""
        with self.at(region) as server:
            return list(server.xrange(LOG_KEY))

    def places(self, region: str = "a") -> dict[str, tuple[int, int]]:
        """Where the ids stand that are not packed; the last place of each."""
        return {
            fields.get(b"id", b"").decode("utf-8", "replace"): parse_stream_id(at) for at, fields in self.log(region)
        }

    def info(self, region: str, section: str) -> dict[str, Any]:
        with self.at(region) as server:
            found: dict[str, Any] = server.info(section)
        return found

    def synced(self, region: str) -> None:
        """Wait until a region's server follows its primary."""
        until(lambda: _is_up(self, region), f"{region} follows its primary")


def _open(epoch: Epoch | None, *, above: int = 0) -> Epoch | None:
    return epoch if epoch is not None and epoch.open and epoch.number > above else None


def _is_up(root: Root, region: str) -> bool:
    with suppress(redis.RedisError):
        return root.info(region, "replication").get("master_link_status") == "up"
    return False


def until(condition: Callable[[], Any], what: str, within_s: float = WITHIN_S) -> Any:
    """Poll until `condition()` is true, and give what it gave; fail when it takes too long."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)
    return found


async def aside(call: Callable[..., Any], *args: Any) -> Any:
    """What blocks, in a thread, so that revocations go on."""
    return await asyncio.to_thread(call, *args)


def relogged(faults: FaultCluster, root: Root) -> list[str]:
    """Revocations that were acknowledged at a place which the log no longer has them at: it had lost them."""
    places = root.places()
    moved = []
    for each in faults.ledger.revocations:
        if each.position is not None and each.id in places:
            at = parse_stream_id(each.position.partition(".")[0])
            if at != places[each.id]:
                moved.append(each.id)
    return moved


def watched(root: Root, directory: Path) -> FaultCluster:
    """The cluster with recording verifiers of short bounds: one that is fooled is soon found out."""
    return FaultCluster(root.cluster, directory, max_staleness_s=MAX_STALENESS_S, max_skew_s=MAX_SKEW_S, leeway_s=2.0)


class Traffic:
    """Revocations with receipts in every region, each of a token that was watched for a while before."""

    def __init__(self, faults: FaultCluster, *, every_s: float) -> None:
        self.faults = faults
        self._every_s = every_s
        self._going = asyncio.Event()
        self._going.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        signed = await self.faults.mint(2 * len(self.faults.regions))
        for at, region in enumerate(self.faults.regions):
            ahead = deque([*signed[at :: len(self.faults.regions)], *self.faults.mint_offline(AHEAD)])
            self._tasks.append(asyncio.create_task(self._revoke(region, ahead)))

    async def _revoke(self, region: str, ahead: deque[str]) -> None:
        while True:
            await self._going.wait()
            ahead += self.faults.mint_offline(1)
            with suppress(Unexpected):  # no admin token could be had: nothing was sent
                await self.faults.revoke(ahead.popleft(), via=region)
            await asyncio.sleep(self._every_s)

    def replicated(self) -> int:
        """How many are acknowledged as replicated."""
        return sum(each.replicated_mono is not None for each in self.faults.ledger.revocations)

    async def flows(self, count: int = 6, within_s: float = WITHIN_S) -> None:
        """Until so many more were acknowledged as replicated by their first receipt."""
        deadline, aim = time.monotonic() + within_s, self.replicated() + count
        while self.replicated() < aim:
            assert time.monotonic() < deadline, f"{aim - self.replicated()} of {count} revocations are not replicated"
            for task in self._tasks:
                if task.done():
                    await task
            await asyncio.sleep(0.05)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A quiet log: what is under way ends, and nothing new begins."""
        self._going.clear()
        try:
            yield
        finally:
            self._going.set()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def revoking_everywhere(
    faults: FaultCluster, *, every_s: float = 0.3, counted: Collection[Durability] = REPLICATED
) -> AsyncIterator[Traffic]:
    """Revocations and requests in every region; at the end, when all is healed, the verdict (see the module)."""
    traffic = Traffic(faults, every_s=every_s)
    valid = faults.mint_offline(2)
    await traffic.start()
    try:
        await traffic.flows()
        async with faults.load(valid, every_s=0.2):
            yield traffic
            await traffic.flows()
    finally:
        await traffic.stop()
    await faults.replicated_everywhere(WITHIN_S)
    await faults.fresh_everywhere(WITHIN_S)
    await faults.assert_promises(counted)
