"""``/admin/clients``: list, make, change and delete clients. Those of the clients file can be read only.

A secret is made here, shown once and stored as a hash. Nobody gives away more than they have: a client's scopes of this
service (``keyservice:…``) are among the caller's own, or the caller is ``keyservice:admin``. That holds for whoever
makes, changes or deletes a client, because a new secret is as good as the client's scopes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from keyservice.bearer import ADMIN_SCOPE, AdminBearer, Caller
from keyservice.clients import Authenticator, Client
from keyservice.core.ids import uuid7
from keyservice.errors import RequestRefused
from keyservice.registry import ClientRegistry, Registered

from .body import read_json
from .problems import json_response

__all__ = ["router"]

READ_SCOPE: Final = "keyservice:clients:read"
WRITE_SCOPE: Final = "keyservice:clients:write"
OWN_SCOPES: Final = "keyservice:"
NEW: Final = "new"

Alg = Literal["RS256", "HS256"]


class NewClient(msgspec.Struct, forbid_unknown_fields=True):
    """Without ``client_id`` one is made; ``with_secret`` is the default where there is no ``jwks``."""

    audiences: tuple[str, ...]
    client_id: str | None = None
    scopes: tuple[str, ...] = ()
    token_alg: Alg = "RS256"
    introspect: bool = False
    jwks: dict[str, Any] | None = None
    with_secret: bool | None = None


class ClientPatch(msgspec.Struct, forbid_unknown_fields=True):
    """What is absent stays. ``secret`` new makes another one, none takes it away; ``jwks`` null takes the keys away."""

    audiences: tuple[str, ...] | UnsetType = UNSET
    scopes: tuple[str, ...] | UnsetType = UNSET
    token_alg: Alg | UnsetType = UNSET
    introspect: bool | UnsetType = UNSET
    jwks: dict[str, Any] | UnsetType | None = UNSET
    secret: Literal["new", "none"] | UnsetType = UNSET

    def changes(self) -> dict[str, Any]:
        """The fields that are given, but for the secret."""
        named = ("audiences", "scopes", "token_alg", "introspect", "jwks")
        return {name: value for name in named if (value := getattr(self, name)) is not UNSET}


def _described(client: Client, registered: Registered | None) -> dict[str, Any]:
    return {
        "client_id": client.client_id,
        "source": "file" if registered is None else "api",
        "scopes": client.scopes,
        "audiences": client.audiences,
        "token_alg": client.token_alg,
        "introspect": client.introspect,
        "has_secret": bool(client.secret_hash),
        "jwks": client.jwks,
        "created_at": registered.created_at if registered is not None else None,
        "updated_at": registered.updated_at if registered is not None else None,
    }


class _Api:
    """The handlers."""

    def __init__(
        self,
        bearer: AdminBearer,
        registry: ClientRegistry,
        authenticator: Authenticator,
        *,
        hs256: bool,
        clock: Callable[[], float],
    ) -> None:
        self._bearer = bearer
        self._registry = registry
        self._authenticator = authenticator
        self._hs256 = hs256
        self._clock = clock

    def _caller(self, request: Request, scope: str) -> Caller:
        return self._bearer.check(request.headers.get("authorization"), scope)

    def _check(self, caller: Caller, client: Client) -> Client:
        if client.token_alg == "HS256" and not self._hs256:
            raise RequestRefused("client_invalid", "token_alg HS256 needs JWT_SECRET, which is not set")
        return _check_scopes(caller, client)

    async def _secret(self) -> tuple[str, str]:
        secret = secrets.token_urlsafe(32)
        return secret, await self._authenticator.hash(secret)

    async def listing(self, request: Request) -> Response:
        self._caller(request, READ_SCOPE)
        return json_response({"clients": [_described(*one) for one in self._registry]})

    async def one(self, client_id: str, request: Request) -> Response:
        self._caller(request, READ_SCOPE)
        client = self._registry.get(client_id)
        if client is None:
            raise RequestRefused("client_unknown", "there is no client with this id", status=404)
        return json_response(_described(client, self._registry.registered(client_id)))

    async def add(self, request: Request) -> Response:
        caller = self._caller(request, WRITE_SCOPE)
        wanted = await read_json(request, NewClient)
        with_secret = wanted.jwks is None if wanted.with_secret is None else wanted.with_secret
        client = Client(
            client_id=uuid7(self._clock()) if wanted.client_id is None else wanted.client_id,
            scopes=wanted.scopes,
            audiences=wanted.audiences,
            token_alg=wanted.token_alg,
            introspect=wanted.introspect,
            jwks=wanted.jwks,
        )
        self._check(caller, client)
        secret, hashed = await self._secret() if with_secret else (None, "")
        registered = await self._registry.add(msgspec.structs.replace(client, secret_hash=hashed))
        return _answer(registered, secret, 201)

    async def change(self, client_id: str, request: Request) -> Response:
        caller = self._caller(request, WRITE_SCOPE)
        patch = await read_json(request, ClientPatch)
        secret, hashed = await self._secret() if patch.secret == NEW else (None, "")
        changes = patch.changes() | ({} if patch.secret is UNSET else {"secret_hash": hashed})

        def changed(before: Client) -> Client:
            _check_scopes(caller, before)
            return self._check(caller, msgspec.structs.replace(before, **changes))

        return _answer(await self._registry.change(client_id, changed), secret, 200)

    async def remove(self, client_id: str, request: Request) -> Response:
        """It gets no more tokens; those it has run out, or are revoked by kind ``client``."""
        caller = self._caller(request, WRITE_SCOPE)
        await self._registry.remove(client_id, lambda client: _check_scopes(caller, client))
        return json_response({"client_id": client_id, "deleted": True})


def _check_scopes(caller: Caller, client: Client) -> Client:
    wanted = {scope for scope in client.scopes if scope.startswith(OWN_SCOPES)}
    if ADMIN_SCOPE not in caller.scopes and not wanted <= caller.scopes:
        raise RequestRefused("scope_not_allowed", "the client has scopes that the caller lacks", status=403)
    return client


def _answer(registered: Registered, secret: str | None, status: int) -> Response:
    shown = {} if secret is None else {"client_secret": secret}
    return json_response({**_described(registered.client, registered), **shown}, status)


def router(
    bearer: AdminBearer,
    registry: ClientRegistry,
    authenticator: Authenticator,
    *,
    hs256: bool,
    clock: Callable[[], float],
) -> APIRouter:
    """``hs256``: there is a shared secret, so a client may be pinned to it."""
    api = _Api(bearer, registry, authenticator, hs256=hs256, clock=clock)
    routes = APIRouter(prefix="/admin/clients")
    routes.add_api_route("", api.listing, methods=["GET"])
    routes.add_api_route("", api.add, methods=["POST"])
    routes.add_api_route("/{client_id:path}", api.one, methods=["GET"])
    routes.add_api_route("/{client_id:path}", api.change, methods=["PATCH"])
    routes.add_api_route("/{client_id:path}", api.remove, methods=["DELETE"])
    return routes
