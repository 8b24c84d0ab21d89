"""Asks the link proxy for its counters and tells it to change a lag or a gate, over its control socket."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import msgspec

from regions.errors import LinkFailed

__all__ = ["LinkControl", "LinkCounters", "PairCounters"]


class PairCounters(msgspec.Struct, frozen=True):
    """One ordered pair: connections that `from` opened to `to`, and bytes that came out in this direction."""

    from_: str = msgspec.field(name="from")
    to: str
    one_way_ms: float
    connections: int
    bytes: int


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


class LinkControl:
    """A client of the proxy's control socket: blocking, one short connection a request, so safe in any thread.

    Every method raises `LinkFailed` when the proxy does not answer within `timeout_s` or refuses.
    """

    def __init__(self, path: Path, *, timeout_s: float = 5.0) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def ping(self) -> None:
        """Return when the proxy has answered."""
        self._ask({"op": "ping"})

    def counters(self) -> LinkCounters:
        return msgspec.convert(self._ask({"op": "counters"}), LinkCounters)

    def set_link(self, a: str, b: str, one_way_ms: float) -> None:
        """Set the lag from region `a` to region `b` (one direction), also for open connections."""
        self._ask({"op": "set_link", "from": a, "to": b, "one_way_ms": one_way_ms})

    def set_closed(self, region: str, port: int, closed: bool) -> None:
        """Close a public address (callers are refused, connections reset), or open it again."""
        self._ask({"op": "close", "to": region, "port": port, "on": closed})

    def set_isolated(self, region: str, isolated: bool) -> None:
        """Let everything to and from a region vanish; back again, its old connections are reset."""
        self._ask({"op": "isolate", "to": region, "on": isolated})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = msgspec.json.decode(self._exchange(msgspec.json.encode(request) + b"\n"))
        except (OSError, msgspec.DecodeError) as error:
            raise LinkFailed(f"the link proxy at {self._path} did not answer {request['op']}: {error}") from error
        if not reply.pop("ok"):
            raise LinkFailed(f"the link proxy refused {request['op']}: {reply['error']}")
        return reply

    def _exchange(self, request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(self._timeout_s)
            connection.connect(str(self._path))
            connection.sendall(request)
            with connection.makefile("rb") as replies:
                return replies.readline()
