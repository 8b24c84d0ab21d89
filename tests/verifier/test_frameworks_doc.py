"""docs/frameworks.md: its programs run as they stand, on real servers, and its tables name what there is."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import grpc
import httpx
import pytest

from tests.verifier import recipes
from tests.verifier.http_server import JwksServer
from tests.verifier.servers import uvicorn_of, wsgiref_of
from tests.verifier.support import AUDIENCE, ISSUER, live_token, until
from verifier import asgi, gateway, wsgi
from verifier.errors import CODES
from verifier.testing import SigningKey

TEXT = recipes.DOCUMENT.read_text()


@pytest.fixture(scope="module")
def recipe(key: SigningKey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ModuleType]]:
    """A section's program, imported once, with a key service behind it."""
    keys, made = JwksServer(key), dict[str, ModuleType]()
    directory = tmp_path_factory.mktemp("recipes")

    def of(heading: str) -> ModuleType:
        if heading not in made:
            made[heading] = recipes.module_of(heading, directory)
        return made[heading]

    with pytest.MonkeyPatch.context() as environment:
        for name in ("JWT_SECRET", "REDIS_ADDR"):
            environment.delenv(name, raising=False)
        environment.setenv("VERIFIER_ISSUER", ISSUER)
        environment.setenv("VERIFIER_AUDIENCE", AUDIENCE)
        environment.setenv("VERIFIER_JWKS_URLS", keys.url)
        environment.setenv("VERIFIER_REDIS_URL", "none")
        yield of
    for module in made.values():
        module.verifier.close()
    keys.close()


def asgi_server(app: Any) -> AbstractContextManager[str]:
    return uvicorn_of(app)


PROGRAMS: dict[str, tuple[str, str, Callable[[Any], AbstractContextManager[str]], str]] = {
    "FastAPI": ("FastAPI", "app", asgi_server, "/orders"),
    "Starlette": ("Starlette", "app", asgi_server, "/orders"),
    "Flask": ("Flask", "app", wsgiref_of, "/orders"),
    "Django, WSGI": ("Django", "application", wsgiref_of, "/orders"),
    "Django, WSGI, async view": ("Django", "application", wsgiref_of, "/orders-async"),
    "Django, ASGI": ("Django", "asgi_application", asgi_server, "/orders"),
    "Django, ASGI, async view": ("Django", "asgi_application", asgi_server, "/orders-async"),
}


def auth(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(("heading", "name", "server", "path"), list(PROGRAMS.values()), ids=list(PROGRAMS))
def test_the_program_answers_as_the_page_says(
    recipe: Callable[[str], ModuleType], key: SigningKey, heading: str, name: str, server: Any, path: str
) -> None:
    module = recipe(heading)
    some, enough = live_token(key), live_token(key, scope="orders:read", jti="enough")
    with server(getattr(module, name)) as url, httpx.Client(base_url=url, timeout=60) as client:
        until(lambda: module.verifier.status().ready, "the verifier has keys")
        answer = client.get(path, headers=auth(enough))
        assert (answer.status_code, answer.json()) == (200, {"customer": "ada"})
        assert client.get("/catalog").json() == {"customer": None}
        assert client.get("/catalog", headers=auth(some)).json() == {"customer": "ada"}
        for headers, status, code in (
            ({}, 401, "token_required"),
            (auth("bad"), 401, "token_malformed"),
            (auth(some), 403, "insufficient_scope"),
        ):
            answer = client.get(path, headers=headers)
            problem = answer.json().get("detail") if heading == "FastAPI" else answer.json()
            assert (answer.status_code, problem["code"]) == (status, code)
            assert len(answer.headers.get_list("www-authenticate")) == 1
            assert answer.headers["cache-control"] == "no-store"
            if heading != "FastAPI":
                assert answer.headers["content-type"] == "application/problem+json"


def test_the_grpc_program_answers_as_the_page_says(recipe: Callable[[str], ModuleType], key: SigningKey) -> None:
    module = recipe("gRPC")
    port = module.server.add_insecure_port("127.0.0.1:0")
    module.server.start()
    try:
        until(lambda: module.verifier.status().ready, "the verifier has keys")
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = channel.unary_unary("/orders.Orders/List")
            metadata = [("authorization", f"Bearer {live_token(key, scope='orders:read')}")]
            assert ask(b"", metadata=metadata, timeout=60) == b"orders of ada"
            with pytest.raises(grpc.RpcError) as caught:
                ask(b"", metadata=[("authorization", f"Bearer {live_token(key)}")], timeout=60)
            error: Any = caught.value
            assert error.code() == grpc.StatusCode.PERMISSION_DENIED
    finally:
        module.server.stop(0).wait()


def test_the_settings_are_those_of_the_middleware() -> None:
    names = re.findall(
        r"^\| `([a-z_]+)` \|", TEXT.split("## Settings that all have")[1].split("\n## ")[0], re.MULTILINE
    )
    for middleware in (asgi.AuthMiddleware, wsgi.AuthMiddleware):
        parameters = inspect.signature(middleware).parameters
        assert names == [name for name in parameters if name not in ("app", "verifier")]


def test_the_gateways_settings_and_headers_are_all_there() -> None:
    section = TEXT.split("## Services in other languages")[1].split("\n### ")[0]
    for header in gateway.IDENTITY_HEADERS:
        assert f"`{header}`" in section
    named = set(re.findall(r"`(?:VERIFIER_GATEWAY)?_([A-Z_]+)`", section.split("| setting |")[1]))
    assert {name.lower() for name in named} == set(gateway._READERS)
    for proxy in ("nginx", "Envoy", "Traefik"):
        configuration = TEXT.split(f"### {proxy}")[1].split("\n### ")[0].lower()
        for header in gateway.IDENTITY_HEADERS:
            assert header.lower() in configuration or (proxy == "Envoy" and "prefix: x-auth-" in configuration)


def test_every_code_on_the_page_is_one() -> None:
    table = TEXT.split("## What a caller is answered")[1].split("\n## ")[0]
    rows = [row.split("|") for row in table.splitlines() if row.startswith(("| 4", "| 5"))]
    codes = {code for row in rows for code in re.findall(r"`([a-z_]+)`", row[2])}
    assert codes - set(CODES) == {"token_required", "insufficient_scope", "invalid_request", "position_invalid"}
    ours = {"keys_unavailable", "keys_behind", "revocations_stale", "never_synced", "position_not_reached"}
    assert ours < codes


def test_every_block_is_run_or_is_configuration() -> None:
    assert set(re.findall(r"^```(\w+)$", TEXT, re.MULTILINE)) == {"python", "sh", "nginx", "yaml"}
    headings = {heading for heading, *_ in PROGRAMS.values()} | {"gRPC"}
    assert TEXT.count("```python\n") == len(headings)
