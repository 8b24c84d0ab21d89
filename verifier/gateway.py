"""A gate for services that cannot embed a verifier: nginx ``auth_request``, Envoy ext_authz, Traefik ForwardAuth.

    VERIFIER_ISSUER=… VERIFIER_AUDIENCE=… … python -m uvicorn verifier.gateway:app

The proxy asks about each request and hands on what the answer says. 200 means yes, and tells who it is in
:data:`IDENTITY_HEADERS`; 400, 401, 403 and 503 mean no, as :mod:`verifier.bearer` has it, with ``X-Auth-Code``.

* What is asked about is the bearer token alone. The method, path and host of the original request decide nothing, in
  whatever header a proxy sends them.
* Who may be asked what is the operator's to say, here or in the proxy's own configuration. The one thing that a URL can
  change, ``?require_scope=``, can only make it stricter, because with some proxies the caller writes the URL.
* Identity headers are always there, empty where there is nothing to tell, so that a proxy that copies them replaces
  whatever a caller sent under their names. Their values are ASCII: everything that could end a header, split a list or
  be trimmed is percent-encoded, and so is ``%`` itself; ``urllib.parse.unquote`` gives the original back.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, quote

from .asgi import Receive, Scope, Send, refuse
from .bearer import Challenge, checked_scopes
from .claims import Claims
from .errors import ConfigurationError
from .guard import Guard, below, odd, path_prefixes
from .verifier import Verifier

__all__ = ["IDENTITY_HEADERS", "Gateway", "app", "gateway"]

IDENTITY_HEADERS: Final = ("X-Auth-Subject", "X-Auth-Client", "X-Auth-Scopes", "X-Auth-Session", "X-Auth-Staleness")
"""``sub``, ``client_id``, ``scope``, ``sid``, and the age in seconds of the revocations that it was judged by."""

_PLAIN: Final = "!#$&'()*+-./:;=?@[]^_`{|}~"
"""Printable ASCII that stays as it is, besides letters and digits: without space, quote, comma, %, <, > and \\."""

_QUERY_FIELDS_MAX: Final = 100


class Gateway:
    """The ASGI app. Under a server's lifespan protocol it starts the verifier and closes it.

    ``required=False``, or below ``optional_paths``: without a token the answer is 200 and nobody's identity.
    ``scopes``: every token needs all of them; ``path_scopes`` maps prefixes of the path that the gateway is asked under
    to more. Whatever a proxy or a service might read as another path gets none of the former and all of the latter.
    ``health_path`` answers 200 or 503 by the verifier's readiness; it must be none that a proxy asks under.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        required: bool = True,
        optional_paths: Collection[str] = (),
        scopes: Collection[str] = (),
        path_scopes: Mapping[str, Collection[str]] | None = None,
        trust_position: bool = True,
        realm: str | None = None,
        health_path: str | None = None,
    ) -> None:
        self._verifier = verifier
        self._guard = Guard(verifier, scopes=scopes, trust_position=trust_position, realm=realm)
        self._required = required
        self._optional_paths = path_prefixes(optional_paths)
        self._path_scopes = [
            (path_prefixes([path]), checked_scopes(scopes, "path_scopes"))
            for path, scopes in (path_scopes or {}).items()
        ]
        self._health_path = health_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] != "http":
            await refuse(scope, send, Challenge(400, "invalid_request"), None)  # proxies ask over HTTP
        elif scope["path"] == self._health_path:
            await _answer(send, 200 if self._verifier.status().ready else 503, [])
        else:
            await self._judge(scope, send)

    async def _judge(self, scope: Scope, send: Send) -> None:
        try:
            required = self._required and not below(scope["path"], self._optional_paths)
            claims = await self._guard.admit(scope["headers"], required=required, scopes=self._scopes_for(scope))
        except Challenge as challenge:
            code = (b"x-auth-code", challenge.stable_code.encode())
            await refuse(scope, send, challenge, self._guard.realm, [code])
            return
        await _answer(send, 200, identity(claims))

    def _scopes_for(self, scope: Scope) -> frozenset[str]:
        path = scope["path"]
        scopes = [scopes for prefix, scopes in self._path_scopes if odd(path) or below(path, prefix)]
        if scope.get("query_string"):
            scopes.append(_asked_for(scope["query_string"]))
        return frozenset().union(*scopes)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._verifier.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.to_thread(self._verifier.close)
        await send({"type": "lifespan.shutdown.complete"})


def gateway(verifier: Verifier, **settings: Any) -> Gateway:
    """The ASGI app for a verifier; ``settings`` are those of :class:`Gateway`."""
    return Gateway(verifier, **settings)


def identity(claims: Claims | None) -> list[tuple[bytes, bytes]]:
    """The values of :data:`IDENTITY_HEADERS`, every one of them; empty ones for None."""
    values = dict.fromkeys(IDENTITY_HEADERS, "")
    if claims is not None:
        for header, name in (("X-Auth-Subject", "sub"), ("X-Auth-Client", "client_id"), ("X-Auth-Session", "sid")):
            values[header] = quote(claims.get(name) or "", safe=_PLAIN)
        values["X-Auth-Scopes"] = " ".join(quote(scope, safe=_PLAIN) for scope in sorted(claims.scopes))
        staleness_s = claims.staleness_s
        values["X-Auth-Staleness"] = "" if staleness_s is None else f"{staleness_s:.3f}"
    return [(name.lower().encode(), value.encode()) for name, value in values.items()]


def _asked_for(query: bytes) -> frozenset[str]:
    try:
        fields = parse_qsl(query.decode("latin-1"), max_num_fields=_QUERY_FIELDS_MAX)
    except ValueError:
        raise Challenge(400, "invalid_request", detail="the query has too many fields") from None
    return frozenset(scope for name, value in fields if name == "require_scope" for scope in value.split())


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    always = [(b"content-length", b"0"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": always + headers})
    await send({"type": "http.response.body", "body": b""})


# -- from the environment -----------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _path_scopes(text: str) -> dict[str, list[str]]:
    rules = (rule.partition("=") for rule in text.split(";") if rule.strip())
    return {path.strip(): _words(scopes) for path, _, scopes in rules}


_PREFIX: Final = "VERIFIER_GATEWAY_"
_READERS: Final[dict[str, Callable[[str], Any]]] = {
    "required": _flag,
    "optional_paths": _words,
    "scopes": _words,
    "path_scopes": _path_scopes,
    "trust_position": _flag,
    "realm": str,
    "health_path": str,
}


def from_env(environ: Mapping[str, str] | None = None) -> Gateway:
    """``VERIFIER_GATEWAY_<PARAMETER>``, and for the verifier what :meth:`Verifier.from_env` reads.

    Lists are separated by spaces or commas; ``VERIFIER_GATEWAY_PATH_SCOPES`` is ``/path=scope scope;/path=scope``.
    Raises :class:`ConfigurationError` naming the variable.
    """
    env = os.environ if environ is None else environ
    settings: dict[str, Any] = {}
    for variable in sorted(name for name in env if name.startswith(_PREFIX)):
        setting = variable.removeprefix(_PREFIX).lower()
        try:
            settings[setting] = _READERS[setting](env[variable])
        except KeyError:
            message = f"{variable} is not a setting of the gateway, or neither true nor false"
            raise ConfigurationError("setting_invalid", message, setting=setting) from None
    return Gateway(Verifier.from_env({name: env[name] for name in env if not name.startswith(_PREFIX)}), **settings)


class _FromEnvironment:
    """:func:`from_env` when the server starts, so that a wrong setting is its failure to start, by name."""

    _gateway: Gateway | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if self._gateway is None:
            try:
                self._gateway = from_env()
            except ConfigurationError as error:
                if scope["type"] != "lifespan":
                    raise
                await receive()
                await send({"type": "lifespan.startup.failed", "message": f"verifier [{error.code}]: {error}"})
                return
        await self._gateway(scope, receive, send)


app = _FromEnvironment()
