"""A login service in front of the key service: checks a password, then asks for a session.

    POST /login   {"username": …, "password": …}   → 200 the key service's tokens, 401 wrong
    POST /logout  Authorization: Bearer …          → the receipt of the session's revocation

The password is checked here and nowhere else; the key service is told who it was. Settings: ``LOGIN_USERS_FILE``
(TOML, ``[[users]]`` with ``username``, ``sub`` and an argon2id ``password_hash``), ``LOGIN_KEYSERVICE_URL``,
``LOGIN_ADMIN_URL``, ``LOGIN_CLIENT_ID``, ``LOGIN_CLIENT_SECRET``, ``LOGIN_AUDIENCE``, optional
``LOGIN_SOURCE_ADDRESS``, and those of the verifier, which reads the session's id out of the token at log-out.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from verifier import ConfigurationError, Verifier
from verifier.asgi import AuthMiddleware

TOKEN_MARGIN_S = 30


class SettingError(Exception):
    """A setting is missing or wrong; the message names it."""


class Credentials(BaseModel):
    model_config = ConfigDict(extra="forbid")
    username: str = Field(max_length=200)
    password: str = Field(max_length=1_000, repr=False)


@dataclass(frozen=True)
class User:
    sub: str
    password_hash: str = field(repr=False)


@dataclass(frozen=True)
class Settings:
    users_file: str
    keyservice_url: str
    admin_url: str
    client_id: str
    audience: str
    client_secret: str = field(repr=False)
    source_address: str | None = None

    @classmethod
    def from_env(cls) -> Settings:
        names = ("users_file", "keyservice_url", "admin_url", "client_id", "audience", "client_secret")
        values = {name: os.environ.get(f"LOGIN_{name.upper()}", "") for name in names}
        for name, value in values.items():
            if not value:
                raise SettingError(f"set LOGIN_{name.upper()}")
        return cls(**values, source_address=os.environ.get("LOGIN_SOURCE_ADDRESS"))


def load_users(path: str) -> dict[str, User]:
    try:
        document = tomllib.loads(Path(path).read_text())
        return {user["username"]: User(user["sub"], user["password_hash"]) for user in document["users"]}
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise SettingError(f"LOGIN_USERS_FILE cannot be used: {type(error).__name__} {error}") from None


class Passwords:
    """Checks passwords; an unknown user costs the same time as a wrong password."""

    def __init__(self, users: dict[str, User]) -> None:
        self._users = users
        self._hasher = PasswordHasher()
        self._decoy = self._hasher.hash(os.urandom(16).hex())

    def check(self, username: str, password: str) -> User | None:
        user = self._users.get(username)
        try:
            self._hasher.verify(user.password_hash if user else self._decoy, password)
        except (VerificationError, InvalidHashError):
            return None
        return user


class KeyService:
    """The key service's admin API, with a client-credentials token that is fetched again before it expires."""

    def __init__(self, settings: Settings, http: httpx.AsyncClient) -> None:
        self._settings = settings
        self._http = http
        self._token = ""
        self._renew_at = 0.0

    async def _bearer(self) -> dict[str, str]:
        if time.time() >= self._renew_at:
            reply = await self._http.post(
                f"{self._settings.keyservice_url}/oauth2/token",
                data={"grant_type": "client_credentials", "scope": "keyservice:sessions:write"},
                auth=(self._settings.client_id, self._settings.client_secret),
            )
            reply.raise_for_status()
            body = reply.json()
            self._token, self._renew_at = body["access_token"], time.time() + body["expires_in"] - TOKEN_MARGIN_S
        return {"Authorization": f"Bearer {self._token}"}

    async def _call(self, method: str, path: str, body: dict[str, str] | None = None) -> httpx.Response:
        """One call; again with a new token if this one was refused, for its key may have been revoked meanwhile."""
        url = f"{self._settings.admin_url}{path}"
        reply = await self._http.request(method, url, json=body, headers=await self._bearer())
        if reply.status_code == 401:
            self._renew_at = 0.0
            reply = await self._http.request(method, url, json=body, headers=await self._bearer())
        return reply

    async def create_session(self, sub: str) -> httpx.Response:
        body = {"sub": sub, "client_id": "web", "audience": self._settings.audience, "scope": "orders:read"}
        return await self._call("POST", "/admin/sessions", body)

    async def delete_session(self, sid: str) -> httpx.Response:
        return await self._call("DELETE", f"/admin/sessions/{sid}")


def problem(status: int, code: str, detail: str) -> JSONResponse:
    body = {"type": "about:blank", "status": status, "code": code, "detail": detail}
    return JSONResponse(body, status, media_type="application/problem+json")


def relay(reply: httpx.Response) -> JSONResponse:
    if reply.status_code in (401, 403):  # ours, not the user's: this service may not do what it must
        return problem(503, "keyservice_refused", "the key service refuses this service")
    return JSONResponse(reply.json(), reply.status_code, headers={"Cache-Control": "no-store"})


def create_app(settings: Settings, verifier: Verifier) -> FastAPI:
    passwords = Passwords(load_users(settings.users_file))
    transport = httpx.AsyncHTTPTransport(local_address=settings.source_address)
    http = httpx.AsyncClient(transport=transport, timeout=5.0, trust_env=False)
    keyservice = KeyService(settings, http)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with verifier, http:
            yield

    app = FastAPI(title="login", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(AuthMiddleware, verifier=verifier, public_paths=["/login", "/livez"])

    @app.exception_handler(httpx.HTTPError)
    async def unreachable(_: Request, error: Exception) -> JSONResponse:
        return problem(503, "keyservice_unreachable", f"the key service did not answer: {type(error).__name__}")

    @app.post("/login")
    async def login(credentials: Credentials) -> JSONResponse:
        user = await asyncio.to_thread(passwords.check, credentials.username, credentials.password)
        if user is None:
            return problem(401, "login_failed", "unknown user or wrong password")
        return relay(await keyservice.create_session(user.sub))

    @app.post("/logout")
    async def logout(request: Request) -> JSONResponse:
        sid = request.state.claims.get("sid")
        if sid is None:
            return problem(400, "no_session", "this token does not belong to a session")
        return relay(await keyservice.delete_session(sid))

    @app.get("/livez")
    async def livez() -> dict[str, Any]:
        return {"status": "alive"}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="A login service in front of the key service.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8083)
    parser.add_argument("--uds", help="listen on this unix socket instead")
    arguments = parser.parse_args()
    try:
        app = create_app(Settings.from_env(), Verifier.from_env())
    except (SettingError, ConfigurationError) as error:
        sys.exit(f"login: error: {error}")
    uvicorn.run(app, host=arguments.host, port=arguments.port, uds=arguments.uds, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
