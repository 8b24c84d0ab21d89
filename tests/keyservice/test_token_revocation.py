"""RFC 7009: a client ends its own tokens everywhere, nobody else's, and is told no more than that all is well."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest

from keyservice.settings import Settings
from tests.keyservice.support import HS256_SECRET, ISSUER, Proxy, Running, Server, eventually
from tests.keyservice.test_introspection import answer_for, claims_of
from tests.keyservice.test_refreshing import is_refused, session_key, start_session, successor


async def revoke(running: Running, token: str, client: str = "orders", **form: str) -> Any:
    return await running.public.post("/oauth2/revoke", data={"token": token, **form}, auth=(client, "s3cret"))


def entries(server: Server) -> list[tuple[str, str]]:
    with server.client() as client:
        log = [fields for _, fields in client.xrange("{trust}:log")]
    return [(e[b"kind"].decode(), e[b"value"].decode()) for e in log if e[b"kind"] != b"epoch"]


async def test_an_access_token_is_revoked_by_its_jti(running: Running, server: Server) -> None:
    token = await running.token("orders")
    answer = await revoke(running, token, token_type_hint="refresh_token")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["trust-position"].endswith(running.service.mirror.view.epoch.nonce)  # type: ignore[union-attr]
    assert entries(server) == [("jti", claims_of(token)["jti"])]
    assert await answer_for(running, token) == {"active": False}


async def test_a_legacy_token_without_jti_is_revoked_by_its_hash(running: Running, server: Server) -> None:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": "orders", "sub": "legacy", "client_id": "legacy", "iat": now, "exp": now + 3_600}
    token = jwt.encode(claims, HS256_SECRET, "HS256")
    assert (await revoke(running, token, "legacy")).status_code == 200
    assert [kind for kind, _ in entries(server)] == ["tok"]
    assert await answer_for(running, token) == {"active": False}


async def test_doing_it_again_is_the_same_entry(running: Running, server: Server) -> None:
    token = await running.token("orders")
    answers = [await revoke(running, token) for _ in range(3)]
    assert len({answer.headers["trust-position"] for answer in answers}) == 1
    assert len(entries(server)) == 1


async def test_a_refresh_token_takes_its_session_and_the_access_tokens_with_it(
    running: Running, server: Server
) -> None:
    session = await start_session(running)
    current = await successor(running, session["refresh_token"])
    answer = await revoke(running, current, "web", token_type_hint="access_token")
    assert answer.status_code == 200
    assert "trust-position" in answer.headers
    assert entries(server) == [("sid", session["sid"])]
    assert await answer_for(running, session["access_token"]) == {"active": False}
    assert await is_refused(running, current)
    with server.client() as client:
        assert not client.exists(session_key(session))


async def test_a_refresh_token_that_was_used_already_still_ends_its_session(running: Running, server: Server) -> None:
    session = await start_session(running)
    await successor(running, session["refresh_token"])
    assert (await revoke(running, session["refresh_token"], "web")).status_code == 200
    assert entries(server) == [("sid", session["sid"])]


async def test_what_is_unknown_or_somebody_else_s_is_200_and_nothing_is_done(running: Running, server: Server) -> None:
    session = await start_session(running)
    token = await running.token("orders")
    expired = {"iss": ISSUER, "aud": "x", "client_id": "orders", "iat": 1, "exp": 2}
    for text, client in [
        ("nonsense", "orders"),
        (token, "web"),
        (token[:-4] + "AAAA", "orders"),
        (session["access_token"], "orders"),
        (session["refresh_token"], "orders"),
        (f"{session['sid']}.{'x' * 65}", "web"),
        (f"nobody.{'x' * 65}", "web"),
        (jwt.encode(expired, HS256_SECRET, "HS256"), "orders"),
    ]:
        answer = await revoke(running, text, client)
        assert (answer.status_code, answer.content) == (200, b"")
        assert "trust-position" not in answer.headers
    assert entries(server) == []
    await successor(running, session["refresh_token"])


@pytest.mark.parametrize(
    ("form", "auth", "status", "error"),
    [
        ({"token": "x", "token_type_hint": "id_token"}, ("orders", "s3cret"), 400, "unsupported_token_type"),
        ({"x": "y"}, ("orders", "s3cret"), 400, "invalid_request"),
        ({"token": "x"}, ("orders", "wrong"), 401, "invalid_client"),
    ],
)
async def test_what_is_refused_has_the_shape_of_rfc_6749(
    running: Running, form: dict[str, str], auth: tuple[str, str], status: int, error: str
) -> None:
    answer = await running.public.post("/oauth2/revoke", data=form, auth=auth)
    assert (answer.status_code, answer.json()["error"]) == (status, error)


async def test_while_it_is_pending_it_is_503_stored_all_the_same_and_a_retry_finds_it(
    proxy: Proxy, server: Server, impatient: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(impatient(server.url, primary_url=proxy.url))
    session = await start_session(running)
    token = await running.token("orders")
    await proxy.cut()
    for text, client in ((token, "orders"), (session["refresh_token"], "web")):
        answer = await revoke(running, text, client)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error_description"].startswith("revocation_pending")
        assert "trust-position" not in answer.headers
    assert await answer_for(running, token) == {"active": False}, "in force here at once"
    assert await answer_for(running, session["access_token"]) == {"active": False}
    await proxy.open()
    for text, client in ((token, "orders"), (session["refresh_token"], "web")):
        again = await eventually(lambda t=text, c=client: revoke(running, t, c), lambda a: a.status_code == 200)  # type: ignore[misc]
        assert "trust-position" in again.headers
    assert sorted(entries(server)) == sorted([("jti", claims_of(token)["jti"]), ("sid", session["sid"])])
    await running.until(lambda: running.service.beats.problem is None)
    with server.client() as client:
        assert not client.exists(session_key(session))


async def test_while_nobody_can_say_whose_it_is_nothing_is_done_and_that_is_said(
    running: Running, server: Server
) -> None:
    session = await start_session(running)
    server.kill()
    answer = await revoke(running, session["refresh_token"], "web")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error_description"].startswith("session_store_unreachable")
