"""Servers, Sentinels and the links between them, without any service: enough to fail over, started in two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regions.cluster_file import ClientSecret, ClusterFile, DemoUser, RegionUrls
from regions.deaths import Deaths, Service
from regions.embedded import find_server, runtime_directory, start_servers
from regions.link_control import LinkControl
from regions.link_rules import link_config
from regions.nursery import Nursery
from regions.ports import pick_free_ports
from regions.sentinel_config import GROUP
from regions.sentinels import Sentinels
from regions.topology import Region, Topology, parse_topology

WITHIN_S = 60.0

TWO_REGIONS = """
[[regions]]
name = "a"
primary = true
[[regions]]
name = "b"
[[links]]
between = ["a", "b"]
one_way_ms = 5
"""

THREE_REGIONS = """
[[regions]]
name = "a"
primary = true
[[regions]]
name = "b"
[[regions]]
name = "c"
[[links]]
between = ["a", "b"]
one_way_ms = 10
[[links]]
between = ["a", "c"]
one_way_ms = 20
[[links]]
between = ["b", "c"]
one_way_ms = 20
"""


def until(condition: Callable[[], Any], what: str, timeout_s: float = WITHIN_S) -> Any:
    """Poll until ``condition()`` is true, and give what it gave; fail when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)
    return found


class Lab(Deaths):
    """Regions with a server and a Sentinel each."""

    def __init__(self, topology: Topology, nursery: Nursery, run: Path, data: Path) -> None:
        self.topology = topology
        self._nursery = nursery
        self._services: dict[str, Service] = {}
        self._wait_ready = lambda _services: None
        self._run = run
        sockets = {(r.name, kind): self.socket(r, kind) for r in topology.regions for kind in ("redis", "sentinel")}
        config = data / "link.json"
        config.write_bytes(link_config(topology, sockets, run / "link.sock").to_json())
        child = nursery.spawn("link", [sys.executable, "-m", "regions.link", str(config)])
        child.wait_for_line("ready", WITHIN_S)
        self.link = LinkControl(run / "link.sock")
        self.servers = start_servers(
            topology, nursery, directory=data, socket_of=lambda r: self.socket(r, "redis"), timeout_s=WITHIN_S
        )
        self.passwords = self.servers["a"].passwords
        self.sentinels = Sentinels(
            topology,
            nursery,
            data,
            lambda r: self.socket(r, "sentinel"),
            find_server(),
            self.passwords["sentinel"],
        )
        for region in self.sentinels.regions:
            self.sentinels.start(region, topology.primary)
        self.sentinels.wait_ready(self.sentinels.regions, WITHIN_S)

    def socket(self, region: Region, kind: str) -> Path:
        return self._run / f"{kind}-{region.index}.sock"

    def url(self, region: str, user: str = "keyservice") -> str:
        place = self.topology.region(region)
        return f"redis://{user}:{self.passwords[user]}@{place.address}:{self.topology.ports['redis']}"

    def sentinel_url(self, region: str, user: str = "", *, alone: bool = False) -> str:
        """All Sentinels, the region's own first."""
        own = self.topology.region(region)
        others = [] if alone else [r for r in self.topology.regions if r != own]
        places = ",".join(f"{r.address}:{self.topology.ports['sentinel']}" for r in (own, *others))
        secret = f"{user}:{getattr(self.sentinels.credentials, user)}@" if user else ""
        return f"redis+sentinel://{secret}{places}/{GROUP}"

    def primary(self) -> str | None:
        found = self.sentinels.primary()
        return None if found is None else found.name

    def await_primary(self, other_than: str) -> str:
        """The region that the Sentinels settle on after ``other_than``."""

        def another() -> str | None:
            found = self.primary()
            return None if found == other_than else found

        return str(until(another, f"another primary than {other_than}"))

    def file(self) -> ClusterFile:
        """As `cluster.json` would have it."""
        return ClusterFile(
            format=1,
            issuer="",
            audience="",
            primary="a",
            topology=self.topology.name,
            link_control="",
            regions={
                r.name: RegionUrls(
                    keyservice_url="",
                    admin_url="",
                    redis_url=self.url(r.name),
                    verifier_redis_url=self.url(r.name, "verifier"),
                    observer_redis_url=self.url(r.name, "observer"),
                    orders_url="",
                    login_url="",
                    bind_address=r.address,
                    sentinel_url=self.sentinel_url(r.name, "watcher"),
                    operator_sentinel_url=self.sentinel_url(r.name, "operator", alone=True),
                    operator_redis_url=self.url(r.name, "operator"),
                )
                for r in self.topology.regions
            },
            clients={"x": ClientSecret("x", "")},
            demo_user=DemoUser("", "", ""),
            hs256_secret="",
        )


@contextmanager
def running_lab(directory: Path, text: str = THREE_REGIONS) -> Iterator[Lab]:
    topology = parse_topology(text, source="test")
    topology = topology.with_ports(pick_free_ports([r.address for r in topology.regions], list(topology.ports)))
    data = directory / "data"
    data.mkdir()
    with runtime_directory(directory) as run, Nursery(directory / "logs") as nursery:
        yield Lab(topology, nursery, run, data)
