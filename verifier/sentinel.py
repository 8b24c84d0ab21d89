"""Finding a server through Sentinels: the URL that names them, what they answer, and which server to take.

    redis+sentinel://[user:password@]host[:port][,host[:port]…]/GROUP        (rediss+sentinel:// for TLS everywhere)

User and password are the Sentinels' own; the servers' are given separately. The first host is the own region's
Sentinel: it is asked first, and a server on its host is the own region's. Everything here is pure but
:func:`sentinel_connector`.

Which server a mirror reads (:func:`nodes_in_order`), of those that the Sentinel sees as sound:

1. the own region's, also while it is the primary;
2. any other replica, in random order, so that the readers of a lost region spread;
3. the primary.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import unquote

if TYPE_CHECKING:
    import redis

__all__ = [
    "Address",
    "SentinelUrl",
    "ServerSeen",
    "Sighting",
    "is_sentinel_url",
    "nodes_in_order",
    "parse_sentinel_url",
    "read_replicas",
    "read_sighting",
    "sentinel_connector",
]

SCHEMES: Final = ("redis+sentinel://", "rediss+sentinel://")
PORT_DEFAULT: Final = 26_379

SENTINEL_TIMEOUT_S: Final = 1.0
"""One connection to a Sentinel, and one answer: five round trips of 200 ms. Then the next Sentinel is asked."""

_UNSOUND: Final = frozenset({"s_down", "o_down", "disconnected", "master_down"})


class Address(NamedTuple):
    """Where a server or a Sentinel listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """What a Sentinel URL says. The password is hidden in ``repr``."""

    sentinels: tuple[Address, ...]
    group: str
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)


def is_sentinel_url(url: str) -> bool:
    """Whether this names Sentinels rather than a server."""
    return url.startswith(SCHEMES)


def parse_sentinel_url(url: str) -> SentinelUrl:
    """Read a Sentinel URL; raises :class:`ValueError`, which does not repeat it."""
    scheme, separator, rest = url.partition("://")
    places, _, group = rest.partition("/")
    user, _, hosts = places.rpartition("@")
    if scheme + separator not in SCHEMES or not group or "/" in group or "?" in group:
        raise ValueError("is not redis+sentinel://host:port,host:port/GROUP")
    username, _, password = user.partition(":")
    return SentinelUrl(
        tuple(_address(part) for part in hosts.split(",")),
        unquote(group),
        scheme.startswith("rediss"),
        unquote(username) or None,
        unquote(password) or None,
    )


def _address(text: str) -> Address:
    host, port = text, ""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        if port and not port.startswith(":"):
            raise ValueError("has a host that is none")
        port = port[1:]
    elif ":" in text:
        host, _, port = text.partition(":")
    if not host or any(character in host for character in " @[]?#"):
        raise ValueError("has a host that is none")
    number = int(port) if port.isascii() and port.isdigit() else PORT_DEFAULT if not port else 0
    if not 0 < number < 65_536:
        raise ValueError("has a port that is none")
    return Address(host, number)


# -- what a Sentinel answers ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerSeen:
    """A server as a Sentinel sees it."""

    address: Address
    flags: frozenset[str]
    link_ok: bool = True
    """Of a replica: its link to the primary."""
    priority: int = 100
    """Of a replica: the lower, the sooner it is promoted; 0 is never."""

    @property
    def sound(self) -> bool:
        """Whether the Sentinel reaches it, and it follows the primary."""
        return self.link_ok and not self.flags & _UNSOUND


@dataclass(frozen=True, slots=True)
class Sighting:
    """Who a Sentinel takes for the primary, and since which of its configuration epochs."""

    primary: ServerSeen
    config_epoch: int


def read_sighting(state: Any, address: Any) -> Sighting | None:
    """From the answers to ``MASTER`` and ``GET-MASTER-ADDR-BY-NAME``, asked in this order; None if it knows no primary.

    The first has the configuration epoch. The second names a promoted server at once, also on the Sentinel that leads
    the failover. In the other order an old address could come with a new epoch, and would be believed.
    """
    if not address:
        return None
    host, port = address
    known = _state(state)
    seen = ServerSeen(Address(_text(host), int(port)), _flags(known))
    return Sighting(seen, int(known.get("config-epoch", "0")))


def read_replicas(reply: Any) -> list[ServerSeen]:
    """From the answer to ``REPLICAS``."""
    found = []
    for item in reply or ():
        known = _state(item)
        address = Address(known["ip"], int(known["port"]))
        link_ok = known.get("master-link-status") == "ok"
        found.append(ServerSeen(address, _flags(known), link_ok, int(known.get("slave-priority", "100"))))
    return found


def _state(reply: Any) -> dict[str, str]:
    """A server's fields, whether they came as a list of names and values (RESP2) or as a map."""
    pairs = reply.items() if isinstance(reply, Mapping) else zip(reply[::2], reply[1::2], strict=True)
    return {_text(name): _text(value) for name, value in pairs}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _flags(known: Mapping[str, str]) -> frozenset[str]:
    return frozenset(known.get("flags", "").split(","))


def nodes_in_order(
    own_host: str, primary: ServerSeen, replicas: Iterable[ServerSeen], rng: random.Random
) -> list[Address]:
    """The servers that a mirror may read, best first (the module's rules); the primary even if nothing is sound."""
    sound = [seen.address for seen in replicas if seen.sound]
    rng.shuffle(sound)
    found = [*sound, primary.address]
    return sorted(found, key=lambda address: address.host != own_host)


# -- the shell ------------------------------------------------------------------------------------------------------


def sentinel_connector(
    url: SentinelUrl,
    settings: Mapping[str, Any],
    open_at: Callable[[Mapping[str, Any]], redis.Redis],
    rng: random.Random | None = None,
) -> Callable[[], redis.Redis]:
    """A function that finds a server and gives ``open_at`` of it: of these ``settings`` of a pool, and its address.

    It asks the Sentinels in their order and takes the first answer. It raises what redis-py raises when no Sentinel
    answers or no server takes the connection.
    """
    import redis

    generator = random.Random() if rng is None else rng

    def client(address: Address, options: Mapping[str, Any]) -> redis.Redis:
        return open_at({**options, "host": address.host, "port": address.port})

    def ask(sentinel: Address) -> list[Address]:
        times = {"socket_timeout": SENTINEL_TIMEOUT_S, "socket_connect_timeout": SENTINEL_TIMEOUT_S}
        user = {"username": url.username, "password": url.password}
        with contextlib.closing(client(sentinel, {**settings, **times, **user})) as asked:
            seen = read_sighting(*(_ask(asked, word, url.group) for word in ("MASTER", "GET-MASTER-ADDR-BY-NAME")))
            if seen is None:
                raise redis.ConnectionError("the Sentinel does not know the group")
            replicas = read_replicas(_ask(asked, "REPLICAS", url.group))
        return nodes_in_order(url.sentinels[0].host, seen.primary, replicas, generator)

    def connect() -> redis.Redis:
        nodes: list[Address] = _first(url.sentinels, ask)
        found: redis.Redis = _first(nodes, lambda address: client(address, settings))
        return found

    return connect


def _ask(client: redis.Redis, word: str, group: str) -> Any:
    return client.execute_command("SENTINEL", word, group)  # type: ignore[no-untyped-call]  # redis-py leaves it so


def _first(places: Sequence[Address], call: Callable[[Address], Any]) -> Any:
    """What the first place gives that does not fail; the last failure if none does."""
    import redis

    failure: Exception = redis.ConnectionError("there is nowhere to ask")
    for place in places:
        try:
            return call(place)
        except (redis.RedisError, OSError) as error:
            failure = error
    raise failure
