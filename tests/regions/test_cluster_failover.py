"""A whole cluster loses its primary's region, gets it back, and hands the primary over under load."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from regions.access import Caller, Callers
from regions.cluster import SERVICES, Cluster
from regions.ports import pick_free_ports
from regions.topology import load_topology

pytestmark = pytest.mark.slow

WITHIN_S = 60.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    topology = load_topology("default")
    topology = topology.with_ports(pick_free_ports([region.address for region in topology.regions], SERVICES))
    with Cluster(topology, tmp_path / "var") as running:
        yield running
        running.check()
        assert set(running.link.counters().unbound.values()) == {0}


async def revoke(caller: Caller, name: str) -> dict[str, Any] | None:
    """The receipt, or None if the revocation was not stored on the primary."""
    try:
        body = {"kind": "jti", "value": name, "reason": "test"}
        reply = await caller.admin("POST", "/admin/revocations", body)
    except httpx.HTTPError:
        return None
    receipt: dict[str, Any] = reply.json()
    return receipt if reply.status_code in (200, 202) and receipt.get("position") else None


async def revoke_until_stored(caller: Caller, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + WITHIN_S
    while (receipt := await revoke(caller, f"{name}-{time.monotonic_ns()}")) is None:
        assert time.monotonic() < deadline, "no revocation is stored"
        await asyncio.sleep(0.02)
    return receipt


async def wait_known(caller: Caller, receipt: dict[str, Any]) -> None:
    """Wait until a region's key service knows the revocation, which it does from its own replica."""
    deadline = time.monotonic() + WITHIN_S
    while (await caller.admin("GET", f"/admin/revocations/{receipt['id']}")).status_code != 200:
        assert time.monotonic() < deadline, f"{caller.region} does not know it"
        await asyncio.sleep(0.02)


def pids(cluster: Cluster, regions: list[str]) -> dict[str, int]:
    names = [f"{kind}-{region}" for kind in ("keyservice", "orders") for region in regions]
    return {name: cluster.child(name).pid for name in names}


async def test_other_regions_write_again_without_a_restart_and_the_dead_one_returns_as_a_replica(
    cluster: Cluster,
) -> None:
    async with Callers(cluster.file) as callers:
        europe, asia = callers["eu-west-1"], callers["ap-southeast-1"]
        token = (await callers.home.log_in()).access_token
        first = await revoke_until_stored(europe, "before")
        for caller in callers.all:
            await wait_known(caller, first)
        running = pids(cluster, ["eu-west-1", "ap-southeast-1"])
        await asyncio.to_thread(cluster.kill_region, "us-east-1")
        assert [await caller.order_status(token) for caller in (europe, asia)] == [200, 200]
        second = await revoke_until_stored(europe, "after")
        for caller in (europe, asia):
            await wait_known(caller, second)
        await revoke_until_stored(asia, "after")
        assert pids(cluster, ["eu-west-1", "ap-southeast-1"]) == running
        await asyncio.to_thread(cluster.return_region, "us-east-1")
        assert cluster.sentinels.primary() != cluster.topology.region("us-east-1")
        for receipt in (first, second):
            await wait_known(callers["us-east-1"], receipt)
        assert (await callers["us-east-1"].order_status(token)) == 200
        await revoke_until_stored(callers["us-east-1"], "returned")


def regions(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "regions", *arguments, "--var", str(cluster.file_path.parent)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


async def test_a_planned_failover_under_load_loses_no_acknowledged_revocation(cluster: Cluster) -> None:
    async with Callers(cluster.file) as callers:
        stored: list[dict[str, Any]] = []
        done = asyncio.Event()

        async def write(caller: Caller) -> None:
            number = 0
            while not done.is_set():
                receipt = await revoke(caller, f"{caller.region}-{number}")
                if receipt is not None:
                    stored.append(receipt)
                number += 1

        async def more(wanted: int) -> None:
            deadline = time.monotonic() + WITHIN_S
            while len(stored) < wanted:
                assert time.monotonic() < deadline, "writes do not go on"
                await asyncio.sleep(0.02)

        writing = [asyncio.create_task(write(caller)) for caller in callers.all]
        await more(20)
        result = await asyncio.to_thread(regions, cluster, "failover", "--to", "eu-west-1", "--json")
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert (report["was"], report["now"], report["lost"]) == ("us-east-1", "eu-west-1", 0)
        await more(len(stored) + 20)
        done.set()
        await asyncio.gather(*writing)
        for receipt in stored:
            await wait_known(callers["ap-southeast-1"], receipt)
    shown = json.loads(regions(cluster, "status", "--json").stdout)["regions"]
    assert [seen["role"] for seen in shown] == ["replica", "primary", "replica"]
    assert {seen["sentinel"] for seen in shown} == {"eu-west-1"}
    table = regions(cluster, "status")
    assert table.returncode == 0
    assert [line.split()[:2] for line in table.stdout.splitlines()[1:4]] == [
        ["us-east-1", "replica"], ["eu-west-1", "primary"], ["ap-southeast-1", "replica"],
    ]  # fmt: skip


def test_a_failover_that_cannot_be_is_one_line_and_an_exit_code(cluster: Cluster, tmp_path: Path) -> None:
    for to, code, exit_code in (("nowhere", "unknown_region", 2), ("us-east-1", "already_primary", 4)):
        result = regions(cluster, "failover", "--to", to)
        assert result.returncode == exit_code
        assert result.stderr.startswith(f"regions: error [{code}]: ")
        assert result.stderr.count("\n") == 1
    command = [sys.executable, "-m", "regions", "status", "--var", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 4
    assert "cluster_file_invalid" in result.stderr
