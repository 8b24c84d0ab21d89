"""A keeper loses its disk, gets an older one back, or is killed while it puts thousands of entries back (P2, P3)."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from keyservice.limits import KEEPER_ALIVE_S
from regions.ledger import Revocation
from tests.faults.harness import FaultCluster
from tests.faults.operating import WITHIN_S, Root, aside, revoking_everywhere, watched
from verifier.log import LOG_KEY

BULK = 6_000
"""Entries that a merge appends in six scripts."""

KILLS = 3


@pytest.mark.slow
async def test_a_keeper_that_lost_its_disk_is_another_and_votes_once_it_was_given_the_seat(
    root: Root, directory: Path
) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        before, old = root.open_epoch(), await keeper_of(faults, "b")
        with faults.fault("disk lost", "keyservice-b"):
            await aside(root.cluster.kill_service, "keyservice-b")
            shutil.rmtree(keeper_dir(root, "b"))
            await traffic.flows()
            await silent_for_long(faults, "b")
            await aside(root.cluster.restart_service, "keyservice-b")
            new = await another_keeper(faults, "b", old)
        await given_the_seat(faults, "b", new)
        await aside(root.opened_after, before)
        await traffic.flows()
        assert root.open_epoch().chain[-1].voters["b"] == new["keeper_id"]


@pytest.mark.slow
async def test_a_keeper_restored_from_an_older_backup_takes_a_new_id(root: Root, directory: Path) -> None:
    copy = directory / "keeper-backup"
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        await aside(root.cluster.kill_service, "keyservice-b")
        shutil.copytree(keeper_dir(root, "b"), copy)
        await aside(root.cluster.restart_service, "keyservice-b")
        before, old = root.open_epoch(), await keeper_of(faults, "b")
        await traffic.flows(12)
        with faults.fault("older disk", "keyservice-b"):
            await aside(root.cluster.kill_service, "keyservice-b")
            shutil.rmtree(keeper_dir(root, "b"))
            shutil.copytree(copy, keeper_dir(root, "b"))
            await aside(root.cluster.restart_service, "keyservice-b")
            new = await another_keeper(faults, "b", old)
        assert new["keeper_id"] != old["keeper_id"]
        await given_the_seat(faults, "b", new)
        await aside(root.opened_after, before)
        await traffic.flows()


@pytest.mark.slow
async def test_the_copy_that_a_keeper_started_from_unchanged_keeps_its_id(root: Root, directory: Path) -> None:
    """Just inside: a process that only was killed goes on as who it was."""
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        old = await keeper_of(faults, "b")
        with faults.fault("killed", "keyservice-b"):
            await aside(root.cluster.kill_service, "keyservice-b")
            await traffic.flows()
            await aside(root.cluster.restart_service, "keyservice-b")
        await traffic.flows()
        assert (await keeper_of(faults, "b"))["keeper_id"] == old["keeper_id"]


@pytest.mark.slow
async def test_no_acknowledged_revocation_is_lost_when_keepers_are_killed_while_they_merge(
    root: Root, directory: Path
) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        await revoke_in_bulk(faults, BULK)
        before, partial = root.open_epoch(), []
        with ExitStack() as undo, faults.fault("FLUSHALL", "redis-a"):
            for service in ("keyservice-b", "keyservice-c"):  # so that one keeper alone merges
                child = root.cluster.child(service)
                child.send_signal(signal.SIGSTOP)
                undo.callback(child.send_signal, signal.SIGCONT)
            with root.at("a") as server:
                server.flushall()
                for kill in range(KILLS):
                    reached = await aside(longer_than, root, 1_000 * (kill + 1))
                    partial.append(reached)
                    root.cluster.kill_service("keyservice-a")
                    await aside(root.cluster.restart_service, "keyservice-a")
        await aside(root.opened_after, before)
        await traffic.flows()
        assert any(1 < reached < BULK for reached in partial), partial


def longer_than(root: Root, entries: int) -> int:
    """Wait until the log has at least so many entries; how many it has."""
    with root.at("a") as server:
        deadline = time.monotonic() + WITHIN_S
        while (length := int(server.xlen(LOG_KEY))) < entries:
            assert time.monotonic() < deadline, length
            time.sleep(0.001)
        return length


async def revoke_in_bulk(faults: FaultCluster, count: int) -> None:
    """Revocations of tokens that nobody has, all replicated: their ids must be in the log at the end."""
    sent_mono, sent_wall = time.monotonic(), time.time()
    items = [{"kind": "jti", "value": uuid.uuid4().hex, "id": f"bulk-{number}"} for number in range(count)]
    deadline = time.monotonic() + WITHIN_S
    while True:  # the same ids again: their receipts as they stand then
        reply = await faults.callers["a"].admin("POST", "/admin/revocations", {"revocations": items})
        if reply.status_code == 200:
            break
        assert reply.status_code == 202, reply.status_code
        assert time.monotonic() < deadline
    for result in reply.json()["results"]:
        noted = Revocation(id=result["id"], tokens=(), region="a", sent_mono=sent_mono, sent_wall=sent_wall)
        noted.acknowledge(result["durability"], result["position"], time.monotonic())
        noted.appended_wall = time.time()
        faults.ledger.revocations.append(noted)


def keeper_dir(root: Root, region: str) -> Path:
    index = root.cluster.topology.region(region).index
    return root.cluster.servers[region].files.data_dir.parent / f"keeper-{index}"


async def keeper_of(faults: FaultCluster, region: str) -> dict[str, Any]:
    """What is known of the keeper that reports in a region."""
    answer = (await faults.callers["a"].admin("GET", "/admin/regions")).json()
    found: dict[str, Any] = answer["regions"][region]
    return found


async def silent_for_long(faults: FaultCluster, region: str) -> None:
    """Wait until another keeper may start there: the last one has not reported for long enough to be gone."""
    deadline = time.monotonic() + WITHIN_S
    while (await keeper_of(faults, region))["age_ms"] <= KEEPER_ALIVE_S * 1000:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


async def another_keeper(faults: FaultCluster, region: str, old: dict[str, Any]) -> dict[str, Any]:
    """Wait until another keeper than the old one reports there; it has no seat yet."""
    deadline = time.monotonic() + WITHIN_S
    while (new := await keeper_of(faults, region))["keeper_id"] in (None, old["keeper_id"]):
        assert time.monotonic() < deadline, f"no other keeper reports in {region}: {new}"
        await asyncio.sleep(0.1)
    assert new["seat"] == old["keeper_id"]
    assert not new["voter"]
    return new


async def given_the_seat(faults: FaultCluster, region: str, new: dict[str, Any]) -> None:
    reply = await faults.callers["a"].admin("POST", "/admin/keepers/replace", {"region": region})
    assert reply.status_code == 202, reply.text
    assert reply.json()["voters"][region] == new["keeper_id"]
