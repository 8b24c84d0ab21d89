"""The gateway, asked as the proxies ask: what it answers, and that no caller can loosen it or speak through it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from tests.verifier.http_server import JwksServer, free_port
from tests.verifier.servers import uvicorn_of
from tests.verifier.support import AUDIENCE, ISSUER, NONCE, Mirrored, live_token, token_of, until
from verifier import ConfigurationError
from verifier.gateway import IDENTITY_HEADERS, from_env, gateway
from verifier.testing import SigningKey

SUBJECTS = [
    "ada",
    "auth0|5f7c8e",
    "user@host.example",
    "https://id.example/u/1?a=b&c=d#e",
    "Ådåm 日本 \U0001f511",
    "a, b",
    "100%25",
    " padded ",
    'quo"ted\\',
    "x\r\nX-Auth-Scopes: admin",
    "x\nSet-Cookie: a=b",
    "tab\tnul\x00del\x7f",
]


def auth(token: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", **more}


@pytest.fixture(scope="module")
def client(key: SigningKey) -> Iterator[httpx.Client]:
    app = gateway(
        Mirrored(key, min_position_wait_s=0.01).verifier,
        optional_paths=["/optional"],
        path_scopes={"/admin": ["a:1"], "/admin/deep": ["a:2"], "/orders": ["o:1"]},
        health_path="/.gateway/ready",
        realm="gate",
    )
    with uvicorn_of(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_yes_is_200_and_says_who_it_is(client: httpx.Client, key: SigningKey) -> None:
    token = token_of(key, scope="orders:write orders:read", client_id="web", sid="s-1")
    answer = client.get("/auth", headers=auth(token))
    assert (answer.status_code, answer.content) == (200, b"")
    told = {name: answer.headers[name] for name in IDENTITY_HEADERS}
    assert told == {
        "X-Auth-Subject": "ada",
        "X-Auth-Client": "web",
        "X-Auth-Scopes": "orders:read orders:write",
        "X-Auth-Session": "s-1",
        "X-Auth-Staleness": "0.000",
    }
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_value_comes_back_whole_and_is_never_anything_but_a_value(
    client: httpx.Client, key: SigningKey, subject: str
) -> None:
    answer = client.get(
        "/", headers=auth(token_of(key, sub=subject, sid=subject, client_id=subject, scope=f"x {subject}"))
    )
    for name in ("X-Auth-Subject", "X-Auth-Client", "X-Auth-Session"):
        (value,) = answer.headers.get_list(name)
        assert unquote(value) == subject
        assert all("!" <= character <= "~" and character not in ',"\\' for character in value)
    scopes = frozenset(("x " + subject).split(" ")) - {""}
    assert {unquote(scope) for scope in answer.headers["X-Auth-Scopes"].split(" ")} == scopes
    assert len(answer.headers.raw) == len(answer.headers)
    assert "set-cookie" not in answer.headers


def test_whatever_is_not_known_is_an_empty_header_that_replaces_the_callers(
    client: httpx.Client, key: SigningKey
) -> None:
    forged = dict.fromkeys(IDENTITY_HEADERS, "root")
    for answer in (client.get("/optional", headers=forged), client.get("/", headers=forged | auth(token_of(key)))):
        assert answer.status_code == 200
        assert {name.lower() for name in IDENTITY_HEADERS} <= set(answer.headers)
        assert "root" not in str(answer.headers)
        assert answer.headers["X-Auth-Session"] == ""


def test_no_is_401_403_or_503_with_a_code_and_without_identity(client: httpx.Client, key: SigningKey) -> None:
    position = auth(token_of(key), **{"Trust-Position": f"1-9.{NONCE}"})
    for headers, path, status, code in (
        ({}, "/", 401, "token_required"),
        (auth("bad"), "/", 401, "token_malformed"),
        (auth("bad"), "/optional", 401, "token_malformed"),
        (auth(token_of(key)), "/?require_scope=a", 403, "insufficient_scope"),
        (position, "/", 503, "position_not_reached"),
        (auth(token_of(key), **{"Trust-Position": "x"}), "/", 400, "position_invalid"),
    ):
        answer = client.get(path, headers=headers)
        assert (answer.status_code, answer.headers["x-auth-code"], answer.json()["code"]) == (status, code, code)
        assert ("retry-after" in answer.headers) == (status == 503)
        assert len(answer.headers.get_list("www-authenticate")) == (0 if status == 503 else 1)
        assert not {name.lower() for name in IDENTITY_HEADERS} & set(answer.headers)


def status_of_target(client: httpx.Client, target: str, token: str | None = None) -> int:
    """The request's target as it stands: httpx would tidy it up."""
    connection = HTTPConnection(client.base_url.host, client.base_url.port or 80, timeout=60)
    connection.request("GET", target, headers={} if token is None else auth(token))
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/?require_scope=a:1+o:1", 200),
        ("/?require_scope=a:1&require_scope=o:2", 403),
        ("/?require_scope=", 200),
        ("/admin?require_scope=o:1", 200),
        ("/admin/deep", 403),
        ("/admin/deep?scope=&required=false&optional=1", 403),
        ("/?" + "a=1&" * 200, 400),
    ],
)
def test_a_query_can_only_ask_for_more(client: httpx.Client, key: SigningKey, target: str, status: int) -> None:
    assert status_of_target(client, target, token_of(key, scope="a:1 o:1", jti="some")) == status


SLY = [
    "/x/../admin", "/x/%2e%2e/admin", "//admin", "/x/%252e%252e/admin", "/./admin", "/x/..;/admin", "/x\\..\\admin",
    "/admin;x=1", "/admin;x=1/deep", "/admin%3Bx", "/%2561dmin", "/admin%3Fx", "/admin%23x", "/admin%00", "/admin%0A",
]  # fmt: skip


@pytest.mark.parametrize("target", ["/admin?require_scope=", "/orders/1", *SLY])
def test_a_path_that_others_may_read_differently_needs_every_scope(
    client: httpx.Client, key: SigningKey, target: str
) -> None:
    assert status_of_target(client, target, token_of(key, jti="none")) == 403


@pytest.mark.parametrize("target", ["/?required=false", "/x/optional", *(f"/optional{path}" for path in SLY)])
def test_a_path_that_others_may_read_differently_is_never_optional(client: httpx.Client, target: str) -> None:
    assert status_of_target(client, target) == 401
    assert status_of_target(client, "/optional/x") == 200


ENVOY = {"x-envoy-internal": "true", "x-forwarded-proto": "https", "x-envoy-original-path": "/optional"}
TRAEFIK = {
    "X-Forwarded-Method": "OPTIONS", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "shop.example",
    "X-Forwarded-Uri": "/optional", "X-Forwarded-For": "127.0.0.1",
}  # fmt: skip
NGINX = {"X-Original-URI": "/optional", "X-Original-Method": "GET"}


@pytest.mark.parametrize("sent", [ENVOY, TRAEFIK, NGINX], ids=["Envoy", "Traefik", "nginx"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE", "PROPFIND"])
def test_the_original_request_decides_nothing(
    client: httpx.Client, key: SigningKey, sent: dict[str, str], method: str
) -> None:
    assert client.request(method, "/v1/orders", headers=sent).status_code == 401
    assert client.request(method, "/v1/orders", headers=sent | auth(token_of(key))).status_code == 200


def test_a_health_path_is_the_operators_and_needs_no_token(client: httpx.Client, key: SigningKey) -> None:
    assert client.get("/.gateway/ready").status_code == 200
    with uvicorn_of(gateway(Mirrored(key, synced=False).verifier, health_path="/ready")) as url:
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/readyz").status_code == 401


# -- from the environment --------------------------------------------------------------------------------------------


def settings(keys_url: str) -> dict[str, str]:
    return {
        "VERIFIER_ISSUER": ISSUER,
        "VERIFIER_AUDIENCE": AUDIENCE,
        "VERIFIER_JWKS_URLS": keys_url,
        "VERIFIER_REDIS_URL": "none",
    }


async def status_of(app: Any, path: str, token: str | None = None) -> int:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gate") as client:
        return (await client.get(path, headers={} if token is None else auth(token))).status_code


async def test_every_setting_comes_from_the_environment(key: SigningKey) -> None:
    keys = JwksServer(key)
    app = from_env(
        settings(keys.url)
        | {
            "VERIFIER_GATEWAY_REQUIRED": "true",
            "VERIFIER_GATEWAY_OPTIONAL_PATHS": "/free, /open",
            "VERIFIER_GATEWAY_SCOPES": "a",
            "VERIFIER_GATEWAY_PATH_SCOPES": "/admin = b c; /x=d",
            "VERIFIER_GATEWAY_TRUST_POSITION": "false",
            "VERIFIER_GATEWAY_REALM": "gate",
            "VERIFIER_GATEWAY_HEALTH_PATH": "/ready",
        }
    )
    with app._verifier as verifier:
        assert verifier.wait_ready(60)
        some, enough = live_token(key, scope="a"), live_token(key, scope="a b c")
        assert [await status_of(app, path) for path in ("/free", "/open/1", "/", "/ready")] == [200, 200, 401, 200]
        assert [await status_of(app, path, some) for path in ("/", "/admin", "/x")] == [200, 403, 403]
        assert await status_of(app, "/admin", enough) == 200
    keys.close()


@pytest.mark.parametrize(
    "wrong",
    [{"VERIFIER_GATEWAY_REQUIERD": "true"}, {"VERIFIER_GATEWAY_REQUIRED": "yes"}, {"VERIFIER_GATEWAY_SCOPES": 'a"'}],
)
def test_a_setting_that_is_wrong_is_named(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError):
        from_env(settings("https://id.test/jwks.json") | wrong)


def test_it_runs_as_a_program_and_says_what_is_missing(key: SigningKey) -> None:
    keys, port = JwksServer(key), free_port()
    argv = [sys.executable, "-m", "uvicorn", "verifier.gateway:app", "--port", str(port), "--no-access-log"]
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("VERIFIER_", "REDIS_"))}
    failed = subprocess.run(argv, env=bare, capture_output=True, text=True, check=False, timeout=60)
    assert failed.returncode != 0
    assert "VERIFIER_ISSUER" in failed.stderr
    child = subprocess.Popen(argv, env=bare | settings(keys.url), stderr=subprocess.DEVNULL)
    try:
        until(lambda: listens(port), "the gateway listens", 60)
        url = f"http://127.0.0.1:{port}/"
        until(lambda: httpx.get(url, headers=auth(live_token(key))).status_code == 200, "it has keys", 60)
        assert httpx.get(url).status_code == 401
    finally:
        child.terminate()
        child.wait(30)
        keys.close()


def listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
