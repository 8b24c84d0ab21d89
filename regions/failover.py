"""A planned failover: another region's server becomes the primary, and no write is lost. And who is what now.

How it is done, by what the servers can:

* **coordinated** (Valkey from 9.0): a Sentinel has the primary itself hold writes, wait until the chosen replica has
  everything, and hand over.
* **held** (older Valkey, Redis): writes are held on the primary from here (`CLIENT PAUSE WRITE`) until the replica has
  everything, then a Sentinel promotes it, and the old primary is made its replica before the hold ends: writes that
  waited are then refused. The hold outlasts the Sentinel's attempt.

Either way the Sentinels choose by priority, so the wanted server's is lowered first, and put back at the end.

While it runs, a probe writes to whichever server is the primary, each time from that server's own region, so that no
lag is in its figures. The longest time between two acknowledged writes is how long writes were away; and at the end
every acknowledged one must be there.

Whoever asks is the operator: cluster.json has the passwords. Every connection binds the address of the region that it
goes to.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from regions.cluster_file import ClusterFile, RegionUrls
from regions.errors import FailoverError, FailoverUnknown, NoSentinel, PrimaryDown, ReplicaDown, UnknownRegion
from regions.failover_rules import check_target
from regions.sentinel_config import GROUP
from regions.sentinels import ask, sighting
from verifier.netbind import bound_connection_kwargs
from verifier.sentinel import Address, ServerSeen, Sighting, parse_sentinel_url, read_replicas

__all__ = ["Failover", "FailoverReport", "connect", "connect_sentinel", "open_client"]

CALL_TIMEOUT_S = 2.0
POLL_S = 0.02
PRIORITY_WANTED, PRIORITY_USUAL = 1, 100
PRIORITY_SEEN_WITHIN_S = 15.0
"""A Sentinel reads INFO every 10 s at the slowest."""

ELIGIBLE_WITHIN_S = 5.0
"""A Sentinel's failover takes this long to be over after the promotion, if one of its replicas is away."""

HOLD_MS = 20_000
"""Longer than a Sentinel's whole attempt (twice its failover time-out, and the vote)."""

PROBE_EVERY_S = 0.005
PROBE_TIMEOUT_S = 0.1
"""A probe is made where the server is, so it takes no lag; a server that holds writes holds the probe too."""

PROBE_KEY = "{ks}:failover-probe"
PROBE_LIFE_S = 600


def connect(url: str, bind_address: str, *, timeout_s: float = CALL_TIMEOUT_S) -> redis.Redis:
    """A client of the server at a URL of cluster.json, bound to an address. Replies are bytes, retries off."""
    parts = urlsplit(url)
    return open_client(
        Address(parts.hostname or "", parts.port or 0), parts.username, parts.password, bind_address, timeout_s
    )


def open_client(
    place: Address, username: str | None, password: str | None, bind_address: str, timeout_s: float
) -> redis.Redis:
    """A client of a server or Sentinel, bound to an address. Replies are bytes, retries off."""
    pool = redis.ConnectionPool(
        host=place.host,
        port=place.port,
        username=username,
        password=password,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        driver_info=None,
        protocol=2,
        **bound_connection_kwargs(bind_address),
    )
    client = redis.Redis(connection_pool=pool)
    client.auto_close_connection_pool = True
    return client


def connect_sentinel(urls: RegionUrls) -> redis.Redis:
    """A client of a region's own Sentinel, as the operator. Raises `NoSentinel` where there is none."""
    if not urls.operator_sentinel_url:
        raise NoSentinel("this cluster has one region and no Sentinel: there is nothing to fail over to")
    url = parse_sentinel_url(urls.operator_sentinel_url)
    return open_client(url.sentinels[0], url.username, url.password, urls.bind_address, CALL_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class FailoverReport:
    """What a failover did. `lost` counts acknowledged probe writes that are gone: it must be 0."""

    was: str
    now: str
    how: str
    writes_away_ms: float
    took_ms: float
    acknowledged: int
    lost: int


@dataclass(slots=True)
class _Probe:
    """Counts up on the primary, whichever it is, and notes when each step was acknowledged."""

    cluster: ClusterFile
    clients: dict[str, redis.Redis]
    primary: str
    acknowledged: list[float] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, name="failover-probe", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.clients[self.primary].incr(PROBE_KEY)
                self.acknowledged.append(time.monotonic())
                self._stop.wait(PROBE_EVERY_S)
            except (redis.RedisError, OSError):
                self._stop.wait(POLL_S / 4)

    def goes_on(self, timeout_s: float) -> bool:
        """Wait until another write is acknowledged; False if none is."""
        have, deadline = len(self.acknowledged), time.monotonic() + timeout_s
        while len(self.acknowledged) == have:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S / 4)
        return True

    def longest_gap_ms(self) -> float:
        times = self.acknowledged
        return max(((later - earlier) * 1000 for earlier, later in pairwise(times)), default=0.0)

    def lost(self) -> int:
        """Acknowledged steps that the primary does not have. An unacknowledged one may have happened as well."""
        counted: Any = self.clients[self.primary].get(PROBE_KEY)
        return max(0, len(self.acknowledged) - int(counted or 0))


class Failover:
    """One failover to region `to`. `run` carries it out; it may be used once.

    `coordinate=False` holds writes from here even where the server could do it better. Raises `UnknownRegion`.
    """

    def __init__(self, cluster: ClusterFile, to: str, *, timeout_s: float = 15.0, coordinate: bool = True) -> None:
        if to not in cluster.regions:
            raise UnknownRegion(f"no region is called {to!r}; there are: {', '.join(cluster.regions)}")
        self._cluster = cluster
        self._to = to
        self._timeout_s = timeout_s
        self._coordinate = coordinate
        self._open = contextlib.ExitStack()

    def run(self) -> FailoverReport:
        """Raises a `FailoverError`; `FailoverUnknown` if its end was not seen."""
        with self._open:
            sentinel = self._open.enter_context(contextlib.closing(self._any_sentinel()))
            target = self._address(self._to)
            was = self._region_at(self._wait_eligible(sentinel, target))
            clients = {name: self._data_client(urls) for name, urls in self._cluster.regions.items()}
            probe = _Probe(self._cluster, clients, was)
            self._begin_probe(clients[was])
            with self._preferred(sentinel, target), probe.running():
                if not probe.goes_on(CALL_TIMEOUT_S):
                    raise PrimaryDown(f"the primary in {was} takes no write now")
                began = time.monotonic()
                how = self._hand_over(sentinel, was, target)
                probe.primary = self._to
                if not probe.goes_on(self._timeout_s):
                    raise FailoverUnknown(f"{self._to} was promoted, but acknowledged no write in time")
                took_ms = (time.monotonic() - began) * 1000
                self._wait_agreed(target)
            report = FailoverReport(
                was, self._to, how, probe.longest_gap_ms(), took_ms, len(probe.acknowledged), probe.lost()
            )
            clients[self._to].delete(PROBE_KEY)
            return report

    # -- steps ----------------------------------------------------------------------------------------------------

    def _wait_eligible(self, sentinel: redis.Redis, target: Address) -> Address:
        """The primary, once the target can take over from it: right after another failover that takes a while."""
        deadline = time.monotonic() + ELIGIBLE_WITHIN_S
        while True:
            seen, replicas = _look(sentinel)
            try:
                check_target(target, self._to, seen.primary, replicas)
            except (ReplicaDown, PrimaryDown):
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)
            else:
                return seen.primary.address

    def _begin_probe(self, primary: redis.Redis) -> None:
        try:
            primary.set(PROBE_KEY, 0, ex=PROBE_LIFE_S)
        except (redis.RedisError, OSError) as error:
            raise PrimaryDown(f"the primary takes no write now ({type(error).__name__})") from None

    @contextlib.contextmanager
    def _preferred(self, sentinel: redis.Redis, target: Address) -> Iterator[None]:
        """While inside, the Sentinel prefers the target to every other replica."""
        with contextlib.closing(self._operator(self._to)) as server:
            try:
                server.config_set("replica-priority", PRIORITY_WANTED)
                self._wait_priority(sentinel, target)
                yield
            except (redis.RedisError, OSError) as error:
                raise ReplicaDown(f"the server of {self._to} does not do what it is told ({_name(error)})") from None
            finally:
                with contextlib.suppress(redis.RedisError, OSError):
                    server.config_set("replica-priority", PRIORITY_USUAL)

    def _wait_priority(self, sentinel: redis.Redis, target: Address) -> None:
        deadline = time.monotonic() + PRIORITY_SEEN_WITHIN_S
        while True:
            _, replicas = _look(sentinel)
            if any(seen.address == target and seen.priority == PRIORITY_WANTED for seen in replicas):
                return
            if time.monotonic() > deadline:
                raise ReplicaDown(f"the Sentinel does not hear of the server of {self._to}")
            time.sleep(POLL_S)

    def _hand_over(self, sentinel: redis.Redis, was: str, target: Address) -> str:
        """Have the target promoted; returns how, when it is the primary."""
        with contextlib.closing(self._operator(was)) as primary, contextlib.closing(self._operator(self._to)) as server:
            coordinated = self._coordinate and _knows_coordinated(primary)
            if not coordinated:
                self._hold(primary, server)
            try:
                ask(sentinel, "FAILOVER", GROUP, *(["COORDINATED"] if coordinated else []))
            except redis.ResponseError as error:
                if not coordinated:
                    primary.client_unpause()
                raise FailoverError(f"the Sentinel refuses: {error}") from None
            self._wait_promoted(server)
            if not coordinated:  # before writes go on, or those that were held would be made on the old primary
                primary.replicaof(target.host, target.port)
                primary.client_unpause()
        return "coordinated" if coordinated else "held"

    def _hold(self, primary: redis.Redis, server: redis.Redis) -> None:
        """Hold writes, and wait until the replica has everything; if it does not get there, let them go on."""
        primary.client_pause(HOLD_MS, all=False)
        deadline = time.monotonic() + self._timeout_s / 3
        wanted = primary.info("replication")["master_repl_offset"]
        while server.info("replication").get("slave_repl_offset", -1) < wanted:
            if time.monotonic() > deadline:
                primary.client_unpause()
                raise ReplicaDown(f"the server of {self._to} did not catch up in time; writes go on where they were")
            time.sleep(POLL_S)

    def _wait_promoted(self, server: redis.Redis) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            with contextlib.suppress(redis.RedisError, OSError):
                if server.info("replication")["role"] == "master":
                    return
            if time.monotonic() > deadline:
                raise FailoverUnknown(
                    f"the server of {self._to} was not promoted within {self._timeout_s:.0f} s, and may still be; "
                    "`regions status` shows who is"
                )
            time.sleep(POLL_S / 4)

    def _wait_agreed(self, target: Address) -> None:
        """Wait until every Sentinel that answers names the new primary and is done: any of them may be asked."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            named = [seen.primary for seen in self._sightings()]
            if named and all(seen.address == target and seen.flags == {"master"} for seen in named):
                return
            if time.monotonic() > deadline:
                raise FailoverUnknown(f"{self._to} was promoted, but not every Sentinel says so yet: `regions status`")
            time.sleep(POLL_S)

    def _sightings(self) -> list[Sighting]:
        found = []
        for urls in self._cluster.regions.values():
            with contextlib.suppress(redis.RedisError, OSError), contextlib.closing(connect_sentinel(urls)) as client:
                found.append(sighting(client))
        return [seen for seen in found if seen is not None]

    # -- whom to talk to ------------------------------------------------------------------------------------------

    def _any_sentinel(self) -> redis.Redis:
        """The Sentinel of the region to promote, else any other that answers."""
        names = [self._to, *(name for name in self._cluster.regions if name != self._to)]
        for name in names:
            client = connect_sentinel(self._cluster.regions[name])
            try:
                client.ping()
            except (redis.RedisError, OSError):
                client.close()
            else:
                return client
        raise NoSentinel("no Sentinel answers: is the cluster running?")

    def _operator(self, region: str) -> redis.Redis:
        urls = self._cluster.regions[region]
        return connect(urls.operator_redis_url, urls.bind_address)

    def _data_client(self, urls: RegionUrls) -> redis.Redis:
        return self._open.enter_context(
            contextlib.closing(connect(urls.redis_url, urls.bind_address, timeout_s=PROBE_TIMEOUT_S))
        )

    def _address(self, region: str) -> Address:
        parts = urlsplit(self._cluster.regions[region].redis_url)
        return Address(parts.hostname or "", parts.port or 0)

    def _region_at(self, address: Address) -> str:
        return next((name for name in self._cluster.regions if self._address(name) == address), str(address))


def _look(sentinel: redis.Redis) -> tuple[Sighting, list[ServerSeen]]:
    try:
        seen = sighting(sentinel)
        replicas = read_replicas(ask(sentinel, "REPLICAS", GROUP))
    except (redis.RedisError, OSError) as error:
        raise NoSentinel(f"the Sentinel does not answer any more ({_name(error)})") from None
    if seen is None:
        raise NoSentinel("the Sentinel knows no primary")
    return seen, replicas


def _knows_coordinated(primary: redis.Redis) -> bool:
    """Valkey from 9.0; what calls itself Redis does not."""
    version = str(primary.info("server").get("valkey_version", "0"))
    return int(version.partition(".")[0]) >= 9


def _name(error: Exception) -> str:
    """Never the error's own text, which may quote an address."""
    return type(error).__name__
