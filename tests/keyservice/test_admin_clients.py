"""Clients by the admin API: made once, secret shown once, the same in every instance, and never more than one has."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from keyservice.limits import CLIENT_LIST_MAX
from keyservice.settings import Settings
from tests.keyservice.support import ISSUER, Running, Server

NEW = {"client_id": "billing", "audiences": ["orders"], "scopes": ["orders:read"]}


async def call(running: Running, method: str, path: str = "", body: Any = None, client: str = "ops") -> Any:
    headers = await running.bearer(client)
    return await running.admin.request(method, f"/admin/clients{path}", json=body, headers=headers)


async def add(running: Running, **changes: Any) -> dict[str, Any]:
    answer = await call(running, "POST", body={**NEW, **changes})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def status(running: Running, client: str, secret: str) -> int:
    form = {"grant_type": "client_credentials"}
    return int((await running.public.post("/oauth2/token", data=form, auth=(client, secret))).status_code)


async def test_a_new_client_gets_tokens_with_the_secret_that_is_shown_once(running: Running, server: Server) -> None:
    made = await add(running)
    secret = made.pop("client_secret")
    assert await status(running, "billing", secret) == 200
    assert (await call(running, "GET", "/billing")).json() == made
    listed = (await call(running, "GET")).json()["clients"]
    assert made in listed
    assert {client["client_id"]: client["source"] for client in listed}["orders"] == "file"
    with server.client() as client:
        stored = b"".join(client.hgetall("{ks}:clients").values())
    assert b"$argon2id$" in stored
    assert secret.encode() not in stored
    assert "secret_hash" not in json.dumps(listed)


async def test_an_id_is_made_where_none_is_given(running: Running) -> None:
    made = await add(running, client_id=None)
    assert await status(running, made["client_id"], made["client_secret"]) == 200


async def test_every_instance_knows_a_client_and_forgets_a_deleted_one(
    server: Server, two_instances: Callable[..., tuple[Settings, Settings]], start_service: Any
) -> None:
    one, other = [await start_service(settings) for settings in two_instances(server.url)]
    secret = (await add(one))["client_secret"]
    await other.until(lambda: other.frontend.registry.get("billing"))
    assert await status(other, "billing", secret) == 200
    assert (await call(one, "DELETE", "/billing")).json() == {"client_id": "billing", "deleted": True}
    assert await status(one, "billing", secret) == 401
    await other.until(lambda: other.frontend.registry.get("billing") is None)
    assert await status(other, "billing", secret) == 401


async def test_clients_go_on_without_any_server_and_survive_one_that_comes_back_empty(
    running: Running, server: Server
) -> None:
    secret = (await add(running))["client_secret"]
    await running.until(lambda: running.frontend.registry._revision)
    with server.client() as client:
        stored = client.hgetall("{ks}:clients")
        client.delete("{ks}:clients", "{ks}:clients:revision")
        await running.frontend.registry.once()
        assert await status(running, "billing", secret) == 200
        assert client.hgetall("{ks}:clients") == stored, "put back"
        client.delete("{ks}:clients", "{ks}:clients:revision")
        await add(running, client_id="another")
        assert set(client.hgetall("{ks}:clients")) == {b"billing", b"another"}
    server.kill()
    await running.frontend.registry.once()
    assert await status(running, "billing", secret) == 200


async def test_a_restarted_instance_knows_them_at_once(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    settings = make_settings(server.url)
    running = await start_service(settings)
    secret = (await add(running))["client_secret"]
    await running.service.stop()
    again = await start_service(settings)
    assert await status(again, "billing", secret) == 200


async def test_a_client_is_changed_field_by_field(running: Running) -> None:
    made = await add(running)
    changed = (await call(running, "PATCH", "/billing", {"scopes": ["orders:write"], "introspect": True})).json()
    assert (changed["scopes"], changed["introspect"], changed["audiences"]) == (["orders:write"], True, ["orders"])
    assert "client_secret" not in changed
    assert await status(running, "billing", made["client_secret"]) == 200
    rotated = (await call(running, "PATCH", "/billing", {"secret": "new"})).json()
    assert await status(running, "billing", made["client_secret"]) == 401
    assert await status(running, "billing", rotated["client_secret"]) == 200
    answer = await call(running, "PATCH", "/billing", {"secret": "none"})
    assert (answer.status_code, answer.json()["code"]) == (422, "client_invalid"), "nothing to prove itself by"


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
async def test_a_client_of_the_file_is_read_only(running: Running, method: str) -> None:
    answer = await call(running, method, "/orders", {} if method == "PATCH" else None)
    assert (answer.status_code, answer.json()["code"]) == (409, "client_read_only")
    answer = await call(running, method, "/nobody", {} if method == "PATCH" else None)
    assert (answer.status_code, answer.json()["code"]) == (404, "client_unknown")


@pytest.mark.parametrize("client_id", ["billing", "orders"])
async def test_an_id_is_given_once(running: Running, client_id: str) -> None:
    await add(running)
    answer = await call(running, "POST", body={**NEW, "client_id": client_id})
    assert (answer.status_code, answer.json()["code"]) == (409, "client_exists")


async def test_of_two_changes_at_once_one_is_told(running: Running, server: Server) -> None:
    await add(running)
    registry = running.frontend.registry
    read = registry._read

    async def read_and_lose(client_id: str) -> Any:
        found = await read(client_id)
        with server.client() as client:
            client.hset("{ks}:clients", client_id, found[0].replace(b"orders:read", b"orders:writ"))
        return found

    registry._read = read_and_lose  # type: ignore[method-assign]
    answer = await call(running, "PATCH", "/billing", {"introspect": True})
    assert (answer.status_code, answer.json()["code"]) == (409, "client_changed")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"audiences": []}, "client_invalid"),
        ({"client_id": ""}, "client_invalid"),
        ({"client_id": "x" * 257}, "client_invalid"),
        ({"client_id": "a\nb"}, "client_invalid"),
        ({"scopes": ["two words"]}, "client_invalid"),
        ({"scopes": ["s"] * (CLIENT_LIST_MAX + 1)}, "client_invalid"),
        ({"with_secret": False}, "client_invalid"),
        ({"jwks": {"keys": [{"kty": "oct", "k": "AAAA"}]}}, "client_invalid"),
        ({"token_alg": "none"}, "body_invalid"),
        ({"secret_hash": "x"}, "body_invalid"),
    ],
)
async def test_a_client_that_could_not_work_is_not_made(running: Running, change: dict[str, Any], code: str) -> None:
    answer = await call(running, "POST", body={**NEW, **change})
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert (await call(running, "GET", "/billing")).status_code == 404


async def test_the_most_scopes_and_the_longest_id_are_accepted(running: Running) -> None:
    made = await add(running, client_id="x" * 256, scopes=[f"s{n}" for n in range(CLIENT_LIST_MAX)])
    assert await status(running, made["client_id"], made["client_secret"]) == 200


async def test_without_a_shared_secret_no_client_is_pinned_to_hs256(
    server: Server, make_settings: Callable[..., Settings], start_service: Any, clients_file: Any
) -> None:
    clients_file.write_text(clients_file.read_text().replace('token_alg = "HS256"', ""))
    running = await start_service(make_settings(server.url, jwt_secret=None))
    answer = await call(running, "POST", body={**NEW, "token_alg": "HS256"})
    assert (answer.status_code, answer.json()["code"]) == (422, "client_invalid")


async def test_scopes_are_needed_and_nobody_gives_more_than_they_have(running: Running) -> None:
    assert (await call(running, "GET", client="login")).status_code == 403
    assert (await call(running, "POST", body=NEW, client="login")).status_code == 403
    admin = [f"{ISSUER}/admin"]
    manager = await add(running, client_id="manager", audiences=admin, scopes=["keyservice:clients:write"])
    secret = {"secret": manager["client_secret"]}

    async def as_manager(method: str, path: str = "", body: Any = None) -> Any:
        headers = await running.bearer("manager", **secret)
        return await running.admin.request(method, f"/admin/clients{path}", json=body, headers=headers)

    wanted = {"client_id": "mine", "audiences": admin, "scopes": ["keyservice:admin"]}
    answer = await as_manager("POST", body=wanted)
    assert (answer.status_code, answer.json()["code"]) == (403, "scope_not_allowed")
    assert (await as_manager("POST", body={**wanted, "scopes": ["keyservice:clients:write"]})).status_code == 201
    assert (await as_manager("PATCH", "/mine", {"scopes": ["keyservice:keys:rotate"]})).status_code == 403
    assert (await as_manager("GET")).status_code == 403
    await add(running, client_id="root", audiences=admin, scopes=["keyservice:admin"])
    for method, body in (("PATCH", {"secret": "new"}), ("PATCH", {"scopes": []}), ("DELETE", None)):
        assert (await as_manager(method, "/root", body)).status_code == 403


async def test_without_the_primary_no_client_is_made_and_none_is_lost(
    running: Running, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = (await add(running))["client_secret"]
    headers = await running.bearer()
    server.kill()
    answer = await running.admin.post("/admin/clients", json={**NEW, "client_id": "other"}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (503, "primary_unreachable")
    assert await status(running, "billing", secret) == 200
