"""What can go wrong when regions are run, split by exit code.

    RegionsError
    ├── TopologyError        topology_invalid      2  the topology file, or what it says
    ├── AddressMissing       address_missing       4  a region's loopback address does not exist here
    ├── PortInUse            port_in_use           4  someone else listens on a region's address
    ├── SocketPathTooLong    socket_path_too_long  4  no directory is short enough for a unix socket
    ├── ServerNotFound       server_not_found      4  no Valkey or Redis server to start
    ├── ServerStartFailed    server_start_failed   4  a child died, or was not ready in time
    ├── LinkFailed           link_failed           4  the link proxy's configuration is wrong, or it did not answer
    │   └── LinkRefused      link_refused          4  the link proxy refused what it was asked to do
    ├── ClusterFileError     cluster_file_invalid  4  no running cluster, or its file cannot be read
    ├── ClusterRunning       cluster_running       4  another cluster runs in the same directory
    ├── DirectoryRefused     directory_refused     4  a directory that is not a cluster's, or cannot be one
    ├── NotReady             not_ready             4  a service of the cluster did not become ready in time
    └── FailoverError        failover_failed       4  a planned failover was not made
        ├── UnknownRegion    unknown_region        2  no region has this name
        ├── AlreadyPrimary   already_primary       4  the region is the primary's already
        ├── NotAReplica      not_a_replica         4  the Sentinels know no replica in the region
        ├── ReplicaDown      replica_down          4  its server does not answer, or has no link to the primary
        ├── PrimaryDown      primary_down          4  there is no primary to hand over, or one is being chosen
        ├── NoSentinel       no_sentinel           4  no Sentinel answers, or the cluster has none
        └── FailoverUnknown  failover_unknown      3  asked for, and not seen to end in time: it may still happen

`code` is stable and machine-readable; the message names the cause and what to do about it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

__all__ = [
    "AddressMissing",
    "AlreadyPrimary",
    "ClusterFileError",
    "ClusterRunning",
    "DirectoryRefused",
    "ExitCode",
    "FailoverError",
    "FailoverUnknown",
    "LinkFailed",
    "LinkRefused",
    "NoSentinel",
    "NotAReplica",
    "NotReady",
    "PortInUse",
    "PrimaryDown",
    "RegionsError",
    "ReplicaDown",
    "ServerNotFound",
    "ServerStartFailed",
    "SocketPathTooLong",
    "TopologyError",
    "UnknownRegion",
]


class ExitCode(IntEnum):
    """How a `regions` command ends."""

    OK = 0
    PROMISE_BROKEN = 1
    USAGE = 2
    DID_NOT_SETTLE = 3
    COULD_NOT_RUN = 4


class RegionsError(Exception):
    """Base of every error that this package raises on purpose."""

    code: ClassVar[str] = "regions_error"
    exit_code: ClassVar[ExitCode] = ExitCode.COULD_NOT_RUN


class TopologyError(RegionsError):
    """A topology that cannot be used: unreadable, not TOML, or saying something impossible."""

    code = "topology_invalid"
    exit_code = ExitCode.USAGE


class AddressMissing(RegionsError):
    """A region's loopback address is not configured on this machine."""

    code = "address_missing"


class PortInUse(RegionsError):
    """A port of a region's address is taken."""

    code = "port_in_use"


class SocketPathTooLong(RegionsError):
    """Neither the given nor the system's temporary directory leaves room for a unix socket's path."""

    code = "socket_path_too_long"


class ServerNotFound(RegionsError):
    """No usable Valkey or Redis server binary."""

    code = "server_not_found"


class ServerStartFailed(RegionsError):
    """A child process could not be started, died unexpectedly, or did not become ready in time."""

    code = "server_start_failed"


class LinkFailed(RegionsError):
    """The link proxy's configuration is wrong, or its control socket did not answer."""

    code = "link_failed"


class LinkRefused(LinkFailed):
    """The link proxy knows no such pair or fault, or cannot do what was asked; `status` is its answer's in HTTP."""

    code = "link_refused"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ClusterFileError(RegionsError):
    """No cluster file, or not one."""

    code = "cluster_file_invalid"


class DirectoryRefused(RegionsError):
    """The directory holds somebody else's data, or cannot be written."""

    code = "directory_refused"


class NotReady(RegionsError):
    """A service runs but did not report ready in time."""

    code = "not_ready"


class ClusterRunning(RegionsError):
    """Another cluster runs in the same directory."""

    code = "cluster_running"


class FailoverError(RegionsError):
    """A planned failover was not made; unless a subclass says otherwise, nothing was changed."""

    code = "failover_failed"


class UnknownRegion(FailoverError):
    """No region of the cluster has this name."""

    code = "unknown_region"
    exit_code = ExitCode.USAGE


class AlreadyPrimary(FailoverError):
    """The region to promote is the primary's."""

    code = "already_primary"


class NotAReplica(FailoverError):
    """The Sentinels know no replica in the region."""

    code = "not_a_replica"


class ReplicaDown(FailoverError):
    """The region's server does not answer, or does not follow the primary at present."""

    code = "replica_down"


class PrimaryDown(FailoverError):
    """The primary is down, or another failover is under way: the Sentinels see to it."""

    code = "primary_down"


class NoSentinel(FailoverError):
    """Nobody to ask: no Sentinel answers, or the cluster has only one region and so none."""

    code = "no_sentinel"


class FailoverUnknown(FailoverError):
    """A failover was asked for, and its end was not seen in time."""

    code = "failover_unknown"
    exit_code = ExitCode.DID_NOT_SETTLE
