"""`var/cluster.json`: where a running cluster is and how to talk to it. It holds passwords, so its mode is 0600.

Format 1; unknown members are ignored by readers, so that later releases can add some.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from regions.errors import ClusterFileError

__all__ = ["ClientSecret", "ClusterFile", "DemoUser", "RegionUrls"]


class RegionUrls(msgspec.Struct, frozen=True):
    """One region. A caller belongs to it by binding `bind_address`; Redis URLs carry their user's password.

    `sentinel_url` names every Sentinel, this region's first, with the password of a user that only asks;
    `operator_sentinel_url` this region's alone, with that of one that may also start a failover. Both are empty where
    there is no Sentinel. `operator_redis_url` is of a user that holds writes and sets priorities, and sees no key.
    """

    keyservice_url: str
    admin_url: str
    redis_url: str
    verifier_redis_url: str
    observer_redis_url: str
    orders_url: str
    login_url: str
    bind_address: str
    sentinel_url: str = ""
    operator_sentinel_url: str = ""
    operator_redis_url: str = ""

    def __repr__(self) -> str:
        return f"RegionUrls({self.keyservice_url})"


class ClientSecret(msgspec.Struct, frozen=True):
    """A client of the key service, with its secret in clear."""

    client_id: str
    client_secret: str

    def __repr__(self) -> str:
        return f"ClientSecret({self.client_id})"


class DemoUser(msgspec.Struct, frozen=True):
    """Someone who can log in."""

    username: str
    password: str
    sub: str

    def __repr__(self) -> str:
        return f"DemoUser({self.username})"


class ClusterFile(msgspec.Struct, frozen=True):
    """The whole file. `primary` is the region that was the primary's at the start; `regions status` knows today's."""

    format: int
    issuer: str
    audience: str
    primary: str
    topology: str
    link_control: str
    regions: dict[str, RegionUrls]
    clients: dict[str, ClientSecret]
    demo_user: DemoUser
    hs256_secret: str

    def __repr__(self) -> str:
        return f"ClusterFile({', '.join(self.regions)})"

    def write(self, path: Path) -> None:
        """Write with mode 0600, complete or not at all."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> ClusterFile:
        """Raises `ClusterFileError` naming the file and what to do."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            raise ClusterFileError(f"{path} does not exist: start a cluster with `regions up`") from None
        except OSError as error:
            raise ClusterFileError(f"{path} cannot be read: {error.strerror}") from None
        except msgspec.DecodeError as error:
            raise ClusterFileError(f"{path} is not a cluster file of format 1: {error}") from None
