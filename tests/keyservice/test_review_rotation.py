"""Keys while a server is mute, late, or its clock was wrong; and what a compromise says of regions after a failover."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from keyservice.core.rotation import KeyRecord
from keyservice.jobs import KeyPoll
from keyservice.limits import KEYS_SILENCE_MAX_S
from keyservice.settings import Settings
from tests.keyservice.support import Proxy, Running, Server
from verifier.jwk import thumbprint
from verifier.log import EPOCH_KEY, KEYS_KEY, serving_key
from verifier.testing import b64url


async def test_a_region_that_starts_while_its_primary_is_mute_goes_on_serving_its_keys(
    server: Server, proxy: Proxy, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    settings = make_settings(server.url, primary_url=proxy.url, start_timeout_s=1)
    running = await start_service(settings)
    await running.service.stop()
    proxy.eats_answers = True
    again = await start_service(settings, ready=False)
    await again.until(lambda: again.frontend.ring.document is not None)
    deadline = time.monotonic() + 2 * KEYS_SILENCE_MAX_S
    worst_s = 0.0
    while time.monotonic() < deadline:
        worst_s = max(worst_s, again.service.poll.silence_s)
        await asyncio.sleep(0.05)
    assert worst_s < KEYS_SILENCE_MAX_S, again.service.readiness()
    assert (await again.public.get("/.well-known/jwks.json")).status_code == 200
    assert again.service.poll.problem is None


def stored(server: Server) -> dict[str, KeyRecord]:
    with server.client() as client:
        records = [msgspec.json.decode(raw, type=KeyRecord) for raw in client.hvals(KEYS_KEY)]
    return {record.kid: record for record in records}


async def settled(running: Running) -> None:
    """One key signs, and its successor stands by."""
    ring = running.frontend.ring
    await running.until(lambda: sorted(record.state for record in ring.records.values()) == ["active", "published"])


async def test_a_retired_key_stays_published_while_its_region_still_signs_with_it(
    server: Server, make_settings: Callable[..., Settings], start_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The region's own server lags, and its rotator reaches the primary."""
    quick = {"access_token_ttl_s": 1, "leeway_s": 1.2, "max_skew_s": 0.1, "replication_lag_s": 0, "jwks_max_age_s": 0}
    settings = make_settings(server.url, **quick, publish_lead_s=0.5, rotator_tick_s=0.1)
    running = await start_service(settings)
    await settled(running)
    active = running.frontend.ring.active
    assert active is not None
    read = KeyPoll._read

    async def nothing_new(poll: KeyPoll, node: Any) -> None:
        poll._read_mono = time.monotonic()

    with monkeypatch.context() as lagging:
        lagging.setattr(KeyPoll, "_read", nothing_new)
        with server.client() as client:
            client.hset(serving_key("eu-west-1"), mapping={f"kid:{kid}": 1 for kid in stored(server)})
            client.set("{ks}:rotation:eu-west-1", msgspec.json.encode({"kid": active.kid, "at": 1}))
        await running.until(lambda: stored(server)[active.kid].state == "retiring")
        await asyncio.sleep(2 * settings.rotation_policy.removal_delay_s)
        assert running.frontend.ring.signing_key().kid == active.kid
        assert stored(server)[active.kid].state == "retiring"
    assert KeyPoll._read is read
    await running.until(lambda: stored(server)[active.kid].state == "removed")


async def test_what_is_served_since_a_time_in_the_future_is_served_since_now(running: Running, server: Server) -> None:
    await settled(running)
    with server.client() as client:
        await running.until(lambda: client.hlen(serving_key("eu-west-1")) == 3)
        kids = [name for name in client.hkeys(serving_key("eu-west-1")) if name != b"nonce"]
        before = {kid: int(client.hget(serving_key("eu-west-1"), kid)) for kid in kids}
        client.hset(serving_key("eu-west-1"), kids[0], before[kids[0]] + 10**12)
        await running.service._key_keeper.repeat()
        after = {kid: int(client.hget(serving_key("eu-west-1"), kid)) for kid in kids}
    assert before[kids[0]] <= after[kids[0]] <= time.time() * 1000 + 60_000
    assert after[kids[1]] == before[kids[1]]


async def test_a_set_that_changed_since_the_evidence_was_read_is_decided_on_again(
    running: Running, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await settled(running)
    rotator = running.frontend.rotator
    serving, states = rotator._serving, list[str]()

    async def and_then_another_region_writes(view: Any) -> Any:
        found = await serving(view)
        states.append(stored(server)[compromised].state)
        if len(states) == 1:
            with server.client() as client:
                client.hincrby("{trust}:epoch", "keys_n", 1)
        return found

    monkeypatch.setattr(rotator, "_serving", and_then_another_region_writes)
    compromised = next(kid for kid, record in stored(server).items() if record.state == "published")
    monkeypatch.setattr(rotator, "_is_revoked", lambda kid: kid == compromised)
    await rotator.tick()
    assert stored(server)[compromised].state == "compromised"
    assert states[:2] == ["published", "published"]


async def test_a_region_that_holds_the_revocation_in_no_history_any_more_is_not_said_to_refuse_the_key(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a failover to a log that lacks it: the place that it had says nothing of what keepers hold now."""
    await settled(running)
    active, revoker = running.frontend.ring.active, running.frontend.revoker
    assert active is not None
    receipts = revoker.receipts

    async def of_another_history(entries: Any) -> Any:
        return [r._replace(replicated=False, regions=dict.fromkeys(r.regions, False)) for r in await receipts(entries)]

    monkeypatch.setattr(revoker, "receipts", of_another_history)
    monkeypatch.setattr("keyservice.compromising.EXPOSURE_WAIT_S", 0.5)
    answer = await running.admin.post(f"/admin/keys/{active.kid}/compromise", json={}, headers=await running.bearer())
    assert answer.status_code == 202
    assert answer.json()["exposure"]["eu-west-1"]["refused_after_ms"] is None


async def test_a_key_of_another_region_is_marked_as_the_primary_has_it(
    running: Running, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this region has read of it is a moment old, and its own region is gone."""
    await settled(running)
    bare = {"kty": "RSA", "n": b64url((2**2047 + 1).to_bytes(256, "big")), "e": "AQAB"}
    jwk = {**bare, "use": "sig", "alg": "RS256", "kid": thumbprint(bare)}
    theirs = KeyRecord(kid=jwk["kid"], region="us", alg="RS256", jwk=jwk, state="published", rev=1, published_at=1)
    active = msgspec.structs.replace(theirs, state="active", rev=2, active_at=2)
    monkeypatch.setattr("keyservice.compromising.EXPOSURE_WAIT_S", 0.5)
    with server.client() as client:
        client.hset(KEYS_KEY, theirs.kid, msgspec.json.encode(theirs))
        client.hincrby(EPOCH_KEY, "keys_n", 1)
        await running.until(lambda: theirs.kid in running.frontend.ring.records)
        client.hset(KEYS_KEY, theirs.kid, msgspec.json.encode(active))
    answer = await running.admin.post(f"/admin/keys/{theirs.kid}/compromise", json={}, headers=await running.bearer())
    assert answer.status_code in (200, 202)
    assert stored(server)[theirs.kid].state == "compromised"
    rev = stored(server)[theirs.kid].rev
    assert rev == 3
    await running.admin.post(f"/admin/keys/{theirs.kid}/compromise", json={}, headers=await running.bearer())
    assert stored(server)[theirs.kid].rev == rev, "once more changes nothing"
