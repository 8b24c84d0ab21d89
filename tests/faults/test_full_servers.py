"""No room: for the primary's data in memory, for a keeper's on its disk (P2, P3, P4)."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.harness import FaultCluster
from tests.faults.operating import WITHIN_S, Root, aside, revoking_everywhere, until, watched

ROOM_BYTES = 64 * 1024
"""Left beyond a key service's log: less than SQLite's journal takes before it is written from its start again."""


@pytest.mark.slow
async def test_what_is_revoked_while_the_primary_is_out_of_memory_is_replicated_afterwards(
    root: Root, directory: Path
) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults):
        with root.at("a") as server, faults.fault("out of memory", "redis-a"):
            refused = oom_errors(root)
            server.config_set("maxmemory", 1)
            try:
                names = faults.mint_offline(3)
                await faults.accepted_everywhere(names)
                pending = [await faults.revoke(name, via=region) for name, region in zip(names, "abc", strict=True)]
                assert {each.durability for each in pending} == {"pending"}
                stale = await aside(lambda: faults.recorders["a"].wait_sample(lambda sample: not sample.fresh, 120.0))
                assert stale.reason == "stale"
            finally:
                server.config_set("maxmemory", 0)
            assert oom_errors(root) > refused
        # The end of `revoking_everywhere` waits until those, too, are replicated.


@pytest.mark.slow
async def test_a_region_whose_keeper_s_disk_is_full_refuses_by_name_and_the_others_go_on(
    root: Root, directory: Path
) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        with faults.fault("disk full", "keyservice-b"), full_disk(root, "keyservice-b"):
            names = faults.mint_offline(1)
            await faults.accepted_everywhere(names)
            caller = faults.callers["b"]

            async def answer() -> tuple[int, str]:
                reply = await caller.admin("POST", "/admin/revocations", {"kind": "jti", "value": "full-disk"})
                return reply.status_code, reply.json().get("code", "")

            deadline = time.monotonic() + WITHIN_S
            while (said := await answer())[0] != 503:  # each that is stored takes of the room that is left
                assert time.monotonic() < deadline, said
            assert said == (503, "keeper_disk")
            held = await held_in(faults, "b")
            await traffic.flows(12)
            noted = await faults.revoke(names[0], via="a")
            assert noted.durability == "replicated"
            assert await held_in(faults, "b") == held  # nothing is said to be held that is not on disk
        await aside(lambda: until(lambda: holds(root, noted.position), "the keeper catches up"))
        await traffic.flows()
        assert (await faults.revoke(faults.mint_offline(1)[0], via="b")).durability == "replicated"


def oom_errors(root: Root) -> int:
    told = root.info("a", "errorstats").get("errorstat_OOM")
    return int(told["count"]) if told else 0


@contextmanager
def full_disk(root: Root, service: str) -> Iterator[None]:
    """The process can make no file longer than its log nearly is: its disk takes no more."""
    child = root.cluster.child(service)
    _, hard = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (child.log_path.stat().st_size + ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (hard, hard))


async def held_in(faults: FaultCluster, region: str) -> str:
    """How far a region's keeper says that it holds the log."""
    answer = (await faults.callers["a"].admin("GET", "/admin/regions")).json()
    return str(answer["regions"][region]["held"])


def holds(root: Root, position: str | None) -> bool:
    assert position is not None
    number, seq = map(int, position.partition(".")[0].split("-"))
    with root.at("a") as server:
        told = server.hget("{trust}:region:b", "held") or b"0-0"
    return tuple(map(int, told.split(b"-"))) >= (number, seq)
