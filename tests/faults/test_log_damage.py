"""Somebody damages the trust log on the primary, and the keepers put back what it had (P2, P3, P4)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from regions.access import Caller
from tests.faults.operating import MAX_STALENESS_S, Root, aside, relogged, revoking_everywhere, until, watched
from verifier.log import BEAT_KEY, EPOCH_KEY, KEYS_KEY, LOG_KEY, META_KEY, parse_stream_id

A_MONTH_OF_BEATS = 13_000_000

GARBAGE: list[dict[str, bytes | str]] = [
    {"": ""},
    {"v": "one", "kind": "jti"},
    {"v": "1", "id": "x" * 65, "kind": "jti", "value": "y", "expires_at": "99999999999", "at": "1"},
    {"v": "1", "id": b"\xff\xfe", "kind": "jti", "value": b"\x00\xff", "expires_at": "99999999999", "at": "1"},
    {"v": "1", "id": "poison", "kind": "jti", "value": "y", "expires_at": "1e9", "at": "1"},
    {"v": "2", "id": "newer", "kind": "audience", "value": "y", "expires_at": "99999999999", "at": "1"},
]


async def test_no_acknowledged_revocation_is_lost_when_all_data_is_flushed(root: Root, directory: Path) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        before, incarnation = root.open_epoch(), root.incarnation()
        with faults.fault("FLUSHALL", "redis-a"), root.at("a") as server:
            server.flushall()
        await aside(root.opened_after, before)
        await traffic.flows()
        assert root.incarnation() not in ("", incarnation)
        assert relogged(faults, root) != []


@pytest.mark.parametrize(
    "key",
    [META_KEY, EPOCH_KEY, LOG_KEY],
)
@pytest.mark.slow
async def test_no_acknowledged_revocation_is_lost_when_a_key_of_the_log_is_deleted(
    root: Root, directory: Path, key: str
) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        before = root.open_epoch()
        with faults.fault("DEL", key), root.at("a") as server:
            assert server.delete(key) == 1
        await aside(root.opened_after, before)
        await traffic.flows()
        with root.at("a") as server:
            assert server.exists(META_KEY, EPOCH_KEY, LOG_KEY, BEAT_KEY) == 4


@pytest.mark.slow
async def test_everybody_is_fresh_again_soon_when_the_beat_of_an_old_epoch_is_deleted(
    root: Root, directory: Path
) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        with root.at("a") as server:
            server.hset(BEAT_KEY, "n", A_MONTH_OF_BEATS)
            await aside(until, lambda: confirmed_n(server) > A_MONTH_OF_BEATS, "beats of an old epoch are confirmed")
            await faults.fresh_everywhere()
            before = root.open_epoch()
            with faults.fault("DEL", BEAT_KEY):
                assert server.delete(BEAT_KEY) == 1
            gone = time.monotonic()
            for recorder in faults.recorders.values():
                later = gone + MAX_STALENESS_S
                await aside(recorder.wait_sample, lambda sample: sample.fresh and sample.mono > later, 120.0)  # noqa: B023
        await traffic.flows()
        assert root.open_epoch().number == before.number


async def test_an_entry_that_vanishes_from_the_middle_of_the_log_comes_back(root: Root, directory: Path) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        before = root.open_epoch()
        (id, place) = next(
            (each.id, each.position.partition(".")[0])
            for each in faults.ledger.revocations
            if each.position is not None and each.replicated_mono is not None
        )
        with faults.fault("silent hole", LOG_KEY), root.at("a") as server:
            assert server.xrevrange(LOG_KEY, count=1)[0][0] != place.encode()
            assert server.xdel(LOG_KEY, place) == 1
        await aside(root.opened_after, before)
        await aside(until, lambda: root.places().get(id, parse_stream_id(place)) > parse_stream_id(place), "it is back")
        await traffic.flows()
        await faults.restart_recorder("b")  # one that meets the hole and never had the entry
        await faults.fresh_everywhere()
        assert relogged(faults, root) == [id]


@pytest.mark.slow
async def test_no_key_is_lost_when_the_record_of_all_keys_is_deleted(root: Root, directory: Path) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        with root.at("a") as server:
            kids = set(server.hkeys(KEYS_KEY))
            with faults.fault("DEL", KEYS_KEY):
                assert server.delete(KEYS_KEY) == 1
        await traffic.flows()
        for region in faults.regions:
            served = (await faults.callers[region].jwks()).json()["keys"]
            assert {key["kid"].encode() for key in served} <= kids
            assert served != []
            assert await faults.mint(1, via=region)
        # The keepers put the records back with whatever changes the set next.
        assert (await faults.callers["a"].admin("POST", "/admin/keys/rotate", {})).status_code in (200, 202)
        for _ in range(200):
            with root.at("a") as server:
                if kids <= set(server.hkeys(KEYS_KEY)):
                    break
            await asyncio.sleep(0.1)
        with root.at("a") as server:
            assert kids <= set(server.hkeys(KEYS_KEY))


async def test_entries_that_nobody_can_read_stop_nobody(root: Root, directory: Path) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        skipped = {caller.region: await _skipped(caller) for caller in faults.callers.all}
        epoch = root.open_epoch()
        with faults.fault("poison", LOG_KEY), root.at("a") as server:
            for fields in GARBAGE:
                server.xadd(LOG_KEY, fields, id=f"{epoch.number}-*")
        await traffic.flows()
        for caller in faults.callers.all:
            assert await _skipped(caller) == skipped[caller.region] + len(GARBAGE)
        await faults.restart_recorder("b")  # one that has to read all of it from the first entry on
        await traffic.flows()
        assert root.open_epoch().number == epoch.number


def confirmed_n(server: Any) -> int:
    return int(server.hget(BEAT_KEY, "confirmed_n") or 0)


async def _skipped(caller: Caller) -> int:
    status = await caller.verifier_status()
    return int(status["counters"].get("entries_skipped", 0))
