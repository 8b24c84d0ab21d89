"""Refresh tokens: one successor for whoever repeats honestly, the end of the family for whoever reuses one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyservice.core.sessions import RefreshToken
from keyservice.settings import Settings
from tests.keyservice.support import ISSUER, Proxy, Running, Server, eventually, until
from tests.keyservice.three import StartThree

WEB = ("web", "s3cret")


async def start_session(running: Running, **changes: Any) -> dict[str, Any]:
    wanted = {"sub": "ada", "client_id": "web", "audience": "orders", "scope": "orders:read", **changes}
    answer = await running.admin.post("/admin/sessions", json=wanted, headers=await running.bearer("login"))
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def refresh(running: Running, token: str, **form: str) -> Any:
    form = {"grant_type": "refresh_token", "refresh_token": token, **form}
    return await running.public.post("/oauth2/token", data=form, auth=WEB)


async def successor(running: Running, token: str) -> str:
    answer = await refresh(running, token)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["refresh_token"])


async def is_refused(running: Running, token: str) -> bool:
    answer = await refresh(running, token)
    return (answer.status_code, answer.json().get("error")) == (400, "invalid_grant")


def session_key(session: dict[str, Any]) -> str:
    return f"{{ks}}:session:{session['sid']}"


def successor_key(session: dict[str, Any]) -> str:
    return f"{{ks}}:successor:{session['sid']}"


def end_grace(server: Server, session: dict[str, Any]) -> None:
    """What the server does by itself when the grace is over."""
    with server.client() as client:
        assert client.delete(successor_key(session)) == 1


def refreshes(running: Running, outcome: str) -> float:
    return running.service.metrics.registry.get_sample_value("keyservice_refreshes_total", {"outcome": outcome}) or 0.0


def is_revoked(running: Running, session: dict[str, Any]) -> bool:
    return running.service.mirror.snapshot.find(issuer=ISSUER, sid=session["sid"]) is not None


# -- sealing ----------------------------------------------------------------------------------------------------------


def test_only_the_token_that_was_presented_opens_its_successor() -> None:
    old = RefreshToken.new("sid")
    new = old.successor()
    sealed = old.seal(new)
    again = RefreshToken.parse(old.reveal())
    assert again is not None
    opened = again.open(sealed)
    assert opened is not None
    assert opened.reveal() == new.reveal()
    assert opened.family_digest == old.family_digest
    assert [other.open(sealed) for other in (new, RefreshToken.new("sid"), old.successor())] == [None] * 3
    assert old.open("no base64!") is old.open("AAAA") is old.open("") is None
    assert old.seal(new) != sealed, "two seals under one key never share a nonce"


def test_successors_are_random_and_not_made_from_the_old_token() -> None:
    old = RefreshToken.new("sid")
    assert len({old.successor().reveal() for _ in range(100)}) == 100


# -- repeated: a fork of nobody ---------------------------------------------------------------------------------------


async def test_parallel_refreshes_all_get_one_successor(running: Running) -> None:
    session = await start_session(running)
    answers = await asyncio.gather(*(refresh(running, session["refresh_token"]) for _ in range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len({answer.json()["refresh_token"] for answer in answers}) == 1
    assert (refreshes(running, "fresh"), refreshes(running, "repeated")) == (1, 7)
    following = await successor(running, answers[0].json()["refresh_token"])
    assert following not in (session["refresh_token"], answers[0].json()["refresh_token"])


async def test_two_instances_give_the_same_successor(
    server: Server, two_instances: Callable[..., tuple[Settings, Settings]], start_service: Any
) -> None:
    one, other = [await start_service(settings) for settings in two_instances(server.url)]
    session = await start_session(one)
    both = await asyncio.gather(*(successor(running, session["refresh_token"]) for running in (one, other)))
    assert both[0] == both[1]


async def test_a_refresh_whose_answer_was_lost_is_repeated(
    proxy: Proxy, server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(make_settings(server.url, primary_url=proxy.url))
    session = await start_session(running)
    current = {"refresh": b""}

    def consumed() -> bool:
        with server.client() as client:
            current["refresh"] = client.hget(session_key(session), "refresh")
        return current["refresh"] != RefreshToken.parse(session["refresh_token"]).digest.encode()  # type: ignore[union-attr]

    read = running.frontend._sessions.get

    async def get_and_then_silence(sid: str) -> Any:
        found = await read(sid)
        proxy.eats_answers = True
        return found

    running.frontend._sessions.get = get_and_then_silence
    answer = await refresh(running, session["refresh_token"])
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error_description"].startswith("outcome_unknown")
    assert consumed()
    running.frontend._sessions.get = read
    proxy.eats_answers = False
    await proxy.cut()
    await proxy.open()
    await running.until(lambda: running.service.beats.problem is None)
    repeated = await successor(running, session["refresh_token"])
    parsed = RefreshToken.parse(repeated)
    assert parsed is not None
    assert parsed.digest.encode() == current["refresh"], "what was stored before its answer was lost"
    assert not is_revoked(running, session)


async def test_the_grace_is_a_key_that_the_server_itself_expires(running: Running, server: Server) -> None:
    session = await start_session(running)
    await successor(running, session["refresh_token"])
    with server.client() as client:
        assert 0 < client.pttl(successor_key(session)) <= 300_000
        held = client.hgetall(session_key(session)) | client.hgetall(successor_key(session))
    assert set(held) == {b"data", b"family", b"refresh", b"of", b"sealed"}


async def test_without_a_grace_a_repeated_refresh_is_a_reuse(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(make_settings(server.url, refresh_grace_s=0))
    session = await start_session(running)
    await successor(running, session["refresh_token"])
    with server.client() as client:
        assert not client.exists(successor_key(session))
    assert await is_refused(running, session["refresh_token"])
    assert is_revoked(running, session)


async def test_no_token_of_the_family_is_readable_in_the_store(running: Running, server: Server) -> None:
    session = await start_session(running)
    tokens = [session["refresh_token"], await successor(running, session["refresh_token"])]
    with server.client() as client:
        stored = [*client.hgetall(session_key(session)).values(), *client.hgetall(successor_key(session)).values()]
    for token in tokens:
        parts = token.partition(".")[2]
        assert not any(part.encode() in value for value in stored for part in (parts[:22], parts[22:]))


# -- reused: somebody has a copy --------------------------------------------------------------------------------------


async def test_a_reuse_after_the_grace_revokes_the_family_everywhere(running: Running, server: Server) -> None:
    session = await start_session(running)
    current = await successor(running, session["refresh_token"])
    end_grace(server, session)
    assert await is_refused(running, session["refresh_token"])
    assert is_revoked(running, session), "its access tokens die too"
    assert await is_refused(running, current)
    assert refreshes(running, "reused") == 1
    with server.client() as client:
        assert not client.exists(session_key(session), successor_key(session))
        (entry,) = [fields for _, fields in client.xrange("{trust}:log") if fields[b"kind"] == b"sid"]
    assert (entry[b"value"].decode(), entry[b"reason"]) == (session["sid"], b"refresh token reused")


async def test_a_token_of_two_uses_ago_is_a_reuse_even_within_the_grace(running: Running) -> None:
    session = await start_session(running)
    second = await successor(running, session["refresh_token"])
    third = await successor(running, second)
    assert await is_refused(running, session["refresh_token"])
    assert is_revoked(running, session)
    assert await is_refused(running, third)


async def test_a_guess_that_knows_only_the_sid_ends_nothing(running: Running) -> None:
    session = await start_session(running)
    assert await is_refused(running, f"{session['sid']}.{'x' * 65}")
    assert not is_revoked(running, session)
    await successor(running, session["refresh_token"])


async def test_a_reuse_that_cannot_be_revoked_yet_is_dead_at_once_and_revoked_by_the_next(
    running: Running, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyservice.errors import KeeperUnavailable

    session = await start_session(running)
    current = await successor(running, session["refresh_token"])
    end_grace(server, session)

    async def unavailable(entries: Any) -> Any:
        raise KeeperUnavailable

    with monkeypatch.context() as patched:
        patched.setattr(running.service.intents, "intend", unavailable)
        assert await is_refused(running, session["refresh_token"])
        assert await is_refused(running, current), "dead without any revocation"
        assert not is_revoked(running, session)
    assert await is_refused(running, current)
    assert is_revoked(running, session)


# -- after a failover -------------------------------------------------------------------------------------------------


async def test_a_failover_that_loses_the_last_refresh_leaves_one_successor_and_costs_a_log_in_at_worst(
    running: Running, server: Server
) -> None:
    """The state before the refresh is put back, as a promoted replica that missed it has it."""
    session = await start_session(running)
    with server.client() as client:
        before = client.dump(session_key(session))
        lost = await successor(running, session["refresh_token"])
        client.restore(session_key(session), 0, before, replace=True)
        client.delete(successor_key(session))
    kept = await successor(running, session["refresh_token"])
    assert kept != lost
    assert await is_refused(running, lost), "the one that was lost is of the family, and not current"
    assert await is_refused(running, kept), "so nobody goes on: a new log-in"
    assert is_revoked(running, session)


async def test_a_failover_that_brings_an_ended_session_back_lets_it_refresh_no_more(
    running: Running, server: Server
) -> None:
    session = await start_session(running)
    with server.client() as client:
        before = client.dump(session_key(session))
        headers = await running.bearer("login")
        assert (await running.admin.delete(f"/admin/sessions/{session['sid']}", headers=headers)).status_code == 200
        client.restore(session_key(session), 0, before, replace=True)
        assert await is_refused(running, session["refresh_token"])
        assert not client.exists(session_key(session))


async def test_a_real_failover_that_lost_the_last_refresh_leaves_nobody_two_sessions(
    start_three: StartThree, run_dir: Path
) -> None:
    """us is promoted before the refresh reaches it; then the primary's region is gone."""
    three = await start_three()
    eu, us = three.running["eu"], three.running["us"]
    replication = three.proxies["us to ap"] = Proxy(run_dir / "replication", three.servers["us"].socket)
    session = await start_session(eu)
    with three.servers["us"].client() as promoted, three.servers["ap"].client() as other:
        until(lambda: promoted.exists(session_key(session)), 60)
        promoted.replicaof("NO", "ONE")
        lost = await successor(eu, session["refresh_token"])
        await three.stop("eu")
        three.servers["eu"].kill()
        other.replicaof("127.0.0.1", await replication.open_port())
    for region in ("us", "ap"):
        await three.proxies[region].lead_to(three.servers["us"].socket)
    await us.until(lambda: us.service.beats.problem is None, 60)
    await us.ready(60)

    kept = await eventually(lambda: refresh(us, session["refresh_token"]), lambda answer: answer.status_code == 200)
    assert kept.json()["refresh_token"] != lost
    assert await is_refused(us, lost)
    assert await is_refused(us, kept.json()["refresh_token"])
    await three.until_all(lambda running: is_revoked(running, session))


async def test_a_session_that_a_replica_has_not_got_yet_is_not_called_over(
    start_server: Callable[..., Server], make_settings: Callable[..., Settings], proxy: Proxy, start_service: Any
) -> None:
    """The primary was demoted and lacks the session: that is an outage, and no reason to log anybody out."""
    running = await start_service(make_settings(proxy.url))
    session = await start_session(running)
    replica = start_server("replica")
    with replica.client() as client:
        client.replicaof("127.0.0.1", "1")
    await proxy.lead_to(replica.socket)
    answer = await refresh(running, session["refresh_token"])
    assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")
    assert answer.json()["error_description"].startswith("session_store_unreachable")


# -- without the primary ----------------------------------------------------------------------------------------------


async def test_without_the_primary_a_session_has_no_refresh_token_and_a_refresh_is_refused_by_name(
    proxy: Proxy, server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(make_settings(server.url, primary_url=proxy.url))
    held = await start_session(running)
    headers = await running.bearer("login")
    await proxy.cut()
    wanted = {"sub": "ada", "client_id": "web", "audience": "orders"}
    answer = await running.admin.post("/admin/sessions", json=wanted, headers=headers)
    assert answer.status_code == 201
    assert "refresh_token" not in answer.json()
    assert {"access_token", "sid"} <= set(answer.json())
    answer = await refresh(running, held["refresh_token"])
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"] == "temporarily_unavailable"
    assert answer.json()["error_description"].startswith("session_store_unreachable")
    assert await running.token("orders")
