"""The Sentinels of a cluster as processes: started, asked, wiped. What they are told is in `regions.sentinel_config`.

Asking goes through a Sentinel's unix socket: this is the hand that runs the machines, not a caller in some region.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from regions.embedded import SOCKET_PATH_BYTES_MAX, ServerBinary, write_private
from regions.errors import NotReady, SocketPathTooLong
from regions.failover_rules import settled_primary
from regions.nursery import Child, Nursery
from regions.sentinel_config import (
    GROUP,
    PACE,
    SentinelCredentials,
    new_ids,
    sentinel_acl_text,
    sentinel_config_text,
    sentinel_regions,
)
from regions.topology import Region, Topology
from verifier.sentinel import Sighting, read_replicas, read_sighting

__all__ = ["Sentinels", "ask", "sighting"]

ASK_TIMEOUT_S = 1.0
POLL_S = 0.05


@dataclass(slots=True)
class Sentinels:
    """One Sentinel a region, none where there is one region only. `children` by region, also those that have ended."""

    topology: Topology
    nursery: Nursery
    directory: Path
    socket_of: Callable[[Region], Path]
    binary: ServerBinary
    server_password: str = field(repr=False)
    credentials: SentinelCredentials = field(repr=False, default_factory=SentinelCredentials.generate)
    ids: dict[str, str] = field(init=False)
    children: dict[str, Child] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = new_ids(self.topology)

    @property
    def regions(self) -> tuple[Region, ...]:
        return sentinel_regions(self.topology)

    def start(self, region: Region, primary: Region) -> None:
        """Start a region's Sentinel from nothing: what it knew before is removed, and `primary` is the present one.

        Raises `SocketPathTooLong` or `ServerStartFailed`.
        """
        uds = self.socket_of(region)
        if len(os.fsencode(uds)) > SOCKET_PATH_BYTES_MAX:
            raise SocketPathTooLong(f"{uds} is longer than {SOCKET_PATH_BYTES_MAX} bytes: see runtime_directory")
        data = (self.directory / f"sentinel-{region.index}").absolute()
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(mode=0o700, parents=True)
        config, acl = data / "sentinel.conf", data / "users.acl"
        write_private(acl, sentinel_acl_text(self.credentials, self.binary.version))
        text = sentinel_config_text(
            region,
            data_dir=data,
            acl_path=acl,
            uds=uds,
            server_password=self.server_password,
            credentials=self.credentials,
            topology=self.topology,
            ids=self.ids,
            primary=primary,
        )
        write_private(config, text)
        argv = (str(self.binary.path), str(config), "--sentinel")
        self.children[region.name] = self.nursery.spawn(f"sentinel-{region.name}", argv, cwd=data)

    def wait_ready(self, regions: Iterable[Region], timeout_s: float) -> None:
        """Wait until these Sentinels see the primary, every replica and every other Sentinel; `NotReady` otherwise.

        Those that are gone with a dead region need not be seen.
        """
        deadline = time.monotonic() + timeout_s
        for region in regions:
            while (problem := self._not_ready(region)) is not None:
                self.nursery.check()
                if time.monotonic() > deadline:
                    raise NotReady(f"sentinel-{region.name} is not ready after {timeout_s:.0f} s: {problem}")
                time.sleep(POLL_S)

    def _not_ready(self, region: Region) -> str | None:
        try:
            with contextlib.closing(self.client(region)) as client:
                ask(client, "DEBUG", *PACE)
                seen = sighting(client)
                others = read_replicas(ask(client, "SENTINELS", GROUP))  # the same fields
        except (redis.RedisError, OSError) as error:
            return type(error).__name__
        reached = sum("disconnected" not in other.flags for other in others)
        alive = sum(child.poll() is None for child in self.children.values()) - 1
        if reached < alive:
            return f"it reaches {reached} of {alive} other Sentinels"
        if seen is None or seen.primary.flags != {"master"}:
            return "it does not reach the primary"
        return None

    def client(self, region: Region) -> redis.Redis:
        """A client of a region's Sentinel, as its operator, through its unix socket."""
        return redis.Redis(
            unix_socket_path=str(self.socket_of(region)),
            username="operator",
            password=self.credentials.operator,
            socket_timeout=ASK_TIMEOUT_S,
            socket_connect_timeout=ASK_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
            protocol=2,
        )

    def sightings(self) -> list[Sighting]:
        """Who each Sentinel that answers takes for the primary."""
        found = []
        for region in self.regions:
            with contextlib.suppress(redis.RedisError, OSError), contextlib.closing(self.client(region)) as client:
                found.append(sighting(client))
        return [seen for seen in found if seen is not None]

    def primary(self) -> Region | None:
        """The primary that a majority of the Sentinels is settled on, or None."""
        settled = settled_primary(self.sightings(), len(self.regions))
        return next((r for r in self.topology.regions if settled is not None and r.address == settled.host), None)


def ask(client: redis.Redis, *words: str) -> Any:
    """A `SENTINEL` command. Raises `redis.RedisError` or `OSError`."""
    return client.execute_command("SENTINEL", *words)  # type: ignore[no-untyped-call]  # redis-py leaves it so


def sighting(client: redis.Redis) -> Sighting | None:
    """Who one Sentinel takes for the primary. Raises `redis.RedisError` or `OSError`."""
    return read_sighting(ask(client, "MASTER", GROUP), ask(client, "GET-MASTER-ADDR-BY-NAME", GROUP))
