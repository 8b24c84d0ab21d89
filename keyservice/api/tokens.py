"""``POST /oauth2/introspect`` (RFC 7662) and ``POST /oauth2/revoke`` (RFC 7009)."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from keyservice.errors import OAuthError, RevocationPending
from keyservice.introspection import Introspector
from keyservice.token_revocation import TokenRevocation

from .body import read_form
from .client_auth import ClientAuth
from .problems import json_response

__all__ = ["router"]

TOKEN_TYPES: Final = ("access_token", "refresh_token")


def _token(form: dict[str, str]) -> str:
    if "token" not in form:
        raise OAuthError("invalid_request", "token is missing")
    return form["token"]


def router(auth: ClientAuth, introspector: Introspector, revocation: TokenRevocation) -> APIRouter:
    """Both authenticate the client as the token endpoint does."""
    routes = APIRouter(prefix="/oauth2")

    @routes.post("/introspect")
    async def introspect(request: Request) -> Response:
        """For clients that may: to know of a token is to be trusted with it."""
        form = await read_form(request)
        client = await auth.client(request, form)
        if not client.introspect:
            raise OAuthError("unauthorized_client", "the client may not introspect tokens", status=403)
        return json_response(introspector.introspect(_token(form)))

    @routes.post("/revoke")
    async def revoke(request: Request) -> Response:
        """200 once it is replicated, and for whatever there is nothing to revoke of (RFC 7009 section 2.2)."""
        form = await read_form(request)
        client = await auth.client(request, form)
        token = _token(form)
        if form.get("token_type_hint", "access_token") not in TOKEN_TYPES:
            raise OAuthError("unsupported_token_type", f"token_type_hint is {' or '.join(TOKEN_TYPES)}")
        receipt = await revocation.revoke(client, token)
        if receipt is not None and not receipt.replicated:
            raise RevocationPending
        position = {} if receipt is None else {"Trust-Position": str(receipt.position)}
        return Response(status_code=200, headers={"Cache-Control": "no-store", **position})

    return routes
