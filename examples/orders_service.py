"""An order service that embeds the verifier: required and optional routes, health, and its own staleness.

    VERIFIER_ISSUER=… VERIFIER_AUDIENCE=orders VERIFIER_JWKS_URLS=… REDIS_ADDR=… python orders_service.py --port 8082

Settings come from the environment (``Verifier.from_env``). The ten lines that matter are in :func:`create_app`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response

from verifier import ConfigurationError, Verifier, current_claims
from verifier.asgi import AuthMiddleware


def create_app(verifier: Verifier) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with verifier:
            yield

    app = FastAPI(title="orders", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        AuthMiddleware,
        verifier=verifier,
        optional_paths=["/catalog"],
        public_paths=["/livez", "/readyz", "/status"],
    )

    @app.get("/orders")
    async def orders(request: Request) -> dict[str, Any]:
        claims = request.state.claims
        return {"customer": claims.subject, "orders": ["1 × espresso"], "staleness_s": claims.staleness_s}

    @app.get("/catalog")
    async def catalog() -> dict[str, Any]:
        claims = current_claims()
        return {"items": ["espresso", "ristretto"], "greeting": "hello, stranger" if claims is None else claims.subject}

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz(response: Response) -> dict[str, Any]:
        status = verifier.status()
        response.status_code = 200 if status.ready else 503
        return {"ready": status.ready, "problem": status.problem}

    @app.get("/status")
    async def show_status() -> dict[str, Any]:
        status: dict[str, Any] = msgspec.to_builtins(verifier.status())
        return status

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="An order service that embeds the verifier.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8082)
    parser.add_argument("--uds", help="listen on this unix socket instead")
    arguments = parser.parse_args()
    try:
        app = create_app(Verifier.from_env())
    except ConfigurationError as error:
        sys.exit(f"orders: error [{error.code}]: {error}")
    uvicorn.run(app, host=arguments.host, port=arguments.port, uds=arguments.uds, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
