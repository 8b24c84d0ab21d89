"""Who calls ``/oauth2/*``: client_secret_basic, client_secret_post or private_key_jwt, and never two of them.

RFC 6749 section 2.3, RFC 7523 section 2.2.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final
from urllib.parse import unquote_plus

from fastapi import Request

from keyservice.assertions import Assertions
from keyservice.clients import Authenticator, Client
from keyservice.core.assertions import AssertionRefused
from keyservice.errors import OAuthError

__all__ = ["AUTH_METHODS", "ClientAuth"]

AUTH_METHODS: Final = ("client_secret_basic", "client_secret_post", "private_key_jwt")
ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


def _failed(description: str = "client authentication failed") -> OAuthError:
    return OAuthError("invalid_client", description, status=401)


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
        raise _failed() from None


class ClientAuth:
    """Authenticates the client of a request; raises :class:`OAuthError`, and KeyserviceError (503)."""

    def __init__(self, authenticator: Authenticator, assertions: Assertions) -> None:
        self._authenticator = authenticator
        self._assertions = assertions

    async def client(self, request: Request, form: dict[str, str]) -> Client:
        """The client, by the one method that the request uses."""
        headers = request.headers.getlist("authorization")
        asserted = "client_assertion" in form or "client_assertion_type" in form
        if len(headers) + ("client_secret" in form) + asserted > 1:
            raise OAuthError("invalid_request", "the client is authenticated twice")
        if headers:
            client = await self._authenticator.authenticate(*_basic(headers[0]))
        elif asserted:
            client = await self._by_assertion(form)
        elif "client_id" in form and "client_secret" in form:
            client = await self._authenticator.authenticate(form["client_id"], form["client_secret"])
        else:
            raise _failed("client authentication is needed")
        if client is None:
            raise _failed()
        if form.get("client_id", client.client_id) != client.client_id:
            raise OAuthError("invalid_request", "client_id differs from the authenticated client")
        return client

    async def _by_assertion(self, form: dict[str, str]) -> Client:
        if form.get("client_assertion_type") != ASSERTION_TYPE or "client_assertion" not in form:
            raise OAuthError("invalid_request", f"client_assertion needs client_assertion_type {ASSERTION_TYPE}")
        try:
            return await self._assertions.authenticate(form["client_assertion"])
        except AssertionRefused as refused:
            reason = f": client_assertion: {refused}" if str(refused) else ""
            raise _failed(f"client authentication failed{reason}") from None
