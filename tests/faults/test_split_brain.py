"""Two servers take themselves for the primary, or none may be promoted (P2, P3, P4)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from regions.cluster import Cluster
from regions.embedded import observe_replication
from tests.faults.drill import (
    SHORT,
    acknowledged,
    durabilities,
    epoch,
    healed,
    replicated,
    settled_primary,
    until,
    writing,
)
from tests.faults.harness import FaultCluster


def problems(faults: FaultCluster) -> set[tuple[str, str | None]]:
    return {(each.region, each.problem) for each in faults.ledger.revocations}


def role(cluster: Cluster, region: str) -> object:
    return observe_replication(cluster.servers[region]).get("role")


@pytest.mark.slow
async def test_zombie_with_writers_acknowledges_nothing_goes_stale_and_its_tail_is_added_when_it_returns(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        valid = faults.mint_offline(3)
        await faults.accepted_everywhere(valid)
        zombie = await settled_primary(cluster)
        async with faults.load(valid), writing(faults) as writers:
            await writers.more(5)
            with faults.fault("cut off", zombie):
                cluster.link.cut(zombie)
                primary = await settled_primary(cluster, other_than=zombie)
                await until(lambda: epoch(cluster, primary).open, "the new epoch is open")
                side = faults.recorders[zombie]
                stale = await asyncio.to_thread(side.wait_sample, lambda seen: not seen.fresh, 120.0)
                for region in set("abc") - {zombie}:
                    await asyncio.to_thread(faults.recorders[region].wait_sample, lambda seen: seen.fresh, 120.0)
                begun = len(writers.made[zombie]), len(writers.made[primary])
                await writers.more(10, zombie, primary)
                there = writers.made[zombie][begun[0] :]
                here = [each for each in writers.made[primary][begun[1] :] if each.durability == "replicated"]
                zombies_log, log = faults.log_ids(zombie), faults.log_ids(primary)
                assert durabilities(there) == {"pending"}
                assert set(acknowledged(there)) <= zombies_log
                assert not set(acknowledged(there)) & log
                assert here
                assert not {each.id for each in here} & zombies_log
                assert (role(cluster, zombie), role(cluster, primary)) == ("master", "master")
                assert not side.samples[-1].fresh
                assert not [sample for sample in side.samples if sample.fresh and sample.mono > stale.mono]
                cluster.link.restore(zombie)
                await until(lambda: role(cluster, zombie) == "slave", "the zombie is demoted")
            await writers.more(3)
        await healed(faults)


@pytest.mark.slow
async def test_primary_that_stood_still_and_goes_on_acknowledges_nothing_that_is_lost(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        valid = faults.mint_offline(3)
        await faults.accepted_everywhere(valid)
        asleep = await settled_primary(cluster)
        number = epoch(cluster, asleep).number
        async with faults.load(valid), writing(faults) as writers:
            await writers.more(5)
            with faults.stopped(f"redis-{asleep}"):
                primary = await settled_primary(cluster, other_than=asleep)
            await writers.more(10)
            await until(lambda: epoch(cluster, primary).number > number, "a new epoch")
            await until(lambda: role(cluster, asleep) == "slave", "the old primary is demoted")
        await healed(faults)


@pytest.mark.slow
async def test_tail_of_an_old_primary_that_died_is_added_from_its_regions_keeper(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        valid, names = faults.mint_offline(3), faults.mint_offline(20)
        await faults.accepted_everywhere([*valid, *names])
        old = await settled_primary(cluster)
        async with faults.load(valid), writing(faults, [each for each in "abc" if each != old]) as writers:
            with faults.fault("cut off, then its server died", old):
                cluster.link.cut(old)
                tail = await faults.revoke_all(names, via=old)
                assert durabilities(tail) == {"pending"}
                primary = await settled_primary(cluster, other_than=old)
                await until(lambda: epoch(cluster, primary).open, "the new epoch is open")
                ids = set(acknowledged(tail))
                assert ids <= faults.log_ids(old)
                await asyncio.to_thread(cluster.kill_server, old)
                await writers.more(5)
                assert not ids & faults.log_ids(primary)
                cluster.link.restore(old)
                await asyncio.to_thread(cluster.restart_server, old)
                await replicated(faults, tail, via=primary, within_s=120.0)
                assert role(cluster, old) == "slave"
        await healed(faults)


@pytest.mark.slow
async def test_with_a_minority_of_the_sentinels_revocations_wait_and_none_is_lost(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        valid = faults.mint_offline(3)
        await faults.accepted_everywhere(valid)
        dead = await settled_primary(cluster)
        others = [region for region in "abc" if region != dead]
        async with faults.load(valid), writing(faults) as writers:
            await writers.more(5)
            with faults.fault("primary died, and two Sentinels", dead):
                for region in others:
                    await asyncio.to_thread(cluster.kill_sentinel, region)
                await asyncio.to_thread(cluster.kill_server, dead)
                await until(lambda: "s_down" in cluster.sentinels.sightings()[0].primary.flags, "the death is seen")
                begun = {region: len(made) for region, made in writers.made.items()}
                await writers.more(20)
                for region in others:
                    await asyncio.to_thread(faults.recorders[region].wait_sample, lambda seen: not seen.fresh, 120.0)
                assert {role(cluster, region) for region in others} == {"slave"}
                waiting = {region: made[begun[region] :] for region, made in writers.made.items()}
                assert [durabilities(made) for made in waiting.values()] == [{"pending"}] * 3, problems(faults)
                for region in others:
                    await asyncio.to_thread(cluster.return_sentinel, region)
                primary = await settled_primary(cluster, other_than=dead)
                for region in others:
                    await replicated(faults, waiting[region], via=primary, within_s=120.0)
                await asyncio.to_thread(cluster.restart_server, dead)
                await replicated(faults, waiting[dead], via=primary, within_s=120.0)  # its keeper sees a log again
            await writers.more(3)
        await healed(faults)
