"""``/admin/sessions``: a login service starts a session after its own check of the user, and ends it at logout."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from fastapi import APIRouter, Request, Response

from keyservice.bearer import AdminBearer
from keyservice.clients import ClientLookup
from keyservice.core.ids import uuid7
from keyservice.ending import SessionEnd
from keyservice.errors import RequestRefused
from keyservice.granting import Granting
from verifier.limits import IDENTIFIER_BYTES_MAX

from .admin_revocations import receipt_response
from .body import read_json
from .problems import json_response

__all__ = ["router"]

SCOPE = "keyservice:sessions:write"


class SessionRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Who logged in, by which client, for which audience. Without ``scope`` the client's own."""

    sub: str
    client_id: str
    audience: str | list[str]
    scope: str | None = None


def router(
    bearer: AdminBearer,
    clients: ClientLookup,
    granting: Granting,
    ending: SessionEnd,
    *,
    clock: Callable[[], float],
) -> APIRouter:
    """Start and end sessions."""
    routes = APIRouter(prefix="/admin/sessions")

    @routes.post("")
    async def start(request: Request) -> Response:
        bearer.check(request.headers.get("authorization"), SCOPE)
        wanted = await read_json(request, SessionRequest)
        client = clients.get(wanted.client_id)
        if client is None:
            raise RequestRefused("client_unknown", "there is no client with this id")
        if not 0 < len(wanted.sub.encode()) <= IDENTIFIER_BYTES_MAX:
            raise RequestRefused("sub_invalid", f"sub has 1 to {IDENTIFIER_BYTES_MAX} bytes")
        audience = (wanted.audience,) if isinstance(wanted.audience, str) else tuple(wanted.audience)
        granted = await granting.start_session(client, wanted.sub, audience, wanted.scope)
        return json_response({**granted.response(), "sid": granted.sid}, 201)

    @routes.delete("/{sid}")
    async def end(sid: str, request: Request) -> Response:
        """The revocation first: from then on the session gets nothing more, whether or not its record is there."""
        bearer.check(request.headers.get("authorization"), SCOPE)
        receipt = await ending.revoke(sid, request.headers.get("idempotency-key") or uuid7(clock()))
        await ending.forget(sid)
        return receipt_response(receipt)

    return routes
