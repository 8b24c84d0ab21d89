"""The primary restarts under its own address, before anybody is promoted, with less than it had (P2, P3, P4)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from regions.embedded import Server
from tests.faults.operating import Root, Traffic, aside, relogged, revoking_everywhere, until, watched
from verifier.log import Epoch


@pytest.mark.slow
async def test_no_acknowledged_revocation_is_lost_when_the_primary_restarts_empty(root: Root, directory: Path) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        before, incarnation = root.open_epoch(), root.incarnation()
        with faults.fault("restarts empty", "redis-a"):
            await aside(restart_with, root, shutil.rmtree)
        await came_back(root, traffic, before)
        assert root.incarnation() not in ("", incarnation)
        assert relogged(faults, root) != []


@pytest.mark.slow
async def test_no_acknowledged_revocation_is_lost_when_the_primary_restarts_from_an_old_snapshot(
    root: Root, directory: Path
) -> None:
    await restarts_from_the_past(root, directory, "old snapshot", snapshot=True)


@pytest.mark.slow
async def test_no_acknowledged_revocation_is_lost_when_the_primary_restarts_from_an_old_append_only_file(
    root: Root, directory: Path
) -> None:
    await restarts_from_the_past(root, directory, "old append-only file", snapshot=False)


@pytest.mark.slow
async def test_no_acknowledged_revocation_is_lost_when_the_primary_s_append_only_file_is_torn(
    root: Root, directory: Path
) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        before = root.open_epoch()
        id = faults.ledger.revocations[-1].id
        await traffic.flows()

        def tear(files: Path) -> None:
            """Cut in the middle of an entry, as a write that never was completed."""
            newest = max(files.glob("*.incr.aof"), key=lambda file: file.stat().st_mtime)
            content = newest.read_bytes()
            at = content.index(id.encode())
            newest.write_bytes(content[: at + 5])

        with faults.fault("torn append-only file", "redis-a"):
            await aside(restart_with, root, tear)
        await came_back(root, traffic, before)
        assert len(relogged(faults, root)) >= 6


async def restarts_from_the_past(root: Root, directory: Path, kind: str, *, snapshot: bool) -> None:
    """Keep a copy of the primary's data, go on for a while, and have it restart with the copy."""
    copy = directory / f"copy-{kind.replace(' ', '-')}"
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        if snapshot:
            await aside(rewrite, root)
        shutil.copytree(data_files(root.cluster.servers["a"]), copy)
        before, held = root.open_epoch(), set(root.places())
        await traffic.flows(12)
        lost = [each.id for each in faults.ledger.revocations if each.replicated_mono and each.id not in held]
        with faults.fault(f"restarts from an {kind}", "redis-a"):
            await aside(lambda: restart_with(root, lambda files: replace_with(files, copy)))
        await came_back(root, traffic, before)
        assert len(lost) >= 10
        assert set(lost) <= set(relogged(faults, root))


def data_files(server: Server) -> Path:
    return server.files.data_dir / "appendonlydir"


def rewrite(root: Root) -> None:
    """Write all data as a snapshot, which an append-only file begins with."""
    with root.at("a") as server:
        rewrites = server.info("persistence")["aof_rewrites"]
        server.bgrewriteaof()
        until(lambda: server.info("persistence")["aof_rewrites"] > rewrites, "the rewrite is counted")
        until(lambda: not server.info("persistence")["aof_rewrite_in_progress"], "the rewrite ends")


def replace_with(files: Path, copy: Path) -> None:
    shutil.rmtree(files)
    shutil.copytree(copy, files)


def restart_with(root: Root, change: Callable[[Path], None]) -> None:
    """Kill the primary, change its files, and start it again at once, as a supervisor would."""
    root.cluster.kill_server("a")
    change(data_files(root.cluster.servers["a"]))
    root.cluster.restart_server_unfenced("a")


async def came_back(root: Root, traffic: Traffic, before: Epoch) -> None:
    """The same server is the primary, its replicas follow it, and the keepers have opened a new epoch."""
    await aside(root.opened_after, before)
    for region in ("b", "c"):
        await aside(root.synced, region)
        assert root.info(region, "replication")["master_host"] == root.cluster.topology.region("a").address
    await traffic.flows()
