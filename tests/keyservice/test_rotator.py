"""The rotator with a real server behind it: publish, wait, activate; two at once; keys that are revoked or missing."""

from __future__ import annotations

import asyncio
import base64
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from redis import Redis

from keyservice.core.keepers import Bump
from keyservice.errors import SigningUnavailable
from keyservice.limits import KEYS_REQUESTED_MAX
from keyservice.settings import Settings
from keyservice.trust import private_key_name, read_keys
from tests.keyservice.support import Running, Server
from verifier.jwk import thumbprint
from verifier.limits import JWKS_KEYS_MAX
from verifier.log import EPOCH_KEY, KEYS_KEY, region_key, serving_key
from verifier.testing import b64url

PRIVATE = private_key_name("eu-west-1")
QUICK = {
    "publish_lead_s": 1.5,
    "access_token_ttl_s": 60,
    "max_skew_s": 0.1,
    "jwks_max_age_s": 1,
    "replication_lag_s": 0,
    "rotator_tick_s": 0.1,
}


def states(running: Running) -> dict[str, str]:
    return {kid: record.state for kid, record in running.frontend.ring.records.items()}


async def settled(running: Running) -> None:
    """One key signs, and its successor stands by."""
    await running.until(lambda: sorted(states(running).values()) == ["active", "published"])


def active(running: Running) -> str:
    record = running.frontend.ring.active
    assert record is not None
    return record.kid


async def rotate(running: Running) -> Any:
    return await running.admin.post("/admin/keys/rotate", headers=await running.bearer())


async def test_a_requested_rotation_waits_for_the_lead_then_publishes_both(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(make_settings(server.url, **QUICK))
    await settled(running)
    first = active(running)
    old = running.frontend.ring.records
    published_at = next(r.published_at for r in old.values() if r.state == "published")
    answer = await rotate(running)
    if answer.status_code == 202:
        assert answer.json() == {
            "region": "eu-west-1",
            "replaced": first,
            "active": first,
            "activates_at": answer.json()["activates_at"],
            "waiting_for": answer.json()["waiting_for"],
            "excused": [],
        }
        if not answer.json()["waiting_for"]:
            assert answer.json()["activates_at"] >= published_at + 1.5
    await running.until(lambda: active(running) != first)
    now_active = running.frontend.ring.records[active(running)]
    assert now_active.active_at is not None
    assert now_active.active_at >= published_at + 1.5
    await running.until(lambda: sorted(states(running).values()) == ["active", "published", "retiring"])
    assert states(running)[first] == "retiring"
    assert first in running.frontend.ring.document.keys.kids
    assert (await running.admin.get("/admin/keys", headers=await running.bearer())).status_code == 200


async def test_a_rotation_that_may_happen_now_happens_now(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    offset_s = 0.0
    settings = make_settings(server.url, max_skew_s=3600, leeway_s=3601, drop_grace_s=7300, publish_lead_s=3605)
    running = await start_service(settings, clock=lambda: time.time() + offset_s)
    await settled(running)
    first = active(running)
    waiting = await rotate(running)
    assert waiting.status_code == 202
    with server.client() as client:
        client.delete("{ks}:rotation:eu-west-1")
    offset_s = 3_500.0
    keys = running.frontend.ring.records
    published = next(record for record in keys.values() if record.state == "published")
    with server.client() as client:
        earlier = msgspec.structs.replace(published, published_at=published.published_at - 200)
        client.hset(KEYS_KEY, published.kid, msgspec.json.encode(earlier))
        client.hset(serving_key("eu-west-1"), f"kid:{published.kid}", earlier.published_at * 1000)
    answer = await rotate(running)
    assert answer.status_code == 200
    assert (answer.json()["replaced"], answer.json()["active"]) == (first, published.kid)


def crowd(server: Server, count: int) -> None:
    """So many published keys of another region."""
    times = {"prepared_at": 1, "published_at": 1, "active_at": None, "retiring_at": None, "removed_at": None}
    with server.client() as client:
        for n in range(count):
            bare = {"kty": "RSA", "n": b64url((2**2047 + 2 * n + 1).to_bytes(256, "big")), "e": "AQAB"}
            jwk = {**bare, "use": "sig", "alg": "RS256", "kid": thumbprint(bare)}
            record = {"v": 1, "kid": jwk["kid"], "region": "us", "alg": "RS256", "jwk": jwk, "rev": 1, **times}
            client.hset(KEYS_KEY, jwk["kid"], msgspec.json.encode({**record, "state": "published"}))
        client.hincrby(EPOCH_KEY, "keys_n", 1)


async def test_near_the_limit_of_a_set_a_rotation_on_request_is_refused(running: Running, server: Server) -> None:
    await settled(running)
    crowd(server, KEYS_REQUESTED_MAX - 1)
    answer = await rotate(running)
    assert (answer.status_code, answer.json()["code"]) == (409, "key_set_nearly_full")
    with server.client() as client:
        assert not client.exists("{ks}:rotation:eu-west-1")


async def test_no_key_is_made_for_a_set_that_is_full(running: Running, server: Server) -> None:
    await settled(running)
    own = set(states(running))
    crowd(server, JWKS_KEYS_MAX - 1)
    with server.client() as client:
        standby = next(kid for kid, state in states(running).items() if state == "published")
        record = running.frontend.ring.records[standby]
        client.hset(KEYS_KEY, standby, msgspec.json.encode(msgspec.structs.replace(record, state="removed", rev=9)))
        client.hincrby(EPOCH_KEY, "keys_n", 1)
        keys = set(client.hkeys(KEYS_KEY))
        for _ in range(2):
            await running.frontend.rotator.tick()
            assert running.frontend.rotator.problem == "key_set_full"
        assert set(client.hkeys(KEYS_KEY)) == keys
        some = next(kid for kid in keys if kid.decode() not in own)
        client.hdel(KEYS_KEY, some)
        await running.frontend.rotator.tick()
        assert running.frontend.rotator.problem is None
        assert client.hlen(KEYS_KEY) == len(keys)


async def test_a_standby_that_does_not_open_is_never_activated(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    settings = make_settings(server.url)
    running = await start_service(settings)
    await settled(running)
    first = active(running)
    standby = next(kid for kid, state in states(running).items() if state == "published")
    await running.service.stop()
    with server.client() as client:
        envelope = msgspec.json.decode(client.hget(PRIVATE, standby))
        client.hset(PRIVATE, standby, msgspec.json.encode({**envelope, "data": envelope["key"]}))
        record = msgspec.json.decode(client.hget(KEYS_KEY, standby))
        client.hset(KEYS_KEY, standby, msgspec.json.encode({**record, "published_at": 1}))
        client.set("{ks}:rotation:eu-west-1", msgspec.json.encode({"kid": first, "at": 1}))
    again = await start_service(settings)
    await again.frontend.rotator.tick()
    with server.client() as client:
        assert msgspec.json.decode(client.hget(KEYS_KEY, standby))["state"] == "published"
    assert await again.token("orders")


async def test_two_instances_make_one_set_of_keys(
    server: Server, two_instances: Callable[..., tuple[Settings, Settings]], start_service: Any
) -> None:
    one, two = await asyncio.gather(*(start_service(settings) for settings in two_instances(server.url)))
    await one.until(lambda: sorted(states(one).values()) == ["active", "published"])
    await two.until(lambda: states(two) == states(one))
    assert active(one) == active(two)
    await asyncio.gather(*(running.frontend.rotator.tick() for running in (one, two) for _ in range(3)))
    assert sorted(states(one).values()) == ["active", "published"]
    assert await two.token("orders")


async def test_a_revoked_active_key_never_signs_again_and_the_standby_signs_at_once(running: Running) -> None:
    first = active(running)
    headers = await running.bearer()
    answer = await running.admin.post("/admin/revocations", json={"kind": "kid", "value": first}, headers=headers)
    assert answer.status_code == 200
    form = {"grant_type": "client_credentials"}
    answer = await running.public.post("/oauth2/token", data=form, auth=("orders", "s3cret"))
    if answer.status_code == 503:
        assert answer.json()["error_description"].startswith("signing_key_revoked")
    await running.until(lambda: active(running) != first)
    await running.ready()
    assert states(running)[first] == "compromised"
    assert first not in running.frontend.ring.document.keys.kids  # type: ignore[union-attr]
    assert (await running.admin.get("/admin/keys", headers=headers)).json()["code"] in ("token_revoked", "kid_unknown")
    assert (await running.admin.get("/admin/keys", headers=await running.bearer())).status_code == 200
    await running.until(lambda: sorted(states(running).values()) == ["active", "compromised", "published"])
    await running.until(lambda: _private_kids(running, first))


def _private_kids(running: Running, gone: str) -> bool:
    path = running.service.settings.redis_url.removeprefix("unix://")
    with Redis(unix_socket_path=path, driver_info=None) as client:
        return gone.encode() not in client.hkeys(PRIVATE)


async def test_a_private_half_that_the_server_lost_comes_back_from_the_keeper(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    settings = make_settings(server.url)
    running = await start_service(settings)
    await settled(running)
    signed, before = active(running), states(running)
    await running.service.stop()
    with server.client() as client:
        held = client.hgetall(PRIVATE)
        client.hdel(PRIVATE, signed)
        again = await start_service(settings)
        await again.until(lambda: client.hgetall(PRIVATE) == held)
    assert (active(again), states(again)) == (signed, before)
    assert await again.token("orders")


async def test_no_key_is_made_before_the_regions_keeper_has_put_back_what_it_holds(
    server: Server, two_instances: Callable[..., tuple[Settings, Settings]], start_service: Any
) -> None:
    with_keeper, beside = two_instances(server.url)
    running = await start_service(with_keeper)
    await settled(running)
    before = states(running)
    await running.until(lambda: len(running.keeper.disk.private()) == len(running.keeper.disk.keys()) == 2)
    voters = running.service.mirror.view.epoch.chain[-1].voters
    await running.service.stop()
    alone = await start_service(beside)
    with server.client() as client:
        client.flushall()
        assert await alone.service.trust.bump(Bump(0, None, voters))
        await alone.frontend.rotator.tick()
        assert alone.frontend.rotator.problem == "keeper_not_merged"
        assert not client.exists(KEYS_KEY, PRIVATE)
        again = await start_service(with_keeper.model_copy(update={"keeper_uds": None}))
        await again.until(lambda: alone.frontend.rotator.problem is None and states(alone) == before)
        assert {kid.decode() for kid in client.hkeys(KEYS_KEY)} == set(before)


async def test_a_private_half_that_nobody_has_stops_signing_and_makes_no_new_key(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(make_settings(server.url))
    await settled(running)
    before = states(running)
    await running.service.stop()
    with server.client() as client:
        client.hdel(PRIVATE, active(running))
        client.delete(region_key("eu-west-1"))  # and the keeper that also held it is gone with its disk
    again = await start_service(make_settings(server.url), ready=False)
    await again.until(lambda: "private_key_missing" in again.service.readiness().reasons)
    form = {"grant_type": "client_credentials"}
    answer = await again.public.post("/oauth2/token", data=form, auth=("orders", "s3cret"))
    assert answer.status_code == 503
    with pytest.raises(SigningUnavailable, match="private half") as caught:
        again.frontend.ring.signing_key()
    assert caught.value.code == "private_key_missing"
    await again.until(lambda: again.service.mirror.view.freshness.applied is not None)
    assert (await again.public.get("/.well-known/jwks.json")).status_code == 200
    await again.frontend.rotator.tick()
    assert states(again) == before


async def test_a_private_half_without_a_record_becomes_the_next_key(running: Running, server: Server) -> None:
    await settled(running)
    with server.client() as client:
        standby = next(kid for kid, state in states(running).items() if state == "published")
        client.hdel(KEYS_KEY, standby)
        client.hincrby(EPOCH_KEY, "keys_n", 1)
        await running.frontend.rotator.tick()
        assert sorted(client.hkeys(KEYS_KEY)) == sorted(kid.encode() for kid in states(running))
        assert client.hlen(PRIVATE) == 2


async def test_private_keys_are_stored_wrapped(running: Running, server: Server) -> None:
    await settled(running)
    with server.client() as client:
        envelopes = [msgspec.json.decode(envelope) for envelope in client.hvals(PRIVATE)]
    assert len(envelopes) == 2
    for envelope in envelopes:
        assert set(envelope) == {"v", "kek_id", "key", "data"}
        with pytest.raises(ValueError, match=r"\S"):
            serialization.load_der_private_key(base64.b64decode(envelope["data"]), None)


async def test_rotation_without_the_primary_says_so(running: Running, server: Server) -> None:
    headers = await running.bearer()
    server.kill()
    await running.until(lambda: running.service.beats.problem is not None)
    answer = await running.admin.post("/admin/keys/rotate", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (503, "primary_unreachable")


async def test_a_restarted_region_signs_from_its_replica_without_the_primary(
    start_server: Callable[..., Server], make_settings: Callable[..., Settings], start_service: Any
) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    primary = start_server("primary", "--port", port, "--bind", "127.0.0.1")
    replica = start_server("replica", "--port", "0", "--replicaof", "127.0.0.1", port)
    settings = make_settings(replica.url, primary_url=f"127.0.0.1:{port}", start_timeout_s=3)
    first = await start_service(settings.model_copy(update={"start_timeout_s": 60}))
    kid = active(first)
    await first.service.stop()
    primary.kill()
    again = await start_service(settings)
    assert active(again) == kid
    assert await again.token("orders")
    view = await read_keys(again.service.own, "eu-west-1")
    assert view.epoch is not None
