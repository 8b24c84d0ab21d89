"""The link proxy's control API: Toxiproxy's HTTP dialect, and what it lacks.

    curl --unix-socket PATH http://link/proxies

A proxy is one ordered pair of regions, named `<caller's region>:<target's region>`; *upstream* is what the caller
sends. Proxies come from the topology: they can be neither created nor deleted, nor listen elsewhere. Errors are
`{"error": …, "status": …}` with that status: 400 a wrong body, 404 an unknown proxy or toxic, 405, 409 a toxic of that
name exists.

| Toxiproxy's | |
|---|---|
| `GET /proxies`, `GET /proxies/{proxy}` | with their toxics |
| `POST` or `PATCH /proxies/{proxy}` | `{"enabled": …}` |
| `GET`, `POST /proxies/{proxy}/toxics` | list; add (`regions.link_toxics` has the types) |
| `GET`, `POST` or `PATCH`, `DELETE /proxies/{proxy}/toxics/{toxic}` | show; change attributes; remove |
| `POST /reset` | no toxics, everything enabled; lags and gates stay |
| `GET /version` | the version of Toxiproxy whose dialect this is |

| ours | |
|---|---|
| `POST /changes` | `[{"proxy", "put": [toxic], "remove": [name], "enabled"}]`: many pairs at one moment, or none |
| `POST /proxies/{proxy}/reset` | reset the connections that are open now |
| `GET /links` | the counters |
| `POST /links/{from}:{to}` | `{"one_way_ms": …}`: the lag of a way, whoever opened the connection |
| `POST /addresses/{region}:{port}` | `{"closed": …}` (`regions.link_gates`) |
| `POST /regions/{region}` | `{"isolated": …}` (`regions.link_gates`) |
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from regions.errors import LinkRefused
from regions.link_gates import Gates
from regions.link_rules import Change, Network, OneWayMs, Pair
from regions.link_toxics import ToxicBody

__all__ = ["DIALECT_VERSION", "control_app"]

DIALECT_VERSION = "2.6.0"
"""The first release of Toxiproxy that updates by PATCH as well as by POST."""

Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class _ProxyBody(msgspec.Struct, frozen=True):
    """Clients of Toxiproxy send a proxy back as they got it: what cannot change may be there, unchanged."""

    enabled: bool | None = None
    listen: str | None = None
    upstream: str | None = None


class _LinkBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    one_way_ms: OneWayMs


class _AddressBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    closed: bool


class _RegionBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    isolated: bool


def control_app(
    network: Network,
    gates: Gates,
    *,
    changed: Callable[[Iterable[Pair]], None],
    gates_changed: Callable[[], None],
    reset: Callable[[Pair], None],
) -> Starlette:
    """The app. It changes `network` and `gates` and then says so; `reset` is to reset a pair's open connections."""
    api = _Api(network, gates, changed, gates_changed, reset)
    return Starlette(
        routes=[
            Route("/version", api.version, methods=["GET"]),
            Route("/reset", api.heal, methods=["POST"]),
            Route("/changes", api.change, methods=["POST"]),
            Route("/links", api.counters, methods=["GET"]),
            Route("/links/{link}", api.set_link, methods=["POST"]),
            Route("/addresses/{address}", api.set_closed, methods=["POST"]),
            Route("/regions/{region}", api.set_isolated, methods=["POST"]),
            Route("/proxies", api.proxies, methods=["GET"]),
            Route("/proxies/{proxy}", api.proxy, methods=["GET"]),
            Route("/proxies/{proxy}", api.update_proxy, methods=["POST", "PATCH"]),
            Route("/proxies/{proxy}/reset", api.reset_connections, methods=["POST"]),
            Route("/proxies/{proxy}/toxics", api.toxics, methods=["GET"]),
            Route("/proxies/{proxy}/toxics", api.add_toxic, methods=["POST"]),
            Route("/proxies/{proxy}/toxics/{toxic}", api.toxic, methods=["GET"]),
            Route("/proxies/{proxy}/toxics/{toxic}", api.update_toxic, methods=["POST", "PATCH"]),
            Route("/proxies/{proxy}/toxics/{toxic}", api.remove_toxic, methods=["DELETE"]),
        ],
        exception_handlers={LinkRefused: _refused, HTTPException: _http_error},
    )


class _Api:
    def __init__(
        self,
        network: Network,
        gates: Gates,
        changed: Callable[[Iterable[Pair]], None],
        gates_changed: Callable[[], None],
        reset: Callable[[Pair], None],
    ) -> None:
        self._network = network
        self._gates = gates
        self._changed = changed
        self._gates_changed = gates_changed
        self._reset = reset

    async def version(self, _: Request) -> Response:
        return _json({"version": DIALECT_VERSION})

    async def heal(self, _: Request) -> Response:
        self._changed(self._network.heal())
        return Response(status_code=204)

    async def change(self, request: Request) -> Response:
        changes = await _body(request, list[Change])
        self._changed(self._network.apply(changes, time.monotonic()))
        return Response(status_code=204)

    async def counters(self, _: Request) -> Response:
        return _json(self._network.counters())

    async def set_link(self, request: Request) -> Response:
        a, _, b = request.path_params["link"].partition(":")
        body = await _body(request, _LinkBody)
        self._network.set_link(a, b, body.one_way_ms)
        return _json({"from": a, "to": b, "one_way_ms": body.one_way_ms})

    async def set_closed(self, request: Request) -> Response:
        region, _, port = request.path_params["address"].rpartition(":")
        body = await _body(request, _AddressBody)
        self._gates.set_closed(region, int(port) if port.isdecimal() else 0, body.closed)
        self._gates_changed()
        return _json({"region": region, "port": int(port), "closed": body.closed})

    async def set_isolated(self, request: Request) -> Response:
        region, body = request.path_params["region"], await _body(request, _RegionBody)
        self._gates.set_isolated(region, body.isolated)
        self._gates_changed()
        return _json({"region": region, "isolated": body.isolated})

    async def proxies(self, _: Request) -> Response:
        return _json({pair.name: self._shown(pair) for pair in self._network.pairs.values()})

    async def proxy(self, request: Request) -> Response:
        return _json(self._shown(self._pair(request)))

    async def update_proxy(self, request: Request) -> Response:
        pair = self._pair(request)
        body = await _body(request, _ProxyBody)
        shown = self._shown(pair)
        if body.listen not in (None, "", shown["listen"]) or body.upstream not in (None, "", shown["upstream"]):
            raise LinkRefused("bad request body: `listen` and `upstream` come from the topology and cannot change", 400)
        if body.enabled is not None:
            pair.enabled = body.enabled
            self._changed([pair])
        return _json(self._shown(pair))

    async def reset_connections(self, request: Request) -> Response:
        self._reset(self._pair(request))
        return Response(status_code=204)

    async def toxics(self, request: Request) -> Response:
        return _json([toxic.to_json() for toxic in self._pair(request).toxics])

    async def add_toxic(self, request: Request) -> Response:
        pair = self._pair(request)
        toxic = self._network.add_toxic(pair, await _body(request, ToxicBody), time.monotonic())
        self._changed([pair])
        return _json(toxic.to_json())

    async def toxic(self, request: Request) -> Response:
        return _json(self._pair(request).toxic(request.path_params["toxic"]).to_json())

    async def update_toxic(self, request: Request) -> Response:
        pair, name = self._pair(request), request.path_params["toxic"]
        toxic = self._network.update_toxic(pair, name, await _body(request, ToxicBody), time.monotonic())
        self._changed([pair])
        return _json(toxic.to_json())

    async def remove_toxic(self, request: Request) -> Response:
        pair = self._pair(request)
        self._network.remove_toxic(pair, request.path_params["toxic"])
        self._changed([pair])
        return Response(status_code=204)

    def _pair(self, request: Request) -> Pair:
        return self._network.pair(request.path_params["proxy"])

    def _shown(self, pair: Pair) -> dict[str, Any]:
        behind = [listener for listener in self._gates.config.listeners if listener.region == pair.target]
        return {
            "name": pair.name,
            "listen": ",".join(f"{listener.address}:{listener.port}" for listener in behind),
            "upstream": ",".join(listener.uds for listener in behind),
            "enabled": pair.enabled,
            "toxics": [toxic.to_json() for toxic in pair.toxics],
        }


async def _body(request: Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.DecodeError as error:
        raise LinkRefused(f"bad request body: {error}", 400) from None


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, LinkRefused)
    return _json({"error": str(error), "status": error.status}, error.status)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail.lower(), "status": error.status_code}, error.status_code)
