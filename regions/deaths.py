"""Deaths and returns of a cluster's machines.

* A **server's death** is its process alone: what the kernel had still sent arrives, connections end, and callers are
  refused. That loses nothing.
* A **region's death** is that of its machines: every link is cut at once, and everything in it is killed. Nobody is
  told; whatever was under way is gone.

A server that returns is **fenced**. Its address is closed before it starts, and it starts as a replica of the primary
that a majority of the Sentinels is settled on, never by itself as a primary: with the data that it left it would take
its readers back to the past. Once it follows that primary and has its data, the address opens. If the Sentinels still
take the dead server for the primary, it waits behind its closed address until they have promoted another.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from regions.embedded import Server, observe_replication, restart_server, start_replica
from regions.errors import NotReady
from regions.failover_rules import not_following
from regions.link_control import LinkControl
from regions.nursery import Child, Nursery
from regions.sentinels import Sentinels
from regions.topology import Region, Topology
from verifier.sentinel import Address

__all__ = ["Deaths", "Service"]

RETURN_WITHIN_S = 180.0
"""An attempt at a failover takes up to 8 s, and a split vote costs another; a full synchronisation some more."""

POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Service:
    """A process of a region, and how it was started."""

    region: Region
    kind: str
    argv: Sequence[str]
    env: dict[str, str] = field(repr=False)
    child: Child


class Deaths:
    """What `Cluster` can have happen to its machines. Every method blocks until it has happened."""

    topology: Topology
    link: LinkControl
    servers: dict[str, Server]
    sentinels: Sentinels
    _nursery: Nursery
    _services: dict[str, Service]
    _wait_ready: Callable[[Sequence[Service]], None]

    def kill_server(self, region: str) -> None:
        """The region's Redis process dies."""
        self.servers[region].child.kill()

    def kill_sentinel(self, region: str) -> None:
        """The region's Sentinel process dies."""
        self.sentinels.children[region].kill()

    def kill_service(self, name: str) -> None:
        """A service's process dies, for instance `keyservice-eu-west-1`."""
        self._services[name].child.kill()

    def restart_service(self, name: str) -> None:
        """Start a service again that has died, as it was started before. Raises `NotReady`."""
        self._wait_ready([self._start_again(self._services[name])])

    def kill_region(self, region: str) -> None:
        """The region's machines die: its links are cut, then everything in it is killed."""
        name = self.topology.region(region).name
        self.link.set_isolated(name, True)
        children = self._children(name)
        for child in children:
            child.expected_to_end = True
            child.send_signal(signal.SIGKILL)
        for child in children:
            child.kill()

    def restart_server(self, region: str) -> None:
        """Start a region's server again on the data it left, fenced. Raises `NotReady`.

        Where there are no Sentinels there is nobody else to follow: it then is what it was.
        """
        if self.sentinels.regions:
            self._return_server(self.topology.region(region), wipe=False)
        else:
            self.restart_server_unfenced(region)

    def restart_server_unfenced(self, region: str) -> None:
        """Start a region's server again at once as what it was, as a supervisor that knows nothing better would."""
        self.servers[region] = restart_server(self.servers[region], self._nursery, timeout_s=RETURN_WITHIN_S)

    def return_sentinel(self, region: str) -> None:
        """Start a region's Sentinel again, from nothing. Raises `NotReady`."""
        self._return_sentinel(self.topology.region(region))
        self.sentinels.wait_ready(self._living_sentinels(), RETURN_WITHIN_S)

    def return_region(self, region: str) -> None:
        """New machines for a region that died: its processes on empty disks, the server fenced. Raises `NotReady`."""
        place = self.topology.region(region)
        if self.sentinels.regions:
            self._close(place, True)
            self.link.set_isolated(place.name, False)
            if not self._can_promote(without=place):
                self._return_sentinel(place)  # its vote is needed to promote another
            self._return_server(place, wipe=True)
            if self.sentinels.children[place.name].poll() is not None:
                self._return_sentinel(place)
        else:
            self.link.set_isolated(place.name, False)
            self.restart_server_unfenced(place.name)
        self._wait_ready([self._start_again(service) for service in self._services_of(place.name)])
        if self.sentinels.regions:
            self.sentinels.wait_ready(self._living_sentinels(), RETURN_WITHIN_S)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _services_of(self, region: str) -> list[Service]:
        return [service for service in self._services.values() if service.region.name == region]

    def _children(self, region: str) -> list[Child]:
        found = [self.servers[region].child, *(service.child for service in self._services_of(region))]
        if region in self.sentinels.children:
            found.append(self.sentinels.children[region])
        return found

    def _start_again(self, service: Service) -> Service:
        child = self._nursery.spawn(service.child.name, service.argv, env=service.env)
        self._services[child.name] = replace(service, child=child)
        return self._services[child.name]

    def _living_sentinels(self) -> list[Region]:
        return [r for r in self.sentinels.regions if self.sentinels.children[r.name].poll() is None]

    def _can_promote(self, *, without: Region) -> bool:
        """Whether a primary can be settled on (or promoted) without this region's Sentinel."""
        others = [region for region in self._living_sentinels() if region != without]
        return len(others) * 2 > len(self.sentinels.regions)

    def _close(self, region: Region, closed: bool) -> None:
        self.link.set_closed(region.name, self.topology.ports["redis"], closed)

    def _return_sentinel(self, region: Region) -> None:
        """A Sentinel that starts from nothing takes what it is told; the others correct it by their newer epoch."""
        self.sentinels.start(region, self.sentinels.primary() or self._last_primary(region))

    def _last_primary(self, region: Region) -> Region:
        """Whom the Sentinels named last, whether or not it lives."""
        seen = max(self.sentinels.sightings(), key=lambda sighting: sighting.config_epoch, default=None)
        if seen is None:
            raise NotReady(f"no Sentinel is left to say whom sentinel-{region.name} should watch")
        return next(r for r in self.topology.regions if r.address == seen.primary.address.host)

    def _return_server(self, region: Region, *, wipe: bool) -> None:
        """Start the server behind its closed address, and open that once it follows the settled primary."""
        deadline = time.monotonic() + RETURN_WITHIN_S
        port = self.topology.ports["redis"]
        version = self.sentinels.binary.version
        self._close(region, True)
        primary = self._wait_primary(region, deadline)
        server = start_replica(
            self.servers[region.name], self._nursery, replica_of=primary, port=port, version=version, wipe=wipe
        )
        self.servers[region.name] = server
        while (problem := not_following(observe_replication(server), Address(primary.address, port))) is not None:
            self._nursery.check()
            if time.monotonic() > deadline:
                raise NotReady(f"the server of {region.name} stays behind its closed address: {problem}")
            now = self.sentinels.primary()
            if now is not None and now not in (primary, region):  # another one was promoted meanwhile
                server.child.kill()
                primary = now
                server = start_replica(server, self._nursery, replica_of=now, port=port, version=version, wipe=wipe)
                self.servers[region.name] = server
            time.sleep(POLL_S)
        self._close(region, False)

    def _wait_primary(self, region: Region, deadline: float) -> Region:
        """The primary to follow, which is not the region's own server."""
        while (primary := self.sentinels.primary()) is None or primary == region:
            if time.monotonic() > deadline:
                raise NotReady(f"the Sentinels have not settled on a primary that {region.name} could follow")
            time.sleep(POLL_S)
        return primary
