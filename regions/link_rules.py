"""What the link proxy decides: who calls whom, over what, and what becomes of the connection.

Pure: no socket, no clock, no asyncio. `regions.link` moves the bytes; when they come out is in `regions.link_line`,
what toxics do to them in `regions.link_toxics`.

The rules:

1. A caller belongs to the region whose address prefix its source address has. A caller outside every region counts as
   local to its target, and is counted as *unbound*: someone forgot to bind its source address.
2. Each ordered pair of regions has one `Link`. A call from j to i uses the link j→i for what the caller sends
   (*upstream*) and i→j for what comes back (*downstream*); inside a region both are the link i→i, without lag.
3. Each ordered pair (caller's region, target's region) is also one `Pair`, which the control API calls a proxy, named
   `j:i`. It has toxics for its two streams, and may be down. So a fault of the *way* j→i is two toxics: upstream on
   `j:i` and downstream on `i:j`.
4. The first bytes of a connection leave the caller only one round trip after it connected, as the handshake would have
   it (the proxy's kernel accepts at once, the far server's would not). So a first request takes two round trips.
5. A handshake needs both directions. While either is held or cut, a new connection hangs: its caller, whom the kernel
   has accepted, hears nothing, and the server does not see it. It goes on, by rule 4, from when both are open, with all
   that the caller has sent by then; if the caller has closed, even half, it never was.
6. A connection that lost something to a cut is reset at both ends once neither direction is cut: TCP would go on
   resending for minutes, and we do not keep what it would resend. One that lost nothing goes on.
7. A pair that is down resets its connections, and new ones right after the kernel has accepted them.
8. Resets and closes by rules 6 and 7 and by the toxics `timeout` and `reset_peer` are the link's own: they happen at
   both ends at once, take no lag, and what is under way is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from regions.errors import LinkFailed, LinkRefused
from regions.link_line import DelayLine, Gate, Link, Stream
from regions.link_toxics import DOWNSTREAM, UPSTREAM, ResetPeer, Timeout, Toxic, ToxicBody, make_toxic, update_toxic
from regions.topology import ONE_WAY_MS_MAX, Topology

__all__ = [
    "QUEUE_BYTES_MAX",
    "Call",
    "Change",
    "Ending",
    "Fate",
    "Lag",
    "LinkConfig",
    "Listener",
    "Network",
    "Pair",
    "link_config",
]

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

    `regions` maps each name to its address prefix. `links` may leave pairs out: they have no lag. `seed` decides what
    chance decides: jitter and the sizes of slices, for each connection by its pair and its number among the pair's.
    """

    listeners: list[Listener]
    regions: dict[str, str]
    links: list[Lag]
    control: str
    queue_bytes_max: Annotated[int, msgspec.Meta(ge=1)] = QUEUE_BYTES_MAX
    seed: int = 0

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
    seed: int = 0,
) -> LinkConfig:
    """The configuration for `topology`; `uds_of[region, service]` is the unix socket behind that public address."""
    listeners = [
        Listener(topology.region(region).address, topology.ports[service], region, str(uds))
        for (region, service), uds in uds_of.items()
    ]
    prefixes = {region.name: region.address_prefix for region in topology.regions}
    lags = [Lag(a, b, one_way_ms) for (a, b), one_way_ms in topology.links.items()]
    return LinkConfig(listeners, prefixes, lags, str(control), queue_bytes_max, seed)


class Pair:
    """Everything about the connections from one region to another (or to itself): a proxy, in the control API."""

    def __init__(self, caller: str, target: str, to_target: Link, to_caller: Link) -> None:
        self.caller = caller
        self.target = target
        self.streams = {UPSTREAM: Stream(to_target), DOWNSTREAM: Stream(to_caller)}
        self.enabled = True

    @property
    def name(self) -> str:
        return f"{self.caller}:{self.target}"

    @property
    def toxics(self) -> list[Toxic]:
        return [toxic for stream in self.streams.values() for toxic in stream.toxics]

    def toxic(self, name: str) -> Toxic:
        """Raises `LinkRefused` (404)."""
        for toxic in self.toxics:
            if toxic.name == name:
                return toxic
        raise LinkRefused(f"toxic not found: {name!r} on proxy {self.name!r}", 404)

    def put(self, toxic: Toxic) -> None:
        """Add, or replace the one of the same name in its place."""
        old = next((known for known in self.toxics if known.name == toxic.name), None)
        here = self.streams[toxic.stream].toxics
        if old is not None and old.stream == toxic.stream:
            here[here.index(old)] = toxic
        else:
            self.remove([toxic.name])
            here.append(toxic)

    def remove(self, names: Sequence[str]) -> None:
        """Remove those of `names` that there are."""
        for stream in self.streams.values():
            stream.toxics[:] = [toxic for toxic in stream.toxics if toxic.name not in names]

    def clear(self) -> None:
        self.enabled = True
        for stream in self.streams.values():
            stream.toxics.clear()


class Ending(Enum):
    """How the link ends a connection."""

    CLOSE = "close"
    RESET = "reset"


class Fate(NamedTuple):
    """A connection ends at `due_s` (monotonic) if nothing changes before."""

    due_s: float
    how: Ending


class Call:
    """One connection: its two directions, and what will become of it.

    `connected` once its handshake has begun (rule 5).
    """

    def __init__(self, pair: Pair, now_s: float, seed: str) -> None:
        self._pair = pair
        self._opened_s = now_s
        up, down = pair.streams[UPSTREAM], pair.streams[DOWNSTREAM]
        self.to_target = DelayLine(up, seed=f"{seed}:{UPSTREAM}", now_s=now_s, started=False)
        self.to_caller = DelayLine(down, seed=f"{seed}:{DOWNSTREAM}", now_s=now_s)
        self.connected = False
        self._connect_if_possible(now_s)

    @property
    def pair(self) -> Pair:
        return self._pair

    @property
    def round_trip_s(self) -> float:
        return sum(stream.one_way_s for stream in self._pair.streams.values())

    def change(self, now_s: float) -> None:
        """Take the pair as it is now."""
        self.to_target.change(now_s)
        self.to_caller.change(now_s)
        self._connect_if_possible(now_s)

    def fate(self) -> Fate | None:
        """How and when the connection ends as things stand, if the link ends it at all."""
        if not self._pair.enabled or self._broken():
            return Fate(self._opened_s, Ending.RESET)
        return min(self._ends_by_toxics(), default=None, key=lambda fate: fate.due_s)

    def _broken(self) -> bool:
        return (self.to_target.lost or self.to_caller.lost) and Gate.CUT not in self._gates()

    def _ends_by_toxics(self) -> Iterator[Fate]:
        for toxic in self._pair.toxics:
            since_s = max(self._opened_s, toxic.since_s)
            match toxic.attributes:
                case ResetPeer(timeout=timeout_ms):
                    yield Fate(since_s + timeout_ms / 1000, Ending.RESET)
                case Timeout(timeout=timeout_ms) if timeout_ms > 0:
                    yield Fate(since_s + timeout_ms / 1000, Ending.CLOSE)

    def _connect_if_possible(self, now_s: float) -> None:
        if self.connected or not self._pair.enabled or self._gates() != {Gate.OPEN}:
            return
        self.connected = True
        first_arrival_s = now_s + self.round_trip_s + self._pair.streams[UPSTREAM].link.one_way_s
        self.to_target.start(first_arrival_s, now_s)

    def _gates(self) -> set[Gate]:
        return {stream.gate for stream in self._pair.streams.values()}


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part of a change of many pairs at once: which toxics are put and removed (those that there are)."""

    proxy: str
    put: list[ToxicBody] = []
    remove: list[str] = []
    enabled: bool | None = None


class Network:
    """All links and pairs, and the counters."""

    def __init__(self, config: LinkConfig) -> None:
        self._prefixes = dict(config.regions)
        self._seed = config.seed
        ordered = list(product(config.regions, config.regions))
        self.links: dict[tuple[str, str], Link] = {(a, b): Link() for a, b in ordered}
        pairs = [Pair(a, b, self.links[a, b], self.links[b, a]) for a, b in ordered]
        self.pairs = {pair.name: pair for pair in pairs}
        self.unbound: Counter[str] = Counter(dict.fromkeys(config.regions, 0))
        self.refused: Counter[str] = Counter(dict.fromkeys(config.regions, 0))
        for lag in config.links:
            self.set_link(lag.from_, lag.to, lag.one_way_ms)

    def region_of(self, address: str) -> str | None:
        """The region that `address` lies in, if any."""
        return next((name for name, prefix in self._prefixes.items() if address.startswith(prefix)), None)

    def call(self, caller_address: str, target: str, now_s: float) -> Call:
        """Count a connection from `caller_address` to region `target`, and say what it uses (rules 1 and 2)."""
        caller = self.region_of(caller_address)
        if caller is None:
            self.unbound[target] += 1
            caller = target
        link, pair = self.links[caller, target], self.pairs[f"{caller}:{target}"]
        link.connections += 1
        return Call(pair, now_s, seed=f"{self._seed}:{pair.name}:{link.connections}")

    def set_link(self, a: str, b: str, one_way_ms: float) -> None:
        """Set the lag from region `a` to region `b`, also for connections that are open; `LinkRefused` if unknown."""
        if (a, b) not in self.links:
            raise LinkRefused(f"no link from {a!r} to {b!r}; the regions are: {', '.join(self._prefixes)}", 404)
        self.links[a, b].one_way_ms = one_way_ms

    def pair(self, name: str) -> Pair:
        """Raises `LinkRefused` (404)."""
        if name not in self.pairs:
            raise LinkRefused(f"proxy not found: {name!r}; there are: {', '.join(self.pairs)}", 404)
        return self.pairs[name]

    def add_toxic(self, pair: Pair, body: ToxicBody, now_s: float) -> Toxic:
        """Raises `LinkRefused`: 400, or 409 if there is one of that name."""
        toxic = make_toxic(body, now_s)
        if any(known.name == toxic.name for known in pair.toxics):
            raise LinkRefused(f"toxic already exists: {toxic.name!r} on proxy {pair.name!r}", 409)
        pair.put(toxic)
        return toxic

    def update_toxic(self, pair: Pair, name: str, body: ToxicBody, now_s: float) -> Toxic:
        """Raises `LinkRefused`: 400 or 404."""
        toxic = update_toxic(pair.toxic(name), body, now_s)
        pair.put(toxic)
        return toxic

    def remove_toxic(self, pair: Pair, name: str) -> None:
        """Raises `LinkRefused` (404)."""
        pair.remove([pair.toxic(name).name])

    def apply(self, changes: Sequence[Change], now_s: float) -> list[Pair]:
        """Make all changes or, raising `LinkRefused`, none; returns the pairs they are about."""
        made = [(self.pair(c.proxy), c, [make_toxic(body, now_s) for body in c.put]) for c in changes]
        for pair, change, toxics in made:
            pair.remove(change.remove)
            for toxic in toxics:
                pair.put(toxic)
            if change.enabled is not None:
                pair.enabled = change.enabled
        return list(dict.fromkeys(pair for pair, _, _ in made))

    def heal(self) -> list[Pair]:
        """Remove every toxic and take every pair up; lags stay. Returns all pairs."""
        for pair in self.pairs.values():
            pair.clear()
        return list(self.pairs.values())

    def counters(self) -> dict[str, Any]:
        """Everything counted, ready for JSON; `bytes` are those that have come out, `bytes_lost` what cuts took."""
        return {
            "unbound": dict(self.unbound),
            "refused": dict(self.refused),
            "pairs": list(self._pair_counters()),
        }

    def _pair_counters(self) -> Iterator[dict[str, Any]]:
        for (a, b), link in self.links.items():
            used = {"connections": link.connections, "bytes": link.bytes, "bytes_lost": link.bytes_lost}
            yield {"from": a, "to": b, "one_way_ms": link.one_way_ms, **used}
