"""``POST /oauth2/token`` (RFC 6749): grants ``client_credentials`` and ``refresh_token``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from keyservice.clients import Client
from keyservice.errors import KeyserviceError, OAuthError
from keyservice.granting import Granted, Granting
from keyservice.telemetry import Metrics

from .body import read_form
from .client_auth import ClientAuth
from .problems import json_response, problem_of

__all__ = ["router"]


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


def router(auth: ClientAuth, granting: Granting, metrics: Metrics) -> APIRouter:
    """The token endpoint."""
    routes = APIRouter(prefix="/oauth2")

    @routes.post("/token")
    async def token(request: Request) -> Response:
        try:
            form = await read_form(request)
            client = await auth.client(request, form)
            granted = await _grant(form, client, granting)
        except KeyserviceError as error:
            metrics.refused_tokens.labels(problem_of(error)[1]).inc()
            raise
        return json_response(granted.response(), headers={"Pragma": "no-cache"})

    return routes
