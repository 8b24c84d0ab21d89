"""A cluster in which nothing fails: what the harness of the fault tests must call right first (P2, P3, P4)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from regions.checkers import leak_windows
from regions.cluster import Cluster
from regions.recorder import Recorder
from tests.faults.harness import EITHER, FaultCluster

REVOKED_PER_REGION = 50


async def test_revocations_made_in_any_region_are_enforced_in_every_region(cluster: Cluster, directory: Path) -> None:
    async with FaultCluster(cluster, directory) as faults:
        names = await faults.mint(3 * REVOKED_PER_REGION + 6)
        await faults.accepted_everywhere(names)
        share = {region: names[at * REVOKED_PER_REGION :][:REVOKED_PER_REGION] for at, region in enumerate("abc")}
        async with faults.load(names[-6:]):
            for region, revoked in share.items():
                await faults.revoke_all(revoked, via=region)
            await faults.replicated_everywhere()
        await faults.assert_promises(EITHER)
        assert [each.problem for each in faults.ledger.revocations if each.acknowledged_mono is None] == []
        assert len(faults.ledger.counted({"replicated"})) == 3 * REVOKED_PER_REGION
        windows = leak_windows(faults.witnesses(), faults.ledger)
        assert len(windows) == 3 * REVOKED_PER_REGION * 3
        assert all(each.first_refusal_after_sent_s is not None and each.lag_s is not None for each in windows)
        assert len(faults.ledger.requests) > 30


async def test_verifier_that_starts_anew_refuses_what_the_one_before_it_refused(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory) as faults:
        names = await faults.mint(10)
        await faults.accepted_everywhere(names)
        await faults.revoke_all(names[:5])
        await faults.settle(EITHER)
        again = await faults.restart_recorder("b")
        await faults.assert_promises(EITHER)
        assert {again.runs[name][-1].verdict for name in names[:5]} == {"revoked"}
        assert {again.runs[name][-1].verdict for name in names[5:]} == {"accepted"}


async def test_verifier_whose_server_stands_still_calls_itself_stale_before_it_is_fooled(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory, max_staleness_s=1.0, max_skew_s=0.5, leeway_s=2.0) as faults:
        names = await faults.mint(5) + faults.mint_offline(5)
        await faults.accepted_everywhere(names)
        recorder = faults.recorders["b"]
        with faults.stopped("redis-b"):
            revoked = await faults.revoke_all(names[:2], via="a")
            await faults.replicated_everywhere()
            bound = max(each.replicated_mono or 0.0 for each in revoked) + 1.5
            await asyncio.to_thread(recorder.wait_sample, lambda sample: sample.mono > bound and not sample.fresh, 60.0)
            await asyncio.to_thread(_accepts_after, recorder, names[0], bound)
        await faults.assert_promises()


def _accepts_after(recorder: Recorder, name: str, mono: float) -> None:
    """Until it is seen to accept the token at a time at which a fresh verifier must not."""
    deadline = time.monotonic() + 120.0
    while (recorder.last_accept(name) or 0.0) <= mono:
        assert time.monotonic() < deadline, recorder.latest(name)
        recorder.report()


async def test_deny_refuses_by_name_while_the_region_s_server_stands_still(cluster: Cluster, directory: Path) -> None:
    async with FaultCluster(cluster, directory, max_staleness_s=2.0, on_stale="deny") as faults:
        (name,) = await faults.mint(1)
        await faults.accepted_everywhere([name])
        recorder = faults.recorders["b"]
        with faults.stopped("redis-b"):
            refused = await asyncio.to_thread(recorder.wait_for, name, "undecidable", 60.0)
        assert (refused.code, refused.reason) == ("revocations_stale", "stale")
        await asyncio.to_thread(recorder.wait_for, name, "accepted", 60.0)
        await faults.assert_promises()
