"""The ASGI middleware: claims for the application, RFC 6750 answers for everyone else."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import pytest

from tests.verifier.servers import uvicorn_of
from tests.verifier.support import NONCE, Mirrored, make_verifier, token_of
from verifier import ConfigurationError, Undecidable, current_claims
from verifier.asgi import AuthMiddleware
from verifier.bearer import Challenge, bearer_token, challenge_for
from verifier.errors import CODES, InvalidToken
from verifier.testing import SigningKey


async def who(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it was given."""
    claims = scope.get("state", {}).get("claims", "nothing set")
    current = current_claims()
    assert claims == "nothing set" or current is claims
    answer = {"claims": claims if isinstance(claims, str | None) else dict(claims), "path": scope["path"]}
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://orders.test") as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def mirrored(key: SigningKey) -> Mirrored:
    return Mirrored(key)


@pytest.fixture
def app(mirrored: Mirrored) -> AuthMiddleware:
    return AuthMiddleware(who, mirrored.verifier, optional_paths=["/catalogue/"], public_paths=["/livez"])


async def test_a_good_token_gives_its_claims_and_only_during_the_request(app: AuthMiddleware, key: SigningKey) -> None:
    async with client_of(app) as client:
        for scheme in ("Bearer", "bearer", "BEARER", "Bearer  "):
            answer = await client.get("/orders", headers={"Authorization": f"{scheme} {token_of(key)}"})
            assert (answer.status_code, answer.json()["claims"]["sub"]) == (200, "ada")
    assert current_claims() is None


async def test_no_token_is_401_with_a_bare_challenge(app: AuthMiddleware) -> None:
    async with client_of(app) as client:
        answer = await client.get("/orders")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {"type": "about:blank", "title": "Unauthorized", "status": 401, "code": "token_required"}


async def test_a_bad_token_is_401_with_its_reason_and_nothing_of_the_token(
    app: AuthMiddleware, key: SigningKey
) -> None:
    token = token_of(key, aud="elsewhere")
    async with client_of(app) as client:
        answer = await client.get("/orders", headers=bearer(token))
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith('Bearer error="invalid_token", error_description="')
    assert answer.json()["code"] == "claim_invalid"
    assert "retry-after" not in answer.headers
    for part in token.split("."):
        assert part not in answer.text + str(answer.headers)


async def test_a_revoked_token_is_401_from_the_next_request_on(
    app: AuthMiddleware, mirrored: Mirrored, key: SigningKey
) -> None:
    async with client_of(app) as client:
        assert (await client.get("/orders", headers=bearer(token_of(key)))).status_code == 200
        mirrored.revoke("jti", "t-1")
        answer = await client.get("/orders", headers=bearer(token_of(key)))
    assert (answer.status_code, answer.json()["code"]) == (401, "token_revoked")


async def test_our_own_trouble_is_503_with_retry_after_and_no_challenge(key: SigningKey) -> None:
    mirrored = Mirrored(key, synced=False)
    async with client_of(AuthMiddleware(who, mirrored.verifier)) as client:
        answer = await client.get("/orders", headers=bearer(token_of(key)))
    assert (answer.status_code, answer.json()["code"]) == (503, "never_synced")
    assert int(answer.headers["retry-after"]) >= 1
    assert "www-authenticate" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"


async def test_misuse_is_not_disguised_as_an_answer(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    mirrored.verifier.close()
    async with client_of(AuthMiddleware(who, mirrored.verifier)) as client:
        with pytest.raises(ConfigurationError):
            await client.get("/orders", headers=bearer(token_of(key)))


@pytest.mark.parametrize("path", ["/catalogue", "/catalogue/", "/catalogue/1/2"])
async def test_below_an_optional_path_no_token_is_anonymous_and_a_bad_one_is_refused(
    app: AuthMiddleware, key: SigningKey, path: str
) -> None:
    async with client_of(app) as client:
        anonymous = await client.get(path)
        known = await client.get(path, headers=bearer(token_of(key)))
        bad = await client.get(path, headers=bearer("bad"))
    assert (anonymous.status_code, anonymous.json()["claims"]) == (200, None)
    assert known.json()["claims"]["sub"] == "ada"
    assert bad.status_code == 401


ODD_PATHS = [
    "/cataloguex", "/Catalogue", "/x/catalogue", "/", "/livezz", "//livez", "/LIVEZ", "/catalogue/../orders",
    "/catalogue/..", "/catalogue/./x", "/catalogue//x", "/catalogue/..;/orders", "/catalogue/%2e%2e/orders",
    "/catalogue/\\..\\orders", "/livez/%5c..", "/catalogue/.",
]  # fmt: skip


@pytest.mark.parametrize("path", ODD_PATHS)
async def test_a_path_is_a_prefix_of_whole_segments_or_required(app: AuthMiddleware, path: str) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [], "method": "GET"}
    await app(scope, None, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 401


async def test_a_public_path_is_passed_through_untouched(app: AuthMiddleware) -> None:
    async with client_of(app) as client:
        for headers in ({}, bearer("bad")):
            answer = await client.get("/livez", headers=headers)
            assert (answer.status_code, answer.json()["claims"]) == (200, "nothing set")


async def test_required_false_is_optional_everywhere(mirrored: Mirrored, key: SigningKey) -> None:
    async with client_of(AuthMiddleware(who, mirrored.verifier, required=False)) as client:
        assert (await client.get("/anything")).json()["claims"] is None
        assert (await client.get("/anything", headers=bearer("bad"))).status_code == 401
        assert (await client.get("/anything", headers=bearer(token_of(key)))).json()["claims"]["sub"] == "ada"


async def test_two_authorization_headers_are_a_bad_request(app: AuthMiddleware, key: SigningKey) -> None:
    good = ("Authorization", f"Bearer {token_of(key)}")
    async with client_of(app) as client:
        for second in (good, ("authorization", "Bearer x"), ("Authorization", "Basic x")):
            answer = await client.get("/orders", headers=[good, second])
            assert answer.status_code == 400
            assert 'error="invalid_request"' in answer.headers["www-authenticate"]


@pytest.mark.parametrize("value", ["Basic dXNlcjpwdw==", "Token x", "", "Bearerx", "DPoP x", "x"])
async def test_another_scheme_is_no_bearer_token(app: AuthMiddleware, value: str) -> None:
    async with client_of(app) as client:
        answer = await client.get("/orders", headers={"Authorization": value})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize(
    "value", [b"Bearer", b"Bearer ", b"Bearer a b", b"Bearer \xff\xfe", b"Bearer \xc3\xa9", b"Bearer a,b"]
)
async def test_a_bearer_scheme_without_a_token_or_with_junk_is_401(app: AuthMiddleware, value: bytes) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/orders", "headers": [(b"authorization", value)], "method": "GET"}
    await app(scope, None, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 401


async def test_head_has_headers_and_no_body(app: AuthMiddleware) -> None:
    async with client_of(app) as client:
        answer = await client.head("/orders")
    assert (answer.status_code, answer.content) == (401, b"")
    assert int(answer.headers["content-length"]) > 0


async def test_the_claims_of_one_request_are_not_seen_by_another(mirrored: Mirrored, key: SigningKey) -> None:
    seen: dict[str, Any] = {}

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await anyio.lowlevel.checkpoint()
        claims = current_claims()
        seen[scope["path"]] = None if claims is None else claims["sub"]
        await who(scope, receive, send)

    app = AuthMiddleware(slow, mirrored.verifier, required=False)
    async with client_of(app) as client, anyio.create_task_group() as group:
        for name in ("ada", "eve", None):
            headers = {} if name is None else bearer(token_of(key, sub=name, jti=name))
            group.start_soon(lambda n=name, h=headers: client.get(f"/{n}", headers=h))  # type: ignore[misc]
    assert seen == {"/ada": "ada", "/eve": "eve", "/None": None}


# -- WebSocket and lifespan ------------------------------------------------------------------------------------------


async def run_scope(app: Any, scope: dict[str, Any]) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await app(scope, receive, send)
    return sent


async def accept(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": f"{scope['type']}.accept", "sub": (scope.get("state", {}).get("claims") or {}).get("sub")})


async def test_a_websocket_is_accepted_with_a_token_and_closed_without(mirrored: Mirrored, key: SigningKey) -> None:
    app = AuthMiddleware(accept, mirrored.verifier)
    good = [(b"authorization", f"Bearer {token_of(key)}".encode())]
    (accepted,) = await run_scope(app, {"type": "websocket", "path": "/ws", "headers": good})
    assert accepted == {"type": "websocket.accept", "sub": "ada"}
    for headers in ([], [(b"authorization", b"Bearer bad")], good * 2):
        (closed,) = await run_scope(app, {"type": "websocket", "path": "/ws", "headers": headers})
        assert (closed["type"], closed["code"]) == ("websocket.close", 1008)
        assert len(closed["reason"].encode()) <= 123


async def test_lifespan_is_passed_through(key: SigningKey) -> None:
    app = AuthMiddleware(accept, make_verifier(key))
    assert await run_scope(app, {"type": "lifespan"}) == [{"type": "lifespan.accept", "sub": None}]


async def test_state_that_the_lifespan_shared_is_kept(mirrored: Mirrored, key: SigningKey) -> None:
    headers = [(b"authorization", f"Bearer {token_of(key)}".encode())]
    scope: dict[str, Any] = {"type": "websocket", "path": "/", "headers": headers, "state": {"pool": 1}}
    await run_scope(AuthMiddleware(accept, mirrored.verifier), scope)
    assert scope["state"]["pool"] == 1
    assert scope["state"]["claims"]["sub"] == "ada"


async def test_a_server_that_can_answer_a_handshake_gives_the_same_answer_as_to_a_request(
    mirrored: Mirrored, key: SigningKey
) -> None:
    scope = {"type": "websocket", "path": "/ws", "headers": [], "extensions": {"websocket.http.response": {}}}
    start, body = await run_scope(AuthMiddleware(accept, mirrored.verifier), scope)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)
    assert (b"www-authenticate", b"Bearer") in start["headers"]
    assert (body["type"], json.loads(body["body"])["code"]) == ("websocket.http.response.body", "token_required")


async def test_a_websocket_is_told_to_come_again_when_the_trouble_is_ours(key: SigningKey) -> None:
    app = AuthMiddleware(accept, Mirrored(key, synced=False).verifier)
    good = [(b"authorization", f"Bearer {token_of(key)}".encode())]
    (closed,) = await run_scope(app, {"type": "websocket", "path": "/ws", "headers": good})
    assert (closed["code"], closed["reason"]) == (1013, "never_synced")


async def test_a_token_anywhere_but_in_the_header_is_not_read(app: AuthMiddleware, key: SigningKey) -> None:
    token = token_of(key)
    async with client_of(app) as client:
        for answer in (
            await client.get("/orders", params={"access_token": token}),
            await client.post("/orders", data={"access_token": token}),
            await client.get("/orders", headers={"Cookie": f"access_token={token}"}),
            await client.get("/orders", headers={"X-Authorization": f"Bearer {token}"}),
        ):
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    scope = {"type": "websocket", "path": "/ws", "headers": [], "subprotocols": ["bearer", token]}
    (closed,) = await run_scope(app, scope)
    assert closed["code"] == 1008


# -- scopes and realm ------------------------------------------------------------------------------------------------


async def test_a_good_token_without_the_scopes_is_403_and_told_which(mirrored: Mirrored, key: SigningKey) -> None:
    app = AuthMiddleware(who, mirrored.verifier, scopes=["orders:write", "orders:read"], realm="orders")
    async with client_of(app) as client:
        few, all_of_them = (
            token_of(key, scope="orders:read x"),
            token_of(key, scope="orders:write orders:read", jti="2"),
        )
        assert [(await client.get("/", headers=bearer(all_of_them))).status_code for _ in range(2)] == [200, 200]
        assert (await client.get("/", headers=bearer(few))).status_code == 403
        lacking = await client.get("/", headers=bearer(few))  # remembered now
    assert lacking.status_code == 403
    assert lacking.headers.get_list("www-authenticate") == [
        'Bearer realm="orders", error="insufficient_scope", '
        'error_description="the token lacks a scope that is needed", scope="orders:read orders:write"'
    ]
    assert lacking.json()["code"] == "insufficient_scope"
    assert lacking.json()["scope"] == "orders:read orders:write"


@pytest.mark.parametrize(
    "settings", [{"scopes": "orders:read"}, {"scopes": ["a b"]}, {"scopes": [""]}, {"scopes": ['"']}]
)
def test_a_scope_that_no_token_can_have_is_a_wrong_setting(mirrored: Mirrored, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        AuthMiddleware(who, mirrored.verifier, **settings)
    with pytest.raises(ConfigurationError):
        AuthMiddleware(who, mirrored.verifier, realm='"')


# -- on a real server ------------------------------------------------------------------------------------------------


def raw(url: str, request: bytes) -> bytes:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(65_536):
            received += chunk
    return received


def test_over_a_socket_every_answer_has_one_challenge_and_head_has_no_body(mirrored: Mirrored, key: SigningKey) -> None:
    token = token_of(key).encode()
    with uvicorn_of(AuthMiddleware(who, mirrored.verifier), lifespan="off") as url:
        for method, authorization, status in (
            (b"GET", b"aUthOrization:bearer \t  " + token + b"  \r\n", b"200"),
            (b"GET", b"Authorization: BEARER " + token + b"\r\n", b"200"),
            (b"GET", b"Authorization: Bearer x\r\nauthorization: Bearer " + token + b"\r\n", b"400"),
            (b"GET", b"", b"401"),
            (b"HEAD", b"", b"401"),
            (b"HEAD", b"Authorization: Bearer x\r\n", b"401"),
        ):
            answer = raw(url, method + b" / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + authorization + b"\r\n")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.split(b" ")[1] == status
            assert head.lower().count(b"www-authenticate:") == (0 if status == b"200" else 1)
            assert bool(body) == (method == b"GET")


# -- the form of a refusal -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(CODES))
def test_what_is_said_fits_a_challenge(code: str) -> None:
    # RFC 6750 section 3: error_description must not hold characters outside %x20-21 / %x23-5B / %x5D-7E.
    challenge = challenge_for(InvalidToken(code, step=1, claim="exp", reason="not a number"))
    (value,) = [value for name, value in challenge.headers() if name == "www-authenticate"]
    description = value.split('error_description="')[1].removesuffix('"')
    assert all(" " <= character <= "~" and character not in '"\\' for character in description)


@pytest.mark.parametrize(("seconds", "header"), [(0.5, "1"), (1.0, "1"), (1.2, "2"), (30, "30")])
def test_retry_after_is_whole_seconds_and_never_too_early(seconds: float, header: str) -> None:
    challenge = challenge_for(Undecidable("keys_behind", retry_after_s=seconds))
    assert ("retry-after", header) in challenge.headers()


def test_bearer_token_reads_one_header() -> None:
    assert bearer_token([]) is None
    assert bearer_token([b"Bearer a.b.c"]) == "a.b.c"
    with pytest.raises(Challenge):
        bearer_token([b"Bearer a", b"Bearer a"])


async def test_a_position_that_is_not_reached_is_retried_later(key: SigningKey) -> None:
    mirrored = Mirrored(key, min_position_wait_s=0)
    with pytest.raises(Undecidable) as caught:
        await mirrored.verifier.averify(token_of(key), min_position=f"1-9.{NONCE}")
    (retry_after,) = [value for name, value in challenge_for(caught.value).headers() if name == "retry-after"]
    assert int(retry_after) >= 1
