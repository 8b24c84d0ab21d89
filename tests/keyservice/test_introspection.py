"""RFC 7662: what is active, for whom, and from memory alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest

from keyservice.errors import SigningUnavailable
from keyservice.jobs import end
from keyservice.settings import Settings
from tests.keyservice.support import HS256_SECRET, ISSUER, Running, Server
from tests.keyservice.test_refreshing import start_session
from verifier.freshness import Freshness
from verifier.testing import make_key, sign

GATEWAY = ("gateway", "s3cret")


async def ask(running: Running, token: str, auth: tuple[str, str] = GATEWAY, **form: str) -> Any:
    return await running.public.post("/oauth2/introspect", data={"token": token, **form}, auth=auth)


async def answer_for(running: Running, token: str, **form: str) -> dict[str, Any]:
    answer = await ask(running, token, GATEWAY, **form)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = answer.json()
    return body


async def revoke(running: Running, kind: str, value: str) -> None:
    body = {"kind": kind, "value": value}
    assert (
        await running.admin.post("/admin/revocations", json=body, headers=await running.bearer())
    ).status_code == 200


def claims_of(token: str) -> dict[str, Any]:
    decoded: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return decoded


async def test_an_active_token_is_described(running: Running) -> None:
    session = await start_session(running)
    token = session["access_token"]
    told = await answer_for(running, token, token_type_hint="whatever")
    claims = claims_of(token)
    assert told == {"active": True, "token_type": "Bearer", **claims}
    assert {"scope", "client_id", "sub", "aud", "iss", "exp", "iat", "jti", "sid"} <= set(told)


async def test_a_legacy_token_is_described_too(running: Running) -> None:
    told = await answer_for(running, await running.token("legacy", audience="orders"))
    assert (told["active"], told["client_id"]) == (True, "legacy")


@pytest.mark.parametrize("kind", ["jti", "sid", "sub", "client", "kid"])
async def test_a_revoked_token_is_inactive_at_once(running: Running, kind: str) -> None:
    token = (await start_session(running))["access_token"]
    named = {**claims_of(token), "client": "web", "kid": jwt.get_unverified_header(token)["kid"]}
    assert (await answer_for(running, token))["active"] is True
    auth_before = await running.bearer()
    body = {"kind": kind, "value": named[kind]}
    assert (await running.admin.post("/admin/revocations", json=body, headers=auth_before)).status_code == 200
    assert await answer_for(running, token) == {"active": False}


async def test_what_is_no_good_token_is_inactive_and_nothing_more(running: Running) -> None:
    now = int(time.time())
    good = await running.token("orders")
    of_ours = {"iss": ISSUER, "aud": "orders", "sub": "x", "iat": now, "exp": now + 3_600}
    session = await start_session(running)
    tokens = [
        "nonsense",
        good[:-4] + "AAAA",
        session["refresh_token"],
        sign(make_key(), of_ours),
        jwt.encode({**of_ours, "iat": now - 99, "exp": now - 1}, HS256_SECRET, "HS256"),
        jwt.encode({**of_ours, "iss": "https://elsewhere.test"}, HS256_SECRET, "HS256"),
        jwt.encode({**of_ours, "exp": now + 10**6}, HS256_SECRET, "HS256"),
        jwt.encode(of_ours, "another secret of 32 bytes or more, yes", "HS256"),
        "x" * 60_000,
    ]
    for token in tokens:
        assert await answer_for(running, token) == {"active": False}
    assert (await answer_for(running, jwt.encode(of_ours, HS256_SECRET, "HS256")))["active"] is True


async def test_only_a_client_that_may_is_answered(running: Running) -> None:
    token = await running.token("orders")
    answer = await ask(running, token, ("orders", "s3cret"))
    assert (answer.status_code, answer.json()["error"]) == (403, "unauthorized_client")
    answer = await ask(running, token, ("gateway", "wrong"))
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
    assert answer.headers["www-authenticate"].startswith("Basic")
    answer = await running.public.post("/oauth2/introspect", data={"token": token})
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
    answer = await running.public.post("/oauth2/introspect", data={"x": "y"}, auth=GATEWAY)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


async def test_introspection_reads_nothing_from_redis(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    """Counted by the server, with everything stopped that asks it of its own accord."""
    running = await start_service(make_settings(server.url, introspect_on_stale="allow"))
    good, revoked = await running.token("orders"), await running.token("orders")
    await revoke(running, "jti", claims_of(revoked)["jti"])
    service = running.service
    service._stopping.set()
    await end(service._tasks)
    await running.frontend._rotation.stop()
    await service.receipts.stop()
    await running.keeper.stop()
    service.mirror.close()

    def commands() -> int:
        with server.client() as client:
            return int(client.info("stats")["total_commands_processed"])

    one_look = -commands() + commands()
    before = commands()
    for _ in range(50):
        assert (await answer_for(running, good))["active"] is True
        assert await answer_for(running, revoked) == {"active": False}
    assert commands() - before == one_look


async def test_a_stale_instance_vouches_for_nothing_but_refuses_what_it_knows(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, revoked = await running.token("orders"), await running.token("orders")
    await revoke(running, "jti", claims_of(revoked)["jti"])
    monkeypatch.setattr(running.frontend._introspector, "_is_fresh", lambda view: False)
    monkeypatch.setattr(running.frontend._introspector._tokens, "_is_fresh", lambda view: False)
    answer = await ask(running, good)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"] == "temporarily_unavailable"
    assert answer.json()["error_description"].startswith("revocations_stale")
    assert await answer_for(running, revoked) == {"active": False}
    now = int(time.time())
    unknown = sign(make_key(), {"iss": ISSUER, "aud": "orders", "sub": "x", "iat": now, "exp": now + 60})
    answer = await ask(running, unknown)
    assert answer.json()["error_description"].startswith("keys_behind")


async def test_stale_is_what_no_confirmed_beat_vouches_for(running: Running) -> None:
    view = running.service.mirror.view
    assert running.service.is_fresh(view)
    from dataclasses import replace

    assert not running.service.is_fresh(replace(view, freshness=Freshness(1.0, 86_400)))


async def test_a_clock_that_is_off_says_nothing_of_any_token(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    offset_s = 0.0
    running = await start_service(make_settings(server.url), clock=lambda: time.time() + offset_s)
    token = await running.token("orders")
    offset_s = -3.0
    await running.until(lambda: running.service.beats.problem == "clock_skew")
    answer = await ask(running, token)
    assert answer.status_code == 503
    assert answer.json()["error_description"].startswith("clock_skew")


async def test_past_the_signing_lease_tokens_are_still_judged(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await running.token("orders")

    def expired() -> None:
        raise SigningUnavailable("signing_lease_expired", "for too long")

    monkeypatch.setattr(running.frontend, "_check_lease", expired)
    form = {"grant_type": "client_credentials"}
    answer = await running.public.post("/oauth2/token", data=form, auth=("orders", "s3cret"))
    assert answer.json()["error_description"].startswith("signing_lease_expired")
    assert (await answer_for(running, token))["active"] is True
