"""The gateway behind a real nginx, with the configuration of docs/frameworks.md as it stands (`make test-gateway`)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from tests.verifier.http_server import free_port
from tests.verifier.recipes import block
from tests.verifier.servers import uvicorn_of
from tests.verifier.support import NONCE, Mirrored, token_of, until
from verifier.gateway import IDENTITY_HEADERS, gateway
from verifier.testing import SigningKey

pytestmark = pytest.mark.system

FETCHED = Path(__file__).parents[2] / ".cache" / "servers" / "nginx"
AROUND = """
daemon off; master_process off; pid {directory}/pid; error_log stderr;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {directory}/a; proxy_temp_path {directory}/b; fastcgi_temp_path {directory}/c;
    uwsgi_temp_path {directory}/d; scgi_temp_path {directory}/e;
    {page}
}}
"""


def program() -> str:
    """NGINX, the one that `make test-gateway` fetched, or the system's."""
    found = os.environ.get("NGINX") or (str(FETCHED) if FETCHED.exists() else shutil.which("nginx"))
    assert found, "there is no nginx: `make test-gateway` fetches Debian's, or name one with NGINX="
    return found


async def orders(scope: Any, receive: Any, send: Any) -> None:
    """The service behind the proxy: says what reached it."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
    status = 500 if scope["path"] == "/broken" else 200
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps({"headers": headers, "body": body.decode()}).encode()})


class Proxied:
    """nginx in front of the service, and what the tests move."""

    def __init__(self, key: SigningKey, directory: Path, stack: ExitStack) -> None:
        self.mirrored = Mirrored(key, min_position_wait_s=0.01)
        self.gateway = ExitStack()
        gate = self.gateway.enter_context(uvicorn_of(gateway(self.mirrored.verifier)))
        service = stack.enter_context(uvicorn_of(orders, lifespan="off"))
        stack.callback(self.gateway.close)
        self.url = f"http://127.0.0.1:{free_port()}"
        page = block("nginx", "nginx")
        places = {"127.0.0.1:9000": gate, "127.0.0.1:8082": service, "listen 8080": f"listen {self.url}"}
        for place, url in places.items():
            assert page.count(place) == 1
            page = page.replace(place, url.replace("http://", ""))
        (directory / "nginx.conf").write_text(AROUND.format(directory=directory, page=page))
        argv = [program(), "-e", "stderr", "-p", str(directory), "-c", str(directory / "nginx.conf")]
        self.process = subprocess.Popen(argv)
        stack.callback(self.process.wait, 60)
        stack.callback(self.process.terminate)
        self.client = stack.enter_context(httpx.Client(base_url=self.url, timeout=60))
        until(self._answers, "nginx answers", 60)

    def _answers(self) -> bool:
        assert self.process.poll() is None
        try:
            return self.client.get("/").status_code == 401
        except httpx.TransportError:
            return False


@pytest.fixture
def proxied(key: SigningKey, run_dir: Path) -> Iterator[Proxied]:
    with ExitStack() as stack:
        yield Proxied(key, run_dir, stack)


def auth(token: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", **more}


def good(key: SigningKey, **claims: Any) -> str:
    return token_of(key, **{"scope": "orders:read orders:write", "sid": "s-1", "client_id": "web", **claims})


def reached(answer: httpx.Response) -> dict[str, list[str]]:
    assert answer.status_code == 200
    found: dict[str, list[str]] = {}
    for name, value in answer.json()["headers"]:
        found.setdefault(name, []).append(value)
    return found


FORGED = [(name, "root") for name in IDENTITY_HEADERS] + [("X_Auth_Subject", "root"), ("x-auth-subject", "root2")]


def test_the_service_is_told_who_it_is_and_never_what_the_caller_says(proxied: Proxied, key: SigningKey) -> None:
    headers = reached(proxied.client.get("/1?a=b", headers=[*auth(good(key)).items(), *FORGED]))
    told = {name: headers[name.lower()] for name in IDENTITY_HEADERS}
    assert told.pop("X-Auth-Staleness") == ["0.000"]
    assert told == {
        "X-Auth-Subject": ["ada"],
        "X-Auth-Client": ["web"],
        "X-Auth-Scopes": ["orders:read orders:write"],
        "X-Auth-Session": ["s-1"],
    }
    assert not {name for name in headers if "_" in name}
    bare = reached(
        proxied.client.get("/", headers=[*auth(good(key, sid=None, client_id=None, jti="2")).items(), *FORGED])
    )
    assert "x-auth-session" not in bare
    assert "x-auth-client" not in bare
    assert "root" not in str(bare)


def test_a_subject_cannot_end_its_header(proxied: Proxied, key: SigningKey) -> None:
    subject = "x\r\nX-Auth-Scopes: admin\r\n\r\nGET / 日本"
    headers = reached(proxied.client.get("/", headers=auth(good(key, sub=subject))))
    (value,) = headers["x-auth-subject"]
    assert unquote(value) == subject
    assert headers["x-auth-scopes"] == ["orders:read orders:write"]


def test_a_body_reaches_the_service_and_not_the_gateway(proxied: Proxied, key: SigningKey) -> None:
    answer = proxied.client.post("/", headers=auth(good(key)), content=b"order" * 1000)
    assert answer.json()["body"] == "order" * 1000
    assert proxied.client.post("/", content=b"order" * 1000).status_code == 401


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ("no token", 401, "token_required"),
        ("a bad token", 401, "token_malformed"),
        ("without scope", 403, "insufficient_scope"),
        ("position not reached", 503, "position_not_reached"),
        ("position junk", 400, "position_invalid"),
    ],
)
def test_each_refusal_comes_through_as_what_it_is(
    proxied: Proxied, key: SigningKey, sent: str, status: int, code: str
) -> None:
    known = {
        "no token": {},
        "a bad token": auth("bad"),
        "without scope": auth(token_of(key, scope="orders:write")),
        "position not reached": auth(good(key), **{"Trust-Position": f"1-9.{NONCE}"}),
        "position junk": auth(good(key), **{"Trust-Position": "junk"}),
    }
    answer = proxied.client.get("/", headers=known[sent])
    assert (answer.status_code, answer.json()["code"], answer.json()["status"]) == (status, code, status)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None)
    challenges = answer.headers.get_list("www-authenticate")
    assert len(challenges) == (1 if status in (401, 403) else 0)
    assert (status == 403) == ('scope="orders:read"' in str(challenges))


def test_a_revoked_token_is_refused_from_the_next_request_on(proxied: Proxied, key: SigningKey) -> None:
    assert proxied.client.get("/", headers=auth(good(key))).status_code == 200
    proxied.mirrored.revoke("jti", "t-1")
    assert proxied.client.get("/", headers=auth(good(key))).json()["code"] == "token_revoked"


def test_without_the_gateway_nothing_passes(proxied: Proxied, key: SigningKey) -> None:
    proxied.gateway.close()
    answer = proxied.client.get("/", headers=auth(good(key)))
    assert (answer.status_code, answer.json()["code"]) == (503, "gateway_unavailable")


def test_the_services_own_errors_stay_its_own(proxied: Proxied, key: SigningKey) -> None:
    answer = proxied.client.get("/broken", headers=auth(good(key)))
    assert (answer.status_code, set(answer.json())) == (500, {"headers", "body"})


@pytest.mark.parametrize("target", ["/.auth/orders", "/.auth/../.auth/orders", "/%2eauth/orders"])
def test_nobody_asks_the_gateway_from_outside(proxied: Proxied, target: str) -> None:
    answer = httpx.get(proxied.url + target, timeout=60)
    assert answer.status_code == 404
    assert not re.search("x-auth", str(answer.headers))
