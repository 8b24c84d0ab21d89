"""Links that are bad in every way between regions that are all up (P2, P3, P4). The tests leave their cluster whole."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import httpx
import pytest

from regions.cluster import Cluster
from regions.ledger import Revocation
from regions.recorder import Recorder
from regions.recorder.events import Sample
from tests.faults.drill import (
    SHORT,
    acknowledged,
    durabilities,
    epoch,
    healed,
    replicated,
    server,
    settled_primary,
    stat,
    until,
    writing,
)
from tests.faults.harness import FaultCluster

WAYS = [*permutations("abc", 2)]


def is_fresh(sample: Sample) -> bool:
    return sample.fresh


def is_stale(sample: Sample) -> bool:
    return not sample.fresh


async def becomes(recorder: Recorder, state: object, within_s: float = 40.0) -> Sample:
    wanted = is_fresh if state == "fresh" else is_stale
    return await asyncio.to_thread(recorder.wait_sample, wanted, within_s)


@contextmanager
def broken(faults: FaultCluster, kind: str, target: str) -> Iterator[None]:
    """What is done to links inside is undone at the end."""
    with faults.fault(kind, target):
        try:
            yield
        finally:
            faults.cluster.link.heal()


async def home_and_others(cluster: Cluster) -> tuple[str, str, str]:
    home = await settled_primary(cluster)
    first, second = (region for region in "abc" if region != home)
    return home, first, second


# -- one-way holes -----------------------------------------------------------------------------------------------------


async def test_hole_on_the_way_to_a_region_leaves_its_verifier_stale_and_its_revocations_pending(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, region, _ = await home_and_others(cluster)
        valid, names = faults.mint_offline(2), faults.mint_offline(4)
        await faults.accepted_everywhere([*valid, *names])
        await faults.revoke_all(faults.mint_offline(8), via=region)  # its connections to the primary are open
        with broken(faults, "hole", f"{home} to {region}"):
            cluster.link.hold(home, region)
            theirs = await faults.revoke_all(names[:2], via=region)  # they get there, and no answer comes back
            ours = await faults.revoke_all(names[2:], via=home)
            assert (durabilities(theirs), durabilities(ours)) == ({"pending"}, {"replicated"})
            assert {each.id for each in theirs} & faults.log_ids(home)
            assert not {each.id for each in (*theirs, *ours)} & faults.log_ids(region)
            await becomes(faults.recorders[region], "stale")
        await healed(faults)


@pytest.mark.slow
async def test_hole_on_the_way_from_a_region_leaves_its_verifier_fresh_and_its_revocations_pending(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, region, _ = await home_and_others(cluster)
        valid, names = faults.mint_offline(2), faults.mint_offline(20)
        await faults.accepted_everywhere([*valid, *names])
        with broken(faults, "hole", f"{region} to {home}"):
            cluster.link.hold(region, home)
            theirs = await faults.revoke_all(names[:10], via=region)
            ours = await faults.revoke_all(names[10:], via=home)
            assert (durabilities(theirs), durabilities(ours)) == ({"pending"}, {"replicated"})
            assert not {each.id for each in theirs} & faults.log_ids(home)
            await until(lambda: {each.id for each in ours} <= faults.log_ids(region), "the replica still gets it all")
            assert faults.recorders[region].samples[-1].fresh
        await healed(faults)


@pytest.mark.slow
async def test_hole_between_two_replicas_changes_nothing(cluster: Cluster, directory: Path) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, one, other = await home_and_others(cluster)
        number = epoch(cluster, home).number
        async with writing(faults) as writers:
            with broken(faults, "hole", f"{one} to {other}"):
                cluster.link.hold(one, other)
                await asyncio.sleep(3.0)  # longer than any Sentinel's patience
                await writers.more(10)
        assert epoch(cluster, home).number == number
        assert await healed(faults) == home


# -- jitter, starved, sliced, flapping ---------------------------------------------------------------------------------


@pytest.mark.slow
async def test_jitter_of_10_to_500_ms_on_every_way_loses_nothing(cluster: Cluster, directory: Path) -> None:
    async with FaultCluster(cluster, directory) as faults:
        valid = faults.mint_offline(3)
        await faults.accepted_everywhere(valid)
        async with faults.load(valid), writing(faults) as writers:
            await writers.more(3)
            with broken(faults, "jitter", "every way"):
                for a, b in WAYS:
                    cluster.link.latency(a, b, 255.0, 245.0)
                begun = {region: len(made) for region, made in writers.made.items()}
                await writers.more(12)
                waited = [_took_s(each) for region in "abc" for each in writers.made[region][begun[region] :]]
                assert max(waited) > 0.3
            await writers.more(3)
        await healed(faults)


def _took_s(revocation: Revocation) -> float:
    return (revocation.acknowledged_mono or revocation.sent_mono) - revocation.sent_mono


@pytest.mark.slow
async def test_starved_and_sliced_links_make_verifiers_stale_and_lose_nothing(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, starved, sliced = await home_and_others(cluster)
        valid = faults.mint_offline(3)
        await faults.accepted_everywhere(valid)
        async with faults.load(valid), writing(faults) as writers:
            with broken(faults, "starved, sliced", f"{home} to {starved}, {sliced}"):
                for a, b in ((home, starved), (starved, home)):
                    cluster.link.bandwidth(a, b, 10)
                for a, b in ((home, sliced), (sliced, home)):
                    cluster.link.slicer(a, b, 40, 30, 500)
                await revoke_in_bulk(faults, home, 1_000, faults.mint_offline(5))
                stale = await becomes(faults.recorders[starved], "stale")
                assert stale.reason == "stale"
                await writers.more(5)
            await writers.more(3)
        await healed(faults)


@pytest.mark.slow
async def test_flapping_link_loses_nothing(cluster: Cluster, directory: Path) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, region, other = await home_and_others(cluster)
        valid = faults.mint_offline(3)
        await faults.accepted_everywhere(valid)
        lost_before = cluster.link.counters().pair(home, region).bytes_lost
        async with faults.load(valid), writing(faults) as writers:
            with broken(faults, "flapping", f"{home} to {region}, {other}"):
                for _ in range(10):
                    for each in (region, other):
                        cluster.link.cut_both(home, each)
                    await asyncio.sleep(0.4)
                    for each in (region, other):
                        cluster.link.lift_both(home, each)
                    await asyncio.sleep(0.4)
            await writers.more(3)
        assert cluster.link.counters().pair(home, region).bytes_lost > lost_before
        await healed(faults)


# -- cuts and the replication backlog ----------------------------------------------------------------------------------


async def test_cut_shorter_than_the_backlog_loses_nothing_and_needs_no_full_resync(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, region, _ = await home_and_others(cluster)
        valid, names = faults.mint_offline(2), faults.mint_offline(20)
        await faults.accepted_everywhere([*valid, *names])
        partial, full = stat(cluster, home, "sync_partial_ok"), stat(cluster, home, "sync_full")
        with broken(faults, "cut", f"{home} from {region}"):
            cluster.link.cut_both(home, region)
            revoked = await faults.revoke_all(names[:10], via=home)
            revoked += await faults.revoke_all(names[10:], via=region)
            await becomes(faults.recorders[region], "stale")
            assert not {each.id for each in revoked} & faults.log_ids(region)
        await until(lambda: {each.id for each in revoked[:10]} <= faults.log_ids(region), "the replica has caught up")
        assert stat(cluster, home, "sync_partial_ok") > partial
        assert stat(cluster, home, "sync_full") == full
        await healed(faults)


@pytest.mark.slow
async def test_cut_beyond_the_backlog_loses_nothing_in_the_full_resync(cluster: Cluster, directory: Path) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, region, _ = await home_and_others(cluster)
        valid, names = faults.mint_offline(3), faults.mint_offline(10)
        await faults.accepted_everywhere([*valid, *names])
        with server(cluster, home) as client:
            usual = str(client.config_get("repl-backlog-size")["repl-backlog-size"])
            client.config_set("repl-backlog-size", 16_384)
            full = stat(cluster, home, "sync_full")
            async with faults.load(valid):
                with broken(faults, "cut", f"{home} from {region}"):
                    cluster.link.cut_both(home, region)
                    await revoke_in_bulk(faults, home, 5_000, names[:5])
                    theirs = await faults.revoke_all(names[5:], via=region)
                    assert durabilities(theirs) == {"pending"}
                    await becomes(faults.recorders[region], "stale")
                await until(lambda: stat(cluster, home, "sync_full") > full, "a full resynchronisation")
            client.config_set("repl-backlog-size", usual)
        await healed(faults)


# -- lost replies, half-open connections, partitions -------------------------------------------------------------------


async def test_revocation_whose_reply_is_lost_after_the_write_is_pending_never_failed_and_then_replicated(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, region, _ = await home_and_others(cluster)
        (name,) = faults.mint_offline(1)
        await faults.accepted_everywhere([name])
        await faults.revoke_all(faults.mint_offline(8), via=region)  # its connections to the primary are open
        with broken(faults, "reply lost", f"{home} to {region}"):
            cluster.link.hold(home, region)
            asked = asyncio.create_task(faults.revoke(name, via=region))
            await until(lambda: any(id.startswith(f"{name}-") for id in faults.log_ids(home)), "it is written")
            revoked = await asked
            assert (revoked.durability, revoked.position) == ("pending", None)
        await replicated(faults, [revoked], via=region, within_s=120.0)
        assert len([id for id in faults.log_list(home) if id == revoked.id]) == 1
        await healed(faults)


@pytest.mark.slow
async def test_half_open_connections_leave_a_verifier_stale_until_it_hears_again(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, region, _ = await home_and_others(cluster)
        valid, names = faults.mint_offline(3), faults.mint_offline(10)
        await faults.accepted_everywhere([*valid, *names])
        with broken(faults, "half open", f"everybody in {region} to their own servers"):
            cluster.link.cut_both(region, region)  # established for those who call, and nothing ever answers
            revoked = await faults.revoke_all(names, via=home)
            assert len(acknowledged(revoked)) == len(names)
            stale = await becomes(faults.recorders[region], "stale")
            assert stale.reason == "stale"
            for name in names:
                await asyncio.to_thread(faults.recorders[region].wait_for, name, "accepted", 120.0)
        await becomes(faults.recorders[region], "fresh")
        await healed(faults)


@pytest.mark.slow
async def test_verifier_that_starts_cut_off_from_its_server_denies_as_never_synced_until_it_has_read_the_log(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, region, _ = await home_and_others(cluster)
        valid, names = faults.mint_offline(3), faults.mint_offline(10)
        await faults.accepted_everywhere([*valid, *names])
        await faults.revoke_all(names[:5], via=home)
        with broken(faults, "cut", f"{region} from its own server"):
            cluster.link.cut_both(region, region)
            recorder = await faults.restart_recorder(region, wait_ready=False)
            await faults.revoke_all(names[5:], via=home)
            for name in (*valid, *names):
                denied = await asyncio.to_thread(recorder.wait_for, name, "undecidable", 120.0)
                assert denied.code in ("never_synced", "keys_unavailable")
            last = await asyncio.to_thread(recorder.wait_for, valid[0], "undecidable", 120.0)
            assert last.code == "never_synced"
        for name in valid:
            await asyncio.to_thread(recorder.wait_for, name, "accepted", 120.0)
        await healed(faults)
        for name in names:
            assert {run.verdict for run in recorder.runs_of(name)} == {"undecidable", "revoked"}


@pytest.mark.slow
async def test_verifier_that_starts_in_a_partitioned_region_is_stale_until_it_is_healed_and_then_catches_up(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        home, region, _ = await home_and_others(cluster)
        valid, names = faults.mint_offline(3), faults.mint_offline(10)
        await faults.accepted_everywhere([*valid, *names])
        before = await faults.revoke_all(names[:5], via=home)
        await until(lambda: {each.id for each in before} <= faults.log_ids(region), "replicated")
        with broken(faults, "cut off", region):
            cluster.link.cut(region)
            recorder = await faults.restart_recorder(region)
            assert durabilities(await faults.revoke_all(names[5:], via=home)) == {"replicated"}
            for name in names[:5]:
                await asyncio.to_thread(recorder.wait_for, name, "revoked", 120.0)
            for name in names[5:]:
                await asyncio.to_thread(recorder.wait_for, name, "accepted", 120.0)
            since = time.monotonic()
            await asyncio.to_thread(recorder.wait_sample, lambda seen: seen.mono > since + 2.0, 120.0)
            assert not [sample for sample in recorder.samples if sample.fresh and sample.mono > since + 2.0]
        await becomes(recorder, "fresh")
        await healed(faults)


# -- bulk --------------------------------------------------------------------------------------------------------------

BULK = 10_000
"""The most that a request takes."""

BULK_WITHIN_S = 300.0
"""On a busy machine a request takes seconds; that is not what is tested."""


CAUGHT_UP_WITHIN_S = 300.0
"""A replica and a verifier read 100,000 entries in some seconds of an idle machine's time."""


async def revoke_in_bulk(faults: FaultCluster, via: str, count: int, names: list[str]) -> None:
    """Revoke `count` identifiers in requests of `BULK`, and in the last one also these watched tokens."""
    for start in range(0, count, BULK):
        items = [{"kind": "jti", "value": uuid.uuid4().hex} for _ in range(min(BULK, count - start))]
        noted = []
        if start + BULK >= count:
            for name in names:
                id = f"{name}-{uuid.uuid4().hex[:12]}"
                sent = time.monotonic()
                noted.append(Revocation(id=id, tokens=(name,), region=via, sent_mono=sent, sent_wall=time.time()))
                items[len(noted) - 1] = {"token": faults.tokens[name], "id": id}
            faults.ledger.revocations += noted
        faults.callers[via].http.timeout = httpx.Timeout(BULK_WITHIN_S)
        reply = await faults.callers[via].admin("POST", "/admin/revocations", {"revocations": items})
        assert reply.status_code in (200, 202), reply.status_code
        results = reply.json()["results"]
        assert len(results) == len(items)
        for revocation, receipt in zip(noted, results, strict=False):
            assert receipt["id"] == revocation.id
            revocation.acknowledge(receipt["durability"], receipt["position"], time.monotonic())


@pytest.mark.slow
async def test_100k_revocations_during_a_partition_are_enforced_in_the_region_that_was_cut_off_soon_after(
    cluster: Cluster, directory: Path, record_property: Callable[[str, object], None]
) -> None:
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        _, via, region = await home_and_others(cluster)
        valid, names = faults.mint_offline(3), faults.mint_offline(20)
        await faults.accepted_everywhere([*valid, *names])
        recorder = faults.recorders[region]
        held = recorder.samples[-1].entries
        async with faults.load(valid):
            with broken(faults, "cut off", region):
                cluster.link.cut(region)
                began = time.monotonic()
                await revoke_in_bulk(faults, via, 100_000, names)
                made_s = time.monotonic() - began
                await becomes(recorder, "stale")
                assert recorder.samples[-1].entries == held
            began = time.monotonic()
            await asyncio.to_thread(
                recorder.wait_sample, lambda seen: seen.entries >= held + 100_000 and seen.fresh, CAUGHT_UP_WITHIN_S
            )
            took_s = time.monotonic() - began
        record_property("caught_up_s", round(took_s, 2))
        print(f"100,000 revocations in {made_s:.1f} s; enforced in {region} {took_s:.1f} s after the partition")
        await healed(faults)
