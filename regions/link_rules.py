"""What the link proxy decides: who calls whom, and when what was sent comes out at the other side.

Pure: no socket, no clock, no asyncio. `regions.link` moves the bytes.

The rules:

1. A caller belongs to the region whose address prefix its source address has. A caller outside every region counts as
   local to its target, and is counted as *unbound*: someone forgot to bind its source address.
2. Each ordered pair of regions is one `Link`. A call from j to i uses the link j→i for what the caller sends and i→j
   for what comes back; inside a region both are the link i→i, without lag.
3. One `DelayLine` per connection and direction keeps the order: nothing comes out before its lag has passed, nothing
   before what was sent earlier. Any number of chunks is under way at once, so lag does not limit throughput.
4. The first bytes of a connection leave the caller only one round trip after it connected, as the handshake would have
   it (the proxy's kernel accepts at once, the far server's would not). So a first request takes two round trips.
5. `Link.due_s` is the one place that decides when something comes out. Whatever else a link can do belongs there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import msgspec

from regions.errors import LinkFailed
from regions.topology import ONE_WAY_MS_MAX, Topology

__all__ = ["QUEUE_BYTES_MAX", "DelayLine", "End", "Lag", "Link", "LinkConfig", "Listener", "Network", "link_config"]

QUEUE_BYTES_MAX = 64 * 1024 * 1024
"""Bytes under way per connection and direction before the sender is slowed down.

Must exceed bandwidth × lag, or this limit and not the link sets the speed: 64 MiB lets 370 MB/s through 180 ms of lag.
"""

OneWayMs = Annotated[float, msgspec.Meta(ge=0.0, le=ONE_WAY_MS_MAX)]


class Listener(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A public address, the region it is in, and the unix socket of the server behind it."""

    address: str
    port: int
    region: str
    uds: str


class Lag(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Lag of one ordered pair of regions."""

    from_: str = msgspec.field(name="from")
    to: str
    one_way_ms: OneWayMs


class LinkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The proxy's configuration file (JSON).

    `regions` maps each name to its address prefix. `links` may leave pairs out: they have no lag.
    """

    listeners: list[Listener]
    regions: dict[str, str]
    links: list[Lag]
    control: str
    queue_bytes_max: Annotated[int, msgspec.Meta(ge=1)] = QUEUE_BYTES_MAX

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self))

    @classmethod
    def from_json(cls, data: bytes) -> LinkConfig:
        """Raises `LinkFailed` naming the key."""
        try:
            config = msgspec.json.decode(data, type=cls)
        except msgspec.DecodeError as error:
            raise LinkFailed(f"link configuration: {error}") from error
        named = {listener.region for listener in config.listeners}
        named |= {name for lag in config.links for name in (lag.from_, lag.to)}
        if unknown := sorted(named - config.regions.keys()):
            raise LinkFailed(f"link configuration: not in `regions`: {', '.join(unknown)}")
        return config


def link_config(
    topology: Topology,
    uds_of: Mapping[tuple[str, str], Path],
    control: Path,
    *,
    queue_bytes_max: int = QUEUE_BYTES_MAX,
) -> LinkConfig:
    """The configuration for `topology`; `uds_of[region, service]` is the unix socket behind that public address."""
    listeners = [
        Listener(topology.region(region).address, topology.ports[service], region, str(uds))
        for (region, service), uds in uds_of.items()
    ]
    prefixes = {region.name: region.address_prefix for region in topology.regions}
    lags = [Lag(a, b, one_way_ms) for (a, b), one_way_ms in topology.links.items()]
    return LinkConfig(listeners, prefixes, lags, str(control), queue_bytes_max)


@dataclass(slots=True)
class Link:
    """The way from one region to another (or to itself), and what has used it."""

    one_way_ms: float = 0.0
    connections: int = 0
    bytes: int = 0

    @property
    def one_way_s(self) -> float:
        return self.one_way_ms / 1000

    def due_s(self, now_s: float, not_before_s: float) -> float:
        """When something sent at `now_s` comes out, if nothing may come out before `not_before_s` (both monotonic)."""
        return max(now_s + self.one_way_s, not_before_s)


class End(Enum):
    """How one direction of a connection ends."""

    EOF = "eof"  # the sender is done; the other direction may go on
    RESET = "reset"  # the connection is gone in both directions


class DelayLine:
    """What one direction of one connection has under way, in order."""

    __slots__ = ("_last_due_s", "_link", "_under_way", "held_bytes")

    def __init__(self, link: Link, *, not_before_s: float = 0.0) -> None:
        self._link = link
        self._last_due_s = not_before_s
        self._under_way: deque[tuple[float, bytes | End]] = deque()
        self.held_bytes = 0

    @property
    def next_due_s(self) -> float | None:
        """When the next thing comes out; None if nothing is under way."""
        return self._under_way[0][0] if self._under_way else None

    def push(self, sent: bytes | End, now_s: float) -> None:
        self._last_due_s = self._link.due_s(now_s, self._last_due_s)
        self._under_way.append((self._last_due_s, sent))
        if not isinstance(sent, End):
            self.held_bytes += len(sent)

    def pop_due(self, now_s: float) -> bytes | End | None:
        """The next thing that has arrived at `now_s`, or None."""
        if not self._under_way or self._under_way[0][0] > now_s:
            return None
        _, arrived = self._under_way.popleft()
        if not isinstance(arrived, End):
            self.held_bytes -= len(arrived)
            self._link.bytes += len(arrived)
        return arrived

    def drop(self) -> None:
        """Forget everything under way: there is nobody left to receive it."""
        self._under_way.clear()
        self.held_bytes = 0


@dataclass(frozen=True, slots=True)
class Call:
    """The two links that one connection uses."""

    to_target: Link
    to_caller: Link

    @property
    def round_trip_s(self) -> float:
        return self.to_target.one_way_s + self.to_caller.one_way_s


class Network:
    """All links, and the counters."""

    def __init__(self, config: LinkConfig) -> None:
        self._prefixes = dict(config.regions)
        self.links: dict[tuple[str, str], Link] = {(a, b): Link() for a, b in product(config.regions, config.regions)}
        self.unbound: Counter[str] = Counter(dict.fromkeys(config.regions, 0))
        self.refused: Counter[str] = Counter(dict.fromkeys(config.regions, 0))
        for lag in config.links:
            self.set_link(lag.from_, lag.to, lag.one_way_ms)

    def region_of(self, address: str) -> str | None:
        """The region that `address` lies in, if any."""
        return next((name for name, prefix in self._prefixes.items() if address.startswith(prefix)), None)

    def call(self, caller_address: str, target: str) -> Call:
        """Count a connection from `caller_address` to region `target`, and say which links it uses (rules 1 and 2)."""
        caller = self.region_of(caller_address)
        if caller is None:
            self.unbound[target] += 1
            caller = target
        self.links[caller, target].connections += 1
        return Call(to_target=self.links[caller, target], to_caller=self.links[target, caller])

    def set_link(self, a: str, b: str, one_way_ms: float) -> None:
        """Set the lag from region `a` to region `b`, also for connections that are open; `LinkFailed` if unknown."""
        if (a, b) not in self.links:
            raise LinkFailed(f"no link from {a!r} to {b!r}; the regions are: {', '.join(self._prefixes)}")
        self.links[a, b].one_way_ms = one_way_ms

    def counters(self) -> dict[str, Any]:
        """Everything counted, ready for JSON; `bytes` are those that have come out."""
        return {
            "unbound": dict(self.unbound),
            "refused": dict(self.refused),
            "pairs": list(self._pairs()),
        }

    def _pairs(self) -> Iterator[dict[str, Any]]:
        for (a, b), link in self.links.items():
            used = {"connections": link.connections, "bytes": link.bytes}
            yield {"from": a, "to": b, "one_way_ms": link.one_way_ms, **used}
