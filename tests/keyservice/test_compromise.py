"""One verb takes a key out of use everywhere, and says for how long it was still good where."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from keyservice.settings import Settings
from tests.keyservice.support import Running, Server
from tests.keyservice.three import REGIONS, Three
from verifier.log import serving_key


def states(running: Running) -> dict[str, str]:
    return {kid: record.state for kid, record in running.frontend.ring.records.items()}


def kid_in(running: Running, state: str, region: str = "eu-west-1") -> str:
    records = running.frontend.ring.records.values()
    return next(record.kid for record in records if record.state == state and record.region == region)


async def settled(running: Running) -> None:
    """Every region's keys: one signs, one stands by; and this region serves them all."""
    await running.until(lambda: sorted(states(running).values()).count("active") == len(regions_of(running)))
    await running.until(lambda: sorted(states(running).values()).count("published") == len(regions_of(running)))


def is_compromised(running: Running, kid: str) -> bool:
    return states(running)[kid] == "compromised"


def regions_of(running: Running) -> tuple[str, ...]:
    return running.service.settings.all_regions


async def served(running: Running) -> set[str]:
    answer = await running.public.get("/.well-known/jwks.json")
    assert answer.status_code == 200
    return {key["kid"] for key in answer.json()["keys"]}


async def compromise(running: Running, kid: str, **body: Any) -> Any:
    bearer = await running.bearer()
    return await running.admin.post(f"/admin/keys/{kid}/compromise", json=body, headers=bearer)


async def test_the_active_key_is_refused_unpublished_and_replaced_by_the_standby(running: Running) -> None:
    await settled(running)
    active, standby = kid_in(running, "active"), kid_in(running, "published")
    bearer = await running.bearer()
    answer = await compromise(running, active, reason="laptop stolen")
    body = answer.json()
    assert (answer.status_code, body["kids"]) == (200, [active])
    assert [receipt["durability"] for receipt in body["revocations"]] == ["replicated"]
    (seen,) = body["exposure"].values()
    assert seen["refused_after_ms"] >= 0
    assert seen["unpublished_after_ms"] >= 0
    assert seen["unknown_at_most_s"] is None
    assert body["third_party_clients"]["caching_at_most_s"] == running.service.settings.jwks_max_age_s
    assert active not in await served(running)
    await running.until(lambda: states(running)[active] == "compromised")
    assert kid_in(running, "active") == standby
    refused = await running.admin.get("/admin/keys", headers=bearer)
    assert (refused.status_code, refused.json()["code"]) == (401, "token_revoked")  # its own admin token, too
    assert (await running.admin.get("/admin/keys", headers=await running.bearer())).status_code == 200


async def test_all_keys_of_a_region_are_replaced_by_new_ones(running: Running) -> None:
    await settled(running)
    before = set(states(running))
    answer = await running.admin.post("/admin/keys/compromise", json={"all": True}, headers=await running.bearer())
    assert sorted(answer.json()["kids"]) == sorted(before)
    await running.until(lambda: {states(running)[kid] for kid in before} == {"compromised"})
    await running.until(lambda: {"active", "published"} <= {s for k, s in states(running).items() if k not in before})
    assert not before & await served(running)
    assert await running.bearer()


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("unknown-kid/compromise", {}, 404, "key_unknown"),
        ("compromise", {"all": False}, 422, "kid_missing"),
        ("compromise", {}, 422, "body_invalid"),
        ("unknown-kid/compromise", {"because": "x"}, 422, "body_invalid"),
    ],
)
async def test_bad_requests_are_named(running: Running, path: str, body: Any, status: int, code: str) -> None:
    answer = await running.admin.post(f"/admin/keys/{path}", json=body, headers=await running.bearer())
    assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_it_needs_its_own_scope(running: Running) -> None:
    bearer = await running.bearer("login")
    answer = await running.admin.post("/admin/keys/x/compromise", json={}, headers=bearer)
    assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")


async def test_an_activation_that_is_too_early_says_what_it_waits_for(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(make_settings(server.url, publish_lead_s=600))
    await settled(running)
    answer = await running.admin.post("/admin/keys/activate", headers=await running.bearer())
    assert (answer.status_code, answer.json()["code"]) == (409, "activation_too_early")
    assert "until" in answer.json()["detail"]


async def test_a_key_of_a_region_that_is_gone_is_taken_out_by_another(start_three: Any) -> None:
    three: Three = await start_three()
    first, second, _ = (three.running[region] for region in REGIONS)
    await settled(first)
    lost = kid_in(first, "active", REGIONS[2])
    await three.stop(REGIONS[2])
    answer = await compromise(first, lost)
    body = answer.json()
    assert answer.status_code == 202, body
    assert body["revocations"][0]["durability"] == "replicated"
    for region in REGIONS[:2]:
        assert body["exposure"][region]["unknown_at_most_s"] is None
    assert body["exposure"][REGIONS[2]]["refused_after_ms"] is None
    assert body["exposure"][REGIONS[2]]["unknown_at_most_s"] == first.service.settings.partition_budget_s
    for running in (first, second):
        await running.until(partial(is_compromised, running, lost))
        assert lost not in await served(running)


async def test_a_region_says_what_it_serves_and_since_when(running: Running, server: Server) -> None:
    await settled(running)
    with server.client() as client:
        await running.until(lambda: len(client.hgetall(serving_key("eu-west-1"))) == 3)
        said = {name.decode(): value for name, value in client.hgetall(serving_key("eu-west-1")).items()}
    nonce = running.service.mirror.view.epoch.nonce  # type: ignore[union-attr]
    assert said.pop("nonce").decode() == nonce
    assert {name.removeprefix("kid:") for name in said} == await served(running)
    records = running.frontend.ring.records
    assert all(int(at) / 1000 > (records[name[4:]].published_at or 0) - 2 for name, at in said.items())


async def test_an_instance_that_cannot_read_the_key_set_serves_none_and_signs_no_longer_than_its_key_may(
    running: Running, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await settled(running)
    assert await running.bearer()
    monkeypatch.setattr("keyservice.frontend.KEYS_SILENCE_MAX_S", -1.0)  # as if the last reading were long ago
    answer = await running.public.get("/.well-known/jwks.json")
    assert (answer.status_code, answer.json()["code"]) == (503, "key_set_unconfirmed")
    assert answer.headers["retry-after"]
    assert not running.service.readiness().ready
    monkeypatch.undo()
    assert await served(running)
    monkeypatch.setattr(type(running.service.poll), "silence_s", property(lambda self: 1e6))
    form = {"grant_type": "client_credentials"}
    refused = await running.public.post("/oauth2/token", data=form, auth=("orders", "s3cret"))
    assert refused.status_code == 503
    assert refused.json()["error_description"].startswith("key_set_unconfirmed")


async def test_past_the_partition_budget_a_region_neither_signs_nor_publishes_and_says_so(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(make_settings(server.url, partition_budget_s=4))
    await settled(running)
    assert await running.bearer()
    server.kill()
    form = {"grant_type": "client_credentials"}

    await running.until(lambda: "signing_lease_expired" in running.service.readiness().reasons, 60)
    answer = await running.public.post("/oauth2/token", data=form, auth=("orders", "s3cret"))
    assert answer.status_code == 503
    assert answer.json()["error_description"].startswith("signing_lease_expired")
    assert (await running.public.get("/.well-known/jwks.json")).status_code == 503
