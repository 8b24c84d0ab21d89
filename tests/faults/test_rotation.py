"""Rotation while a region is out of reach: no key signs that it does not serve, and afterwards it goes on (P1)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from regions.cluster import Cluster
from tests.faults.drill import settled_primary
from tests.faults.harness import FaultCluster

pytestmark = pytest.mark.slow


async def served_kids(faults: FaultCluster, region: str) -> set[str]:
    caller = faults.callers[region]
    answer = await caller.http.get(f"{caller.urls.keyservice_url}/.well-known/jwks.json")
    return {key["kid"] for key in answer.json()["keys"]} if answer.status_code == 200 else set()


async def signing_kid(faults: FaultCluster, region: str) -> str:
    keys = (await faults.callers[region].admin("GET", "/admin/keys")).json()["keys"]
    return next(str(key["kid"]) for key in keys if key["region"] == region and key["state"] == "active")


async def standby_kid(faults: FaultCluster, region: str) -> str | None:
    keys = (await faults.callers[region].admin("GET", "/admin/keys")).json()["keys"]
    return next((str(key["kid"]) for key in keys if key["region"] == region and key["state"] == "published"), None)


async def rotated(faults: FaultCluster, region: str, old: str, within_s: float) -> str:
    deadline = time.monotonic() + within_s
    while True:
        kid = await signing_kid(faults, region)
        if kid != old:
            return kid
        assert time.monotonic() < deadline, "not rotated"
        await asyncio.sleep(0.2)


async def rotate(faults: FaultCluster, region: str) -> dict[str, Any]:
    answer = await faults.callers[region].admin("POST", "/admin/keys/rotate", {})
    assert answer.status_code in (200, 202), answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_a_key_signs_only_once_the_region_that_was_cut_off_serves_it_too(
    cluster: Cluster, directory: Path
) -> None:
    async with FaultCluster(cluster, directory) as faults:
        home = await settled_primary(cluster)
        away = next(region for region in "abc" if region != home)
        first = await signing_kid(faults, home)
        with faults.fault("cut", away):
            cluster.link.cut(away)
            try:
                await rotate(faults, home)
                second = await rotated(faults, home, first, 60.0)  # every region serves it since the start
                standby = None
                while standby is None or standby == second:
                    standby = await standby_kid(faults, home)
                    await asyncio.sleep(0.2)
                assert standby not in await served_kids(faults, away)
                await rotate(faults, home)
                quiet_until = time.monotonic() + 20.0  # far beyond publish lead and serve lead of the demo profile
                while time.monotonic() < quiet_until:
                    assert await signing_kid(faults, home) == second
                    await asyncio.sleep(0.5)
                assert (await rotate(faults, home))["waiting_for"] == [away]
            finally:
                cluster.link.heal()
        third = await rotated(faults, home, second, 60.0)
        assert third == standby
        for region in "abc":
            assert third in await served_kids(faults, region)
