"""The machines of the primary's region die, once and again, and come back (P2, P3, P4)."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regions.cluster import Cluster
from regions.errors import PrimaryDown, ReplicaDown
from regions.failover import Failover, FailoverReport
from regions.topology import Topology
from tests.faults.drill import (
    SHORT,
    acknowledged,
    durabilities,
    epoch,
    healed,
    replicated,
    server,
    settled_primary,
    until,
    writing,
)
from tests.faults.harness import FaultCluster
from verifier.log import LOG_KEY

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def own_cluster(topology: Topology) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ft-") as path, Cluster(topology, Path(path)) as running:
        yield running
        running.check()


@pytest.mark.parametrize("one_way_ms", [50.0, 150.0])
async def test_no_acknowledged_revocation_is_lost_when_the_primarys_region_dies(
    topology_of: Callable[..., Topology], directory: Path, one_way_ms: float
) -> None:
    with own_cluster(topology_of("abc", one_way_ms)) as cluster:
        async with FaultCluster(cluster, directory, **SHORT) as faults:
            valid, tail = faults.mint_offline(3), faults.mint_offline(30)
            await faults.accepted_everywhere([*valid, *tail])
            old = epoch(cluster, "a")
            async with faults.load(valid, regions="bc"), writing(faults) as writers:
                await writers.more(15)
                with faults.fault("region died", "a"):
                    for other in "bc":
                        cluster.link.hold("a", other)  # what a appends from here on, nobody else will ever see
                    only_there = await faults.revoke_all(tail, via="a")
                    await asyncio.to_thread(cluster.kill_region, "a")
                    cluster.link.heal()
                    primary = await settled_primary(cluster, other_than="a")
                    await writers.more(5, "b", "c")
                    await until(lambda: epoch(cluster, primary).open, "the new epoch is open")
                    assert durabilities(only_there) == {"pending"}
                    assert epoch(cluster, primary).number > old.number
                    log = faults.log_ids(primary)
                    assert not log & {each.id for each in only_there}
                    before = [each for each in faults.ledger.revocations if each.durability == "replicated"]
                    assert len(before) > 20
                    assert {each.id for each in before} <= log
                    await asyncio.to_thread(cluster.return_region, "a")
                await writers.more(3)
            assert set(acknowledged(only_there)) == {each.id for each in only_there}
            await healed(faults)


async def test_nothing_is_lost_in_two_failovers_in_a_row_with_a_keeper_crashing_in_each(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        numbers = [epoch(cluster, await settled_primary(cluster)).number]
        async with writing(faults) as writers:
            for crash_after_promotion in (False, True):
                await writers.more(5)
                dead = await settled_primary(cluster)
                staying = [region for region in "abc" if region != dead]
                with faults.fault("region died", dead):
                    await asyncio.to_thread(cluster.kill_region, dead)
                    crashed = staying[1]
                    if crash_after_promotion:
                        crashed = await settled_primary(cluster, other_than=dead)
                    alive = next(region for region in staying if region != crashed)
                    with faults.fault("keeper crashed", crashed):
                        cluster.child(f"keyservice-{crashed}").kill()
                        crashed_mono = time.monotonic()
                        await settled_primary(cluster, other_than=dead)
                        await writers.more(8, alive)
                        waiting = [each for each in writers.made[alive] if each.sent_mono > crashed_mono]
                        assert durabilities(waiting) == {"pending"}  # one keeper of three is not a majority
                    cluster._start_again(cluster._services[f"keyservice-{crashed}"])
                    await replicated(faults, waiting, via=alive, within_s=120.0)
                    await asyncio.to_thread(cluster.return_region, dead)
                numbers.append(epoch(cluster, await settled_primary(cluster)).number)
        assert numbers == sorted(set(numbers))
        await healed(faults)


async def hand_over(cluster: Cluster, target: str) -> FailoverReport:
    """A planned failover; refused, which changes nothing, while the machine is too busy for its probe of 0.1 s."""
    deadline = time.monotonic() + 120.0
    while True:
        try:
            return await asyncio.to_thread(Failover(cluster.file, target).run)
        except (PrimaryDown, ReplicaDown):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(1.0)


async def test_nothing_is_lost_when_the_primary_is_handed_over_and_back_under_load(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        valid = faults.mint_offline(3)
        await faults.accepted_everywhere(valid)
        home = await settled_primary(cluster)
        other = next(region for region in "abc" if region != home)
        async with faults.load(valid), writing(faults) as writers:
            for target in (other, home):
                await writers.more(5)
                number = epoch(cluster, target).number
                with faults.fault("handed over", target):
                    report = await hand_over(cluster, target)
                assert (report.now, report.lost) == (target, 0)
                await writers.more(5)
                await until(lambda: epoch(cluster, target).number > number, "a new epoch")  # noqa: B023  # awaited here
        assert await healed(faults) == home
        assert {each.problem for each in faults.ledger.revocations} == {None}


async def test_nothing_is_lost_when_a_replica_that_lags_is_promoted(cluster: Cluster, directory: Path) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        valid, names = faults.mint_offline(3), faults.mint_offline(20)
        await faults.accepted_everywhere([*valid, *names])
        dead = await settled_primary(cluster)
        informed, laggard = (region for region in "abc" if region != dead)
        old = epoch(cluster, dead)
        async with faults.load(valid, regions=[informed, laggard]):
            with server(cluster, laggard) as client:
                client.config_set("replica-priority", 1)  # the Sentinels take the lowest before the most advanced
                await asyncio.sleep(2.5)  # they read it within a second
                with faults.fault("lags, then promoted", laggard):
                    cluster.link.hold(dead, laggard)
                    revoked = await faults.revoke_all(names, via=dead)
                    assert durabilities(revoked) == {"replicated"}
                    await asyncio.to_thread(cluster.kill_region, dead)
                    with server(cluster, laggard, "verifier") as reader:
                        held = reader.xlen(LOG_KEY)
                    ids = {each.id for each in revoked}
                    assert not ids & faults.log_ids(laggard)
                    assert ids <= faults.log_ids(informed)
                    cluster.link.heal()
                    assert await settled_primary(cluster, other_than=dead) == laggard
                    await until(lambda: epoch(cluster, laggard).number > old.number, "a new epoch")
                    await until(lambda: ids <= faults.log_ids(laggard), "a keeper has added what it lacked")
                    assert held < len(faults.log_ids(laggard))
                    await asyncio.to_thread(cluster.return_region, dead)
                client.config_set("replica-priority", 100)
        await healed(faults)
