"""Tells the link proxy to change a lag or a gate or to break something, and asks for its counters, over its socket.

A *way* a→b is what travels from region a to region b, whoever opened the connection; most faults are of a way. `down`
and `reset` are of the connections that a opened to b. A fault holds at once, for open connections as for new ones, and
a second one of the same kind on the same way replaces the first. What each does is in `regions.link_toxics` and
`regions.link_rules`; anything else can be asked for in HTTP (`regions.link_api`).

The socket's path is in `var/cluster.json`, as `link_control`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from regions.errors import LinkFailed, LinkRefused

__all__ = ["LinkControl", "LinkCounters", "PairCounters", "ProxyState", "ToxicState"]

Way = tuple[str, str]


class PairCounters(msgspec.Struct, frozen=True):
    """One ordered pair: connections that `from` opened to `to`, bytes that came out in this direction, or were cut."""

    from_: str = msgspec.field(name="from")
    to: str
    one_way_ms: float
    connections: int
    bytes: int
    bytes_lost: int


class LinkCounters(msgspec.Struct, frozen=True):
    """What the proxy counted since it started.

    `unbound` counts, for each target region, callers whose source address is in no region; `refused`, callers for whom
    no server answered.
    """

    pairs: list[PairCounters]
    unbound: dict[str, int]
    refused: dict[str, int]

    def pair(self, a: str, b: str) -> PairCounters:
        """The counters from region `a` to region `b`; `KeyError` if there is no such pair."""
        for pair in self.pairs:
            if (pair.from_, pair.to) == (a, b):
                return pair
        raise KeyError((a, b))


class ToxicState(msgspec.Struct, frozen=True):
    name: str
    type: str
    stream: str
    attributes: dict[str, float]


class ProxyState(msgspec.Struct, frozen=True):
    """One ordered pair of regions as it stands, named `<caller's>:<target's>`."""

    name: str
    enabled: bool
    toxics: list[ToxicState]


class LinkControl:
    """A client of the proxy's control socket: blocking, one short connection a request, so safe in any thread.

    Every method raises `LinkFailed` when the proxy does not answer within `timeout_s`, and `LinkRefused` when it
    refuses, for instance an unknown region.
    """

    def __init__(self, path: Path, *, timeout_s: float = 5.0) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def ping(self) -> None:
        """Return when the proxy has answered."""
        self._ask("GET", "/version")

    def counters(self) -> LinkCounters:
        return msgspec.json.decode(self._ask("GET", "/links"), type=LinkCounters)

    def proxies(self) -> dict[str, ProxyState]:
        """Every ordered pair of regions with the faults it has."""
        return msgspec.json.decode(self._ask("GET", "/proxies"), type=dict[str, ProxyState])

    def set_link(self, a: str, b: str, one_way_ms: float) -> None:
        """Set the lag from region `a` to region `b` (one direction), also for open connections."""
        self._ask("POST", f"/links/{quote(f'{a}:{b}')}", {"one_way_ms": one_way_ms})

    def set_closed(self, region: str, port: int, closed: bool) -> None:
        """Close a public address (callers are refused, connections reset), or open it again."""
        self._ask("POST", f"/addresses/{quote(region)}:{port}", {"closed": closed})

    def set_isolated(self, region: str, isolated: bool) -> None:
        """Let everything to and from a region vanish; back again, its old connections are reset."""
        self._ask("POST", f"/regions/{quote(region)}", {"isolated": isolated})

    # faults of a way

    def latency(self, a: str, b: str, latency_ms: float, jitter_ms: float = 0.0) -> None:
        """On top of the lag from `a` to `b`, each chunk takes `latency_ms` ± `jitter_ms`, uniform, never below 0."""
        self._put([(a, b)], "latency", latency=latency_ms, jitter=jitter_ms)

    def jitter(self, a: str, b: str, up_to_ms: float) -> None:
        """On top of the lag from `a` to `b`, each chunk takes between 0 and `up_to_ms`, uniform."""
        self.latency(a, b, up_to_ms / 2, up_to_ms / 2)

    def bandwidth(self, a: str, b: str, kb_per_s: int) -> None:
        """Each connection carries at most `kb_per_s` (1 KB = 1,000 bytes) from `a` to `b`."""
        self._put([(a, b)], "bandwidth", rate=kb_per_s)

    def slicer(self, a: str, b: str, average_size: int, size_variation: int = 0, delay_us: float = 0.0) -> None:
        """From `a` to `b` bytes arrive in pieces of `average_size` ± `size_variation`, `delay_us` apart."""
        self._put([(a, b)], "slicer", average_size=average_size, size_variation=size_variation, delay=delay_us)

    def hold(self, a: str, b: str) -> None:
        """Nothing arrives at `b` from `a` until this is lifted, then everything does. New connections hang."""
        self._put([(a, b)], "timeout", timeout=0)

    def hold_both(self, a: str, b: str) -> None:
        """`hold` in both directions: a silent partition."""
        self._put([(a, b), (b, a)], "timeout", timeout=0)

    def timeout(self, a: str, b: str, timeout_ms: float) -> None:
        """Nothing arrives at `b` from `a`, and connections close after `timeout_ms` (0 is `hold`)."""
        self._put([(a, b)], "timeout", timeout=timeout_ms)

    def reset_peer(self, a: str, b: str, timeout_ms: float = 0.0) -> None:
        """Every connection that uses the way from `a` to `b`, open or new, is reset after `timeout_ms`."""
        self._put([(a, b)], "reset_peer", timeout=timeout_ms)

    def cut_both(self, a: str, b: str) -> None:
        """What `a` and `b` send each other is lost until this is lifted; then connections that lost any are reset."""
        self._put([(a, b), (b, a)], "cut")

    def cut(self, region: str) -> None:
        """Cut `region` off from all others, at one moment (as `cut_both`)."""
        self._put(self._ways_of(region), "cut")

    def restore(self, region: str) -> None:
        """End the cuts between `region` and all others; other faults stay."""
        self._change(_lifting(self._ways_of(region), ["cut"]))

    def lift(self, a: str, b: str, *types: str) -> None:
        """End the faults of these types (by default, all) of the way from `a` to `b`."""
        self._change(_lifting([(a, b)], types or _TYPES))

    def lift_both(self, a: str, b: str, *types: str) -> None:
        """`lift` in both directions, at one moment."""
        self._change(_lifting([(a, b), (b, a)], types or _TYPES))

    # faults of a pair

    def down(self, a: str, b: str) -> None:
        """Reset every connection that `a` opened to `b`, and each new one, until `up`."""
        self._change([{"proxy": f"{a}:{b}", "enabled": False}])

    def up(self, a: str, b: str) -> None:
        self._change([{"proxy": f"{a}:{b}", "enabled": True}])

    def reset(self, a: str, b: str) -> None:
        """Reset the connections that `a` has open to `b`, once."""
        self._ask("POST", f"/proxies/{quote(f'{a}:{b}')}/reset")

    def heal(self) -> None:
        """End every fault; lags and gates (`set_closed`, `set_isolated`) stay."""
        self._ask("POST", "/reset")

    def _ways_of(self, region: str) -> list[Way]:
        others = {pair.to for pair in self.counters().pairs} - {region}
        return [way for other in sorted(others) for way in ((region, other), (other, region))]

    def _put(self, ways: Iterable[Way], kind: str, **attributes: float) -> None:
        self._change(
            {"proxy": proxy, "put": [{"type": kind, "stream": stream, "attributes": attributes}]}
            for way in ways
            for proxy, stream in _streams(way)
        )

    def _change(self, changes: Iterable[dict[str, Any]]) -> None:
        self._ask("POST", "/changes", list(changes))

    def _ask(self, method: str, target: str, body: object = None) -> bytes:
        content = None if body is None else msgspec.json.encode(body)
        connection = _UnixHTTPConnection(self._path, self._timeout_s)
        try:
            connection.request(method, target, content, {"connection": "close", "content-type": "application/json"})
            reply = connection.getresponse()
            answer, status = reply.read(), reply.status
        except (OSError, HTTPException) as error:
            raise LinkFailed(f"the link proxy at {self._path} did not answer {method} {target}: {error}") from error
        finally:
            connection.close()
        if status >= 400:
            raise LinkRefused(f"the link proxy refused {method} {target}: {_reason(answer)}", status)
        return answer


_TYPES = ("latency", "bandwidth", "slicer", "timeout", "reset_peer", "cut")


def _streams(way: Way) -> list[tuple[str, str]]:
    """A way is a stream of two proxies: of the one that its beginning calls, and of the one that its end calls."""
    a, b = way
    return [(f"{a}:{b}", "upstream"), (f"{b}:{a}", "downstream")]


def _lifting(ways: Iterable[Way], types: Iterable[str]) -> list[dict[str, Any]]:
    """Toxics that were put without a name are named after their type and stream."""
    return [
        {"proxy": proxy, "remove": [f"{kind}_{stream}" for kind in types]}
        for way in ways
        for proxy, stream in _streams(way)
    ]


def _reason(answer: bytes) -> str:
    try:
        return str(msgspec.json.decode(answer)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return answer.decode(errors="replace")


class _UnixHTTPConnection(HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("link", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
