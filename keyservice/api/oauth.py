"""``POST /oauth2/token`` (RFC 6749): grants ``client_credentials`` and ``refresh_token``."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_plus

from fastapi import APIRouter, Request, Response

from keyservice.clients import Authenticator, Client
from keyservice.errors import KeyserviceError, OAuthError
from keyservice.granting import Granted, Granting
from keyservice.telemetry import Metrics

from .body import read_form
from .problems import json_response, problem_of

__all__ = ["router"]


def _basic(header: str) -> tuple[str, str]:
    """RFC 6749 section 2.3.1: id and secret are form-encoded, joined by a colon, and sent as HTTP Basic."""
    scheme, _, encoded = header.partition(" ")
    try:
        if scheme.lower() != "basic":
            raise ValueError("another scheme")
        pair = base64.b64decode(encoded.strip(), validate=True).decode()
        client_id, colon, secret = pair.partition(":")
        if not colon:
            raise ValueError("no colon")
        return unquote_plus(client_id, errors="strict"), unquote_plus(secret, errors="strict")
    except (binascii.Error, ValueError):
        raise OAuthError("invalid_client", "client authentication failed", status=401) from None


def _credentials(request: Request, form: dict[str, str]) -> tuple[str, str]:
    """client_secret_basic or client_secret_post, never both (RFC 6749 section 2.3)."""
    header = request.headers.get("authorization")
    if header is None:
        if "client_id" not in form or "client_secret" not in form:
            raise OAuthError("invalid_client", "client authentication is needed", status=401)
        return form["client_id"], form["client_secret"]
    if "client_secret" in form:
        raise OAuthError("invalid_request", "the client is authenticated twice")
    client_id, secret = _basic(header)
    if form.get("client_id", client_id) != client_id:
        raise OAuthError("invalid_request", "client_id differs from the authenticated client")
    return client_id, secret


async def _client(request: Request, form: dict[str, str], clients: Authenticator) -> Client:
    client = await clients.authenticate(*_credentials(request, form))
    if client is None:
        raise OAuthError("invalid_client", "client authentication failed", status=401)
    return client


async def _grant(form: dict[str, str], client: Client, granting: Granting) -> Granted:
    grant_type = form.get("grant_type")
    if grant_type == "client_credentials":
        return granting.client_credentials(client, form.get("audience"), form.get("scope"))
    if grant_type == "refresh_token":
        if "refresh_token" not in form:
            raise OAuthError("invalid_request", "refresh_token is missing")
        return await granting.refresh(client, form["refresh_token"], form.get("scope"))
    if grant_type is None:
        raise OAuthError("invalid_request", "grant_type is missing")
    raise OAuthError("unsupported_grant_type", "grant_type is client_credentials or refresh_token")


def router(clients: Authenticator, granting: Granting, metrics: Metrics) -> APIRouter:
    """The token endpoint."""
    routes = APIRouter(prefix="/oauth2")

    @routes.post("/token")
    async def token(request: Request) -> Response:
        try:
            form = await read_form(request)
            client = await _client(request, form, clients)
            granted = await _grant(form, client, granting)
        except KeyserviceError as error:
            metrics.refused_tokens.labels(problem_of(error)[1]).inc()
            raise
        return json_response(granted.response(), headers={"Pragma": "no-cache"})

    return routes
