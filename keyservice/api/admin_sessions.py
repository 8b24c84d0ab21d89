"""``/admin/sessions``: a login service starts a session after its own check of the user, and ends it at logout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, Meta, UnsetType

from keyservice.bearer import AdminBearer
from keyservice.clients import ClientLookup
from keyservice.core.ids import uuid7
from keyservice.ending import SessionEnd
from keyservice.errors import RequestRefused
from keyservice.granting import Granting
from keyservice.limits import ACR_CHARS_MAX, AMR_MAX
from verifier.limits import IDENTIFIER_BYTES_MAX

from .admin_revocations import receipt_response
from .body import read_json
from .problems import json_response

__all__ = ["router"]

SCOPE = "keyservice:sessions:write"


_Word = Annotated[str, Meta(min_length=1, max_length=ACR_CHARS_MAX)]


class SessionRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Who logged in, by which client, for which audience. Without ``scope`` the client's own.

    ``auth_time`` (Unix seconds), ``acr`` and ``amr`` go into every token of the session (RFC 9068 section 2.2.1).
    """

    sub: str
    client_id: str
    audience: str | list[str]
    scope: str | None = None
    auth_time: Annotated[int, Meta(ge=0, lt=10**13)] | UnsetType = UNSET
    acr: _Word | UnsetType = UNSET
    amr: Annotated[tuple[_Word, ...], Meta(min_length=1, max_length=AMR_MAX)] | UnsetType = UNSET

    def authentication(self) -> dict[str, Any]:
        """What is given of them."""
        given = {"auth_time": self.auth_time, "acr": self.acr, "amr": self.amr}
        return {name: value for name, value in given.items() if value is not UNSET}


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
        granted = await granting.start_session(client, wanted.sub, audience, wanted.scope, wanted.authentication())
        return json_response({**granted.response(), "sid": granted.sid}, 201)

    @routes.delete("/{sid}")
    async def end(sid: str, request: Request) -> Response:
        """The revocation first: from then on the session gets nothing more, whether or not its record is there."""
        bearer.check(request.headers.get("authorization"), SCOPE)
        receipt = await ending.revoke(sid, request.headers.get("idempotency-key") or uuid7(clock()))
        await ending.forget(sid)
        return receipt_response(receipt)

    return routes
