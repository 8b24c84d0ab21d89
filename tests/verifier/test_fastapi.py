"""The FastAPI dependencies, on a real server: claims as a parameter, scopes, OpenAPI, and the middleware in front."""

# Annotations are read when a function is defined: the dependencies in them are local names.

from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Security

from tests.verifier.servers import uvicorn_of
from tests.verifier.support import NONCE, Mirrored, token_of
from verifier import Claims, Verifier, current_claims
from verifier.asgi import AuthMiddleware
from verifier.fastapi import AuthError, bearer, optional_bearer, problem_response
from verifier.testing import SigningKey


def app_of(verifier: Verifier, *, behind: Verifier | None = None, problems: bool = False, **middleware: Any) -> FastAPI:
    app = FastAPI()
    any_token = bearer(verifier, realm="orders")
    if behind is not None:
        app.add_middleware(AuthMiddleware, verifier=behind, **middleware)
    if problems:
        app.add_exception_handler(AuthError, problem_response)

    @app.get("/orders")
    async def orders(claims: Annotated[Claims, Depends(any_token)]) -> dict[str, Any]:
        return {"sub": claims.subject, "same": current_claims() is claims}

    @app.get("/in-a-thread")
    def in_a_thread(claims: Annotated[Claims, Depends(any_token)]) -> dict[str, Any]:
        return {"sub": claims.subject, "same": current_claims() is claims}

    @app.get("/catalog")
    async def catalog(claims: Annotated[Claims | None, Depends(optional_bearer(verifier))]) -> dict[str, Any]:
        return {"sub": claims and claims.subject, "same": current_claims() is claims}

    @app.get("/write", dependencies=[Depends(bearer(verifier, scopes=["orders:write"]))])
    async def write() -> dict[str, Any]:
        claims = current_claims()
        return {"sub": claims and claims.subject}

    @app.get("/both")
    async def both(claims: Annotated[Claims, Security(any_token, scopes=["orders:write", "a:b"])]) -> dict[str, Any]:
        return {"sub": claims.subject}

    @app.get("/open")
    async def open_to_all() -> dict[str, Any]:
        return {"sub": current_claims()}

    return app


@pytest.fixture(scope="module")
def mirrored(key: SigningKey) -> Mirrored:
    return Mirrored(key)


@pytest.fixture(scope="module")
def client(mirrored: Mirrored) -> Iterator[httpx.Client]:
    with uvicorn_of(app_of(mirrored.verifier)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def auth(token: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", **more}


@pytest.mark.parametrize("path", ["/orders", "/in-a-thread", "/catalog"])
def test_an_endpoint_gets_the_claims_and_so_does_everything_below_it(
    client: httpx.Client, key: SigningKey, path: str
) -> None:
    for _ in range(2):
        assert client.get(path, headers=auth(token_of(key))).json() == {"sub": "ada", "same": True}
    assert client.get("/open").json() == {"sub": None}


def test_without_a_token_it_is_401_or_nobody(client: httpx.Client) -> None:
    answer = client.get("/orders")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="orders"')
    assert answer.json()["detail"]["code"] == "token_required"
    assert client.get("/catalog").json() == {"sub": None, "same": True}
    assert client.get("/catalog", headers=auth("bad")).status_code == 401


@pytest.mark.parametrize("path", ["/write", "/both"])
def test_scopes_are_needed_wherever_they_are_named(client: httpx.Client, key: SigningKey, path: str) -> None:
    lacking = token_of(key, scope="orders:read", jti="lacking")
    for _ in range(2):
        answer = client.get(path, headers=auth(lacking))
        assert answer.status_code == 403
        (challenge,) = answer.headers.get_list("www-authenticate")
        assert 'error="insufficient_scope"' in challenge
        assert "orders:write" in challenge.split('scope="')[1]
        assert answer.json()["detail"]["code"] == "insufficient_scope"
    enough = token_of(key, scope="orders:write a:b", jti="enough")
    assert client.get(path, headers=auth(enough)).json() == {"sub": "ada"}


def test_a_request_that_cannot_be_read_is_400(client: httpx.Client, key: SigningKey) -> None:
    twice = [("Authorization", f"Bearer {token_of(key)}"), ("Authorization", "Bearer x")]
    assert client.get("/orders", headers=twice).json()["detail"]["code"] == "invalid_request"
    answer = client.get("/orders", headers=auth(token_of(key), **{"Trust-Position": "junk"}))
    assert (answer.status_code, answer.json()["detail"]["code"]) == (400, "position_invalid")


def test_our_own_trouble_is_503_with_retry_after(key: SigningKey) -> None:
    mirrored = Mirrored(key, min_position_wait_s=0.01)
    with uvicorn_of(app_of(mirrored.verifier, problems=True)) as url:
        answer = httpx.get(f"{url}/orders", headers=auth(token_of(key), **{"Trust-Position": f"1-9.{NONCE}"}))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "position_not_reached"
    assert "www-authenticate" not in answer.headers


def test_with_its_handler_a_refusal_is_the_middlewares(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    with uvicorn_of(app_of(mirrored.verifier, problems=True)) as url:
        for headers in ({}, auth("bad"), auth(token_of(key))):
            ours = httpx.get(f"{url}/write", headers=headers)
            app = AuthMiddleware(app_of(mirrored.verifier), mirrored.verifier, scopes=["orders:write"])
            with uvicorn_of(app, lifespan="off") as other:
                theirs = httpx.get(f"{other}/write", headers=headers)
            assert (ours.status_code, ours.content) == (theirs.status_code, theirs.content)
            for name in ("www-authenticate", "cache-control", "content-type", "content-length"):
                assert ours.headers.get_list(name) == theirs.headers.get_list(name)


class Counting:
    """A verifier's face that counts how often it is asked."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier, self.asked = verifier, 0

    async def averify(self, token: str, **bounds: Any) -> Claims:
        self.asked += 1
        return await self._verifier.averify(token, **bounds)

    def remembered(self, token: str) -> None:
        self.asked += 1


def test_behind_the_middleware_nothing_is_verified_twice(key: SigningKey) -> None:
    verifier: Any = Counting(Mirrored(key).verifier)
    with uvicorn_of(app_of(verifier, behind=verifier, required=False)) as url:
        assert httpx.get(f"{url}/orders", headers=auth(token_of(key))).json() == {"sub": "ada", "same": True}
        assert verifier.asked == 2  # a glance, then the whole
        assert httpx.get(f"{url}/write", headers=auth(token_of(key))).status_code == 403
        assert httpx.get(f"{url}/orders").status_code == 401
        assert httpx.get(f"{url}/catalog").json() == {"sub": None, "same": True}
        assert verifier.asked == 4


def test_the_claims_of_another_verifier_in_front_count_for_nothing(key: SigningKey, other_key: SigningKey) -> None:
    app = app_of(Mirrored(key).verifier, behind=Mirrored(other_key).verifier)
    with uvicorn_of(app) as url:
        assert httpx.get(f"{url}/orders", headers=auth(token_of(other_key))).status_code == 401


def test_a_path_that_the_middleware_leaves_alone_is_still_guarded_by_the_dependency(key: SigningKey) -> None:
    verifier = Mirrored(key).verifier
    with uvicorn_of(app_of(verifier, behind=verifier, public_paths=["/orders"])) as url:
        assert httpx.get(f"{url}/orders").status_code == 401
        assert httpx.get(f"{url}/orders", headers=auth(token_of(key))).json() == {"sub": "ada", "same": True}


def test_the_openapi_document_names_the_scheme_and_who_needs_it(mirrored: Mirrored) -> None:
    document = app_of(mirrored.verifier).openapi()
    assert document["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    }
    assert document["paths"]["/orders"]["get"]["security"] == [{"bearer": []}]
    assert document["paths"]["/both"]["get"]["security"] == [{"bearer": ["orders:write", "a:b"]}]
    assert "security" not in document["paths"]["/open"]["get"]
    assert "parameters" not in document["paths"]["/orders"]["get"]
