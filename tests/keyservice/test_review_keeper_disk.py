"""A keeper whose disk fails: nobody waits for an answer for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from keyservice.errors import KeeperUnavailable
from keyservice.keeper import KeeperRunner
from keyservice.keeper_disk import SqliteDisk
from keyservice.telemetry import Metrics
from verifier.log import Entry


def entry(value: str) -> Entry:
    return Entry(value, "jti", "https://id.test", value, None, 4_102_444_800, "r" * 200, 1, "eu")


def runner_on(disk: SqliteDisk) -> KeeperRunner:
    nobody = cast(Any, None)
    settings: dict[str, Any] = {"region": "eu", "regions": ["eu"], "bootstrap_region": None, "drop_grace_s": 300}
    return KeeperRunner(disk, nobody, nobody, nobody, Metrics("eu"), clock=lambda: 1_000.0, **settings)


async def test_a_disk_that_cannot_be_read_refuses_an_intent_by_name(run_dir: Path) -> None:
    disk = SqliteDisk(run_dir / "broken", region="eu")
    runner = runner_on(disk)
    try:
        disk._db.execute("DROP TABLE entries")  # stands for a page that is gone
        with pytest.raises(KeeperUnavailable) as caught:
            async with asyncio.timeout(10):
                await runner.intend([entry("t")])
        assert caught.value.code == "keeper_disk"
        with pytest.raises(KeeperUnavailable):
            await runner.find("t")
    finally:
        await runner.stop()
