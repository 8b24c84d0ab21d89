"""A region's replica loses its data, loads for long, or follows the wrong server (P2, P3, P4)."""

from __future__ import annotations

import asyncio
import shutil
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import redis

from regions.cluster import Cluster
from tests.faults.operating import (
    MAX_SKEW_S,
    MAX_STALENESS_S,
    Root,
    aside,
    operated,
    revoking_everywhere,
    until,
    watched,
)
from verifier.log import META_KEY

KEYS = 50_000
"""Beside the trust log, so that a synchronisation takes its time."""

LOAD_US = 200
"""Of delay for each key that is loaded."""


@pytest.mark.slow
async def test_a_replica_that_restarts_empty_un_revokes_nothing(root: Root, directory: Path) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        before, syncs = root.open_epoch(), root.info("a", "stats")["sync_full"]
        with faults.fault("restarts empty", "redis-b"):
            await aside(alone_and_empty, root)
            with root.at("b") as server:
                assert server.exists(META_KEY) == 0
            await asyncio.sleep(1.0)  # read as it is, by verifiers and by the keeper
            await traffic.flows()  # the others go on
            with root.at("b") as server:
                assert server.exists(META_KEY) == 0  # nobody took it for the first server of a new log
        follow(root, "b", "a")
        await aside(root.synced, "b")
        await traffic.flows()
        assert root.info("a", "stats")["sync_full"] > syncs
        assert root.open_epoch().number == before.number


@pytest.mark.slow
async def test_full_resynchronisation_of_a_quiet_log_loses_nothing_and_wakes_every_reader(
    root: Root, directory: Path
) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        with traffic.paused():
            await faults.replicated_everywhere()
            syncs = root.info("a", "stats")["sync_full"]
            with faults.fault("full resync", "redis-b, redis-c"), root.at("a") as server:
                server.execute_command("DEBUG", "CHANGE-REPL-ID")
                server.execute_command("CLIENT", "KILL", "TYPE", "replica")
                await aside(lambda: until(lambda: server.info("stats")["sync_full"] >= syncs + 2, "full resyncs"))
            for region in ("b", "c"):
                await aside(root.synced, region)
            await faults.fresh_everywhere()
        await traffic.flows()


@pytest.mark.slow
async def test_a_replica_that_loads_for_long_fools_nobody(root: Root, directory: Path) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        with ExitStack() as undo:
            with root.at("a") as primary:
                primary.eval("for i = 1, ARGV[1] do redis.call('SET', '{ks}:filling:' .. i, i) end", 0, KEYS)
            undo.callback(empty_again, root)
            with faults.fault("loading", "redis-b"), root.at("b") as server:
                server.config_set("key-load-delay", LOAD_US)
                server.config_set("loading-process-events-interval-bytes", 1_024)  # answers LOADING, and not nothing
                server.execute_command("REPLICAOF", "NO", "ONE")
                server.set("{ks}:other-history", 1)
                follow(root, "b", "a")
                await aside(lambda: until(lambda: is_loading(root), "the replica loads"))
                await aside(lambda: faults.recorders["b"].wait_sample(lambda sample: not sample.fresh, timeout_s=30.0))
                assert is_loading(root)
                await traffic.flows()
                assert is_loading(root)
                await faults.restart_recorder("b", wait_ready=False)  # one that knows nothing meets it loading
                with suppress(redis.BusyLoadingError):
                    server.config_set("key-load-delay", 0)
            await aside(root.synced, "b")
        await traffic.flows()


@pytest.mark.slow
async def test_a_chained_replica_whose_middle_dies_fools_nobody(root: Root, directory: Path) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        follow(root, "c", "b")
        await aside(root.synced, "c")
        await traffic.flows(3)
        seen: list[tuple[str, str]] = []
        ended = threading.Event()
        watching = threading.Thread(target=watch_link, args=(root, seen, ended))
        watching.start()
        try:
            with faults.fault("killed", "redis-b"):
                await aside(root.cluster.kill_server, "b")
                stale = await aside(lambda: faults.recorders["c"].wait_sample(lambda sample: not sample.fresh, 120.0))
                assert stale.reason == "stale"
        finally:
            ended.set()
            watching.join()
        await aside(root.cluster.restart_server_unfenced, "b")
        assert (root.cluster.topology.region("b").address, "down") in seen
        follow(root, "c", "a")
        await aside(root.synced, "c")
        await traffic.flows()


@pytest.mark.slow
async def test_a_replica_of_another_primary_with_another_log_fools_nobody(
    root: Root, directory: Path, foreign: Cluster
) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        other, incarnation = Root(foreign), root.incarnation()
        place = foreign.topology.region("a")
        with root.at("b") as server:
            ours = server.config_get("masterauth")["masterauth"]
            with faults.fault("follows another primary", "redis-b"):
                server.config_set("masterauth", foreign.servers["a"].passwords["replication"])
                server.execute_command("REPLICAOF", place.address, foreign.topology.ports["redis"])
                await aside(lambda: until(lambda: root.incarnation("b") == other.incarnation(), "the other log"))
                await traffic.flows(12)
                await asyncio.sleep(MAX_STALENESS_S + MAX_SKEW_S + 1.0)
            server.config_set("masterauth", ours)
            follow(root, "b", "a")
        await aside(lambda: until(lambda: root.incarnation("b") == incarnation, "the own log"))
        await traffic.flows()
        before = root.open_epoch()
        with root.at("a") as server:
            server.execute_command("DEBUG", "CHANGE-REPL-ID")  # the next epoch is later than all that the other log had
        after = await aside(root.opened_after, before)
        assert after.number > max(link.number for link in (other.epoch() or before).chain)
        assert after.chain[-1].voters == before.chain[-1].voters
        await traffic.flows()


@pytest.fixture
def foreign(topology_of: object, directory: Path) -> object:
    with operated(topology_of("a"), directory / "foreign") as running:  # type: ignore[operator]
        yield running


def follow(root: Root, region: str, primary: str) -> None:
    place = root.cluster.topology.region(primary)
    with root.at(region) as server:
        server.execute_command("REPLICAOF", place.address, root.cluster.topology.ports["redis"])


def alone_and_empty(root: Root) -> None:
    """Start region b's server again with no data and nobody to follow."""
    server = root.cluster.servers["b"]
    root.cluster.kill_server("b")
    shutil.rmtree(server.files.data_dir / "appendonlydir")
    config = server.files.config.read_text().splitlines(keepends=True)
    server.files.config.write_text("".join(line for line in config if not line.startswith("replicaof")))
    root.cluster.restart_server_unfenced("b")


def is_loading(root: Root) -> bool:
    with root.at("b") as server:
        return bool(server.info("persistence")["loading"])


def empty_again(root: Root) -> None:
    with root.at("a") as server:
        server.eval("for i = 1, ARGV[1] do redis.call('UNLINK', '{ks}:filling:' .. i) end", 0, KEYS)


def watch_link(root: Root, seen: list[tuple[str, str]], ended: threading.Event) -> None:
    """Whom region c's server follows, and how its link is."""
    while not ended.wait(0.02):
        told = root.info("c", "replication")
        seen.append((str(told.get("master_host")), str(told.get("master_link_status"))))
