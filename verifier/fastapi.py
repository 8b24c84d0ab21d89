"""FastAPI dependencies: the claims as a parameter, scopes, and the security scheme in the OpenAPI document.

    @app.get("/orders")
    async def orders(claims: Annotated[Claims, Depends(bearer(verifier, scopes=["orders:read"]))]) -> …

A refusal is an :class:`AuthError`, a FastAPI ``HTTPException`` with the status and headers of RFC 6750, whose detail is
the problem document: ``{"detail": {"code": "token_expired", …}}``. For the very bodies of :mod:`verifier.asgi`, the
application says once ``app.add_exception_handler(AuthError, problem_response)``.

Behind :class:`verifier.asgi.AuthMiddleware` with the same verifier nothing is verified twice: its claims are taken.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, TypedDict, Unpack

from .asgi import VERIFIED_BY, Scope
from .bearer import Challenge, claims_variable
from .claims import Claims
from .guard import Guard
from .verifier import Verifier

try:
    from fastapi import HTTPException, Request, Response
    from fastapi.openapi.models import HTTPBearer as HTTPBearerModel
    from fastapi.requests import HTTPConnection
    from fastapi.security import SecurityScopes
    from fastapi.security.base import SecurityBase
except ImportError as error:
    raise ImportError("verifier.fastapi needs FastAPI: pip install fastapi") from error

__all__ = ["AuthError", "Bearer", "BearerSettings", "OptionalBearer", "bearer", "optional_bearer", "problem_response"]


class AuthError(HTTPException):
    """A refusal; ``challenge`` is what :mod:`verifier.bearer` made of it."""

    def __init__(self, challenge: Challenge, realm: str | None = None) -> None:
        self.challenge = challenge
        self.realm = realm
        super().__init__(challenge.status, detail=challenge.problem(), headers=dict(challenge.headers(realm)))


async def problem_response(_: Request, error: Exception) -> Response:
    """An exception handler: the refusal as ``application/problem+json``, as the ASGI middleware answers."""
    assert isinstance(error, AuthError)
    challenge, headers = error.challenge, error.headers
    return Response(challenge.body(), challenge.status, headers=headers, media_type="application/problem+json")


class BearerSettings(TypedDict, total=False):
    """``scopes`` (every one is needed), ``trust_position`` and ``realm`` as :class:`verifier.asgi.AuthMiddleware` has.

    ``scheme_name`` and ``description`` are those of the OpenAPI document.
    """

    scopes: Collection[str]
    trust_position: bool
    realm: str | None
    scheme_name: str
    description: str | None


class OptionalBearer(SecurityBase):
    """The claims of a request with a token, None of one without; a bad token is refused all the same."""

    _required = False

    def __init__(self, verifier: Verifier, **settings: Unpack[BearerSettings]) -> None:
        self._verifier = verifier
        self._guard = Guard(
            verifier,
            scopes=settings.get("scopes", ()),
            trust_position=settings.get("trust_position", True),
            realm=settings.get("realm"),
        )
        self._glance = self._guard.glance
        self.scheme_name = settings.get("scheme_name", "bearer")
        self.model = HTTPBearerModel(bearerFormat="JWT", description=settings.get("description"))

    async def _admit(self, scope: Scope, scopes: Collection[str]) -> Claims | None:
        """The long way."""
        try:
            verifier, claims = scope.get(VERIFIED_BY, (None, None))
            if verifier is self._verifier:  # the middleware's claims, which are current already
                return self._guard.recheck(claims, required=self._required, scopes=scopes)
            claims = await self._guard.admit(scope["headers"], required=self._required, scopes=scopes)
        except Challenge as challenge:
            raise AuthError(challenge, self._guard.realm) from challenge
        claims_variable.set(claims)  # for the rest of this request's task; threads of sync endpoints inherit it
        return claims

    async def __call__(self, connection: HTTPConnection, security_scopes: SecurityScopes) -> Claims | None:
        """The dependency. Raises :class:`AuthError`."""
        scope = connection.scope
        if not security_scopes.scopes and VERIFIED_BY not in scope:
            claims = self._glance(scope["headers"])
            if claims is not None:
                claims_variable.set(claims)
                return claims
        return await self._admit(scope, security_scopes.scopes)


class Bearer(OptionalBearer):
    """The claims of a request; without a token it is refused."""

    _required = True

    if TYPE_CHECKING:

        async def __call__(self, connection: HTTPConnection, security_scopes: SecurityScopes) -> Claims:
            """The dependency, which never gives None. Raises :class:`AuthError`."""


def bearer(verifier: Verifier, **settings: Unpack[BearerSettings]) -> Bearer:
    """``Depends(bearer(verifier, scopes=["orders:read"]))``: the claims, or 401, 403, 503.

    Scopes may also be named where it is used, ``Security(orders_bearer, scopes=["orders:read"])``: then they stand in
    the OpenAPI document too. ``settings`` are :class:`BearerSettings`.
    """
    return Bearer(verifier, **settings)


def optional_bearer(verifier: Verifier, **settings: Unpack[BearerSettings]) -> OptionalBearer:
    """``Depends(optional_bearer(verifier))``: the claims, or None for a request without a token."""
    return OptionalBearer(verifier, **settings)
