"""The applications that the HTTP benchmarks serve, each made by a function without arguments, for `uvicorn --factory`.

All of `SHARES` have the same endpoint with the same answer; they differ in how its claims come about, and nothing else.
Keys come as a JWK set in `BENCH_JWKS`; the order service has its settings from the environment, as ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jwt
import msgspec
from fastapi import Depends, FastAPI, HTTPException, Request

from benchmarks.configuration import AUDIENCE, ISSUER, verifier_of
from examples.orders_service import create_app
from verifier import Verifier
from verifier.asgi import AuthMiddleware
from verifier.fastapi import bearer
from verifier.testing import StaticRevocations

ANSWER = {"customer": "user-1234567890", "orders": ["1 × espresso"]}


def _jwks() -> dict[str, Any]:
    jwks: dict[str, Any] = msgspec.json.decode(os.environ["BENCH_JWKS"])
    return jwks


def _app() -> FastAPI:
    return FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


def _verifier() -> Verifier:
    return verifier_of(_jwks(), 10_000, StaticRevocations())


def no_auth() -> FastAPI:
    app = _app()

    @app.get("/orders")
    async def orders(request: Request) -> dict[str, Any]:
        return ANSWER

    return app


def middleware() -> FastAPI:
    app = no_auth()
    app.add_middleware(AuthMiddleware, verifier=_verifier())
    return app


def _with_dependency(dependency: Callable[..., Any]) -> FastAPI:
    app = _app()

    @app.get("/orders")
    async def orders(claims: Any = Depends(dependency)) -> dict[str, Any]:
        return ANSWER

    return app


def empty_dependency() -> FastAPI:
    async def nothing(request: Request) -> None:
        return None

    return _with_dependency(nothing)


def depends() -> FastAPI:
    return _with_dependency(bearer(_verifier(), scopes=["orders:read"]))


def pyjwt() -> FastAPI:
    """A key object and the checks it has, in a dependency: how most services begin."""
    public = jwt.PyJWKSet.from_dict(_jwks()).keys[0].key

    async def claims(request: Request) -> dict[str, Any]:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        try:
            return jwt.decode(token, public, algorithms=["RS256"], audience=AUDIENCE, issuer=ISSUER)
        except jwt.InvalidTokenError:
            raise HTTPException(401) from None

    return _with_dependency(claims)


def orders() -> FastAPI:
    """The example order service as it is."""
    return create_app(Verifier.from_env())


def orders_no_auth() -> FastAPI:
    """The order service's endpoint and answer, with nobody asking for a token."""
    app = _app()

    @app.get("/orders")
    async def orders(request: Request) -> dict[str, Any]:
        return {"customer": "web", "orders": ["1 × espresso"], "staleness_s": 0.123}

    return app
