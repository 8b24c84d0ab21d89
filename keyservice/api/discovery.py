"""What this server can do, for clients to read (RFC 8414, OpenID Connect Discovery), and the issuer's path.

Both documents are the same bytes, made from what every region is set to alike, and say only what is true: there is no
authorization endpoint and no ID token, so the members that stand for those are empty lists.

Every endpoint is under the issuer's URL. Where that has a path, requests are taken with it and, for a proxy that cuts
it off, without; the metadata of RFC 8414 is found with the path behind the well-known part (section 3.1).
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from keyservice.clients import ASSERTION_ALGORITHMS

from .client_auth import AUTH_METHODS
from .jwks import JWKS_PATH

__all__ = ["UnderIssuerPath", "metadata", "router"]

OAUTH_PATH: Final = "/.well-known/oauth-authorization-server"
OPENID_PATH: Final = "/.well-known/openid-configuration"
GRANT_TYPES: Final = ("client_credentials", "refresh_token")


def metadata(issuer: str) -> dict[str, Any]:
    """RFC 8414 section 2."""
    base = issuer.rstrip("/")
    document: dict[str, Any] = {
        "issuer": issuer,
        "token_endpoint": f"{base}/oauth2/token",
        "jwks_uri": base + JWKS_PATH,
        "introspection_endpoint": f"{base}/oauth2/introspect",
        "revocation_endpoint": f"{base}/oauth2/revoke",
        "grant_types_supported": GRANT_TYPES,
        "response_types_supported": [],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": [],
    }
    for endpoint in ("token_endpoint", "introspection_endpoint", "revocation_endpoint"):
        document[f"{endpoint}_auth_methods_supported"] = AUTH_METHODS
        document[f"{endpoint}_auth_signing_alg_values_supported"] = ASSERTION_ALGORITHMS
    return document


def issuer_path(issuer: str) -> str:
    """The issuer's path without a slash at its end; empty for most."""
    return urlsplit(issuer).path.rstrip("/")


def router(issuer: str, max_age_s: int) -> APIRouter:
    """Public, for any origin, and cacheable as long as the key set."""
    body = msgspec.json.encode(metadata(issuer))
    headers = {"Cache-Control": f"public, max-age={max_age_s}", "Access-Control-Allow-Origin": "*"}
    routes = APIRouter()

    async def document(request: Request) -> Response:
        content = b"" if request.method == "HEAD" else body
        length = {"Content-Length": str(len(body))}
        return Response(content, 200, {**headers, **length}, media_type="application/json")

    for path in dict.fromkeys((OAUTH_PATH, OAUTH_PATH + issuer_path(issuer), OPENID_PATH)):
        routes.add_api_route(path, document, methods=["GET", "HEAD"])
    return routes


class UnderIssuerPath:
    """Takes the issuer's path off the front of a request's, where it is there."""

    def __init__(self, app: ASGIApp, issuer: str) -> None:
        self._app = app
        self._prefix = issuer_path(issuer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. The scope is changed and not copied: what counts requests outside reads the route from it."""
        if self._prefix and scope["type"] == "http" and scope["path"].startswith(f"{self._prefix}/"):
            scope["path"] = scope["path"][len(self._prefix) :]
            scope["raw_path"] = scope["path"].encode()
        await self._app(scope, receive, send)
