"""The configuration and the access rules of one region's Redis server, as text. Pure.

Every region's server gets the same users and the same settings, because a failover turns any of them into the primary.
The server listens on a unix socket only; others reach it, and it reaches others, through the link proxy.

Users (`default` is off):

    replication   follows a primary, and nothing else
    keyservice    reads and writes `{trust}:*` and `{ks}:*`, also in scripts; nothing that administers the server
    verifier      reads `{trust}:*`; writes nothing, runs no script
    observer      counts and times commands; sees no key
    sentinel      what a Sentinel needs to watch a server, to demote it and to promote it
    operator      holds writes for a planned failover, says whom to promote, and demotes; sees no key
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from regions.topology import Region

__all__ = ["Credentials", "ServerVersion", "acl_text", "config_text", "quoted"]


@dataclass(frozen=True, slots=True, order=True)
class ServerVersion:
    """Which server, and which release of it."""

    product: Literal["redis", "valkey"]
    number: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.product} {'.'.join(map(str, self.number))}"

    @property
    def is_supported(self) -> bool:
        """Redis from 7.0, Valkey from 8: the first in which a script may ask INFO who the primary is."""
        return self.number >= ((7, 0) if self.product == "redis" else (8,))

    @property
    def knows_client_setinfo(self) -> bool:
        """Redis before 7.2 does not start with `+client|setinfo` in its access rules."""
        return self.product == "valkey" or self.number >= (7, 2)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A password for each user, fit for a URL. Hidden in `repr`."""

    replication: str = field(repr=False)
    keyservice: str = field(repr=False)
    verifier: str = field(repr=False)
    observer: str = field(repr=False)
    sentinel: str = field(repr=False)
    operator: str = field(repr=False)

    @classmethod
    def generate(cls) -> Credentials:
        return cls(**{user.name: secrets.token_urlsafe(32) for user in fields(cls)})

    def as_dict(self) -> dict[str, str]:
        """Password by user."""
        return {user.name: getattr(self, user.name) for user in fields(self)}


_ANY_CLIENT = "+ping +hello +client|id +client|getname +client|setname"

_RULES = {
    "replication": "+psync +replconf +ping",
    # Data types as a whole, less what is dangerous in them (SORT reads any key); of everything else only what is named.
    "keyservice": (
        "~{trust}:* ~{ks}:* +@string +@hash +@set +@sortedset +@stream +@transaction -@dangerous "
        "+eval +evalsha +eval_ro +evalsha_ro +script|load +script|exists "
        "+exists +type +del +unlink +expire +pexpire +expireat +pexpireat +persist +ttl +pttl "
        f"+info +time {_ANY_CLIENT}"
    ),
    "verifier": (
        "%R~{trust}:* +xread +xrange +xrevrange +xlen +xinfo|stream +hget +hmget +hgetall +hlen +hexists +get +exists "
        f"+type +multi +exec +discard +info +time {_ANY_CLIENT}"
    ),
    "observer": f"+info +role +time +client|list +client|info +latency|latest +latency|histogram {_ANY_CLIENT}",
    # A command that is missing here fails in silence: the Sentinel reads no reply. ACL LOG has it.
    "sentinel": (
        "resetchannels &__sentinel__:hello +ping +info +role +subscribe +publish +multi +exec +slaveof +replicaof "
        "+failover +config|rewrite +client|setname +client|kill +client|pause +client|unpause +script|kill"
    ),
    "operator": f"+info +role +time +config|get +config|set +client|pause +client|unpause +replicaof {_ANY_CLIENT}",
}


def acl_text(credentials: Credentials, version: ServerVersion) -> str:
    """The content of `aclfile`. Passwords stand in it as SHA-256 only."""
    lines = ["user default reset off"]
    for user, password in credentials.as_dict().items():
        digest = hashlib.sha256(password.encode()).hexdigest()
        rules = _RULES[user]
        if _ANY_CLIENT in rules and version.knows_client_setinfo:
            rules += " +client|setinfo"
        lines.append(f"user {user} reset on #{digest} -@all {rules}")
    return "\n".join(lines) + "\n"


def config_text(
    region: Region,
    *,
    data_dir: Path,
    acl_path: Path,
    uds: Path,
    port: int,
    credentials: Credentials,
    replica_of: Region | None,
) -> str:
    """The content of the server's configuration file; `port` is the public one, the same in every region."""
    settings: list[tuple[str, ...]] = [
        ("port", "0"),
        ("unixsocket", str(uds)),
        ("unixsocketperm", "700"),
        ("dir", str(data_dir)),
        ("daemonize", "no"),
        ("logfile", ""),
        # Who we are to other regions: the link proxy tells them apart by source address.
        ("bind-source-addr", region.address),
        ("replica-announce-ip", region.address),
        ("replica-announce-port", str(port)),
        ("aclfile", str(acl_path)),
        ("masteruser", "replication"),
        ("masterauth", credentials.replication),
        # Replication: without the first, the first synchronisation waits 5 s; the time-outs notice a cut link soon.
        ("repl-diskless-sync-delay", "0"),
        ("repl-timeout", "10"),
        ("repl-ping-replica-period", "1"),
        ("repl-backlog-size", "64mb"),
        ("replica-read-only", "yes"),
        # What was acknowledged is on disk within a second, and nothing is ever evicted.
        ("appendonly", "yes"),
        ("save", ""),
        ("maxmemory-policy", "noeviction"),
        # On SIGTERM do not wait (10 s) for replicas that are ended at the same time.
        ("shutdown-timeout", "0"),
    ]
    if replica_of is not None:
        settings.append(("replicaof", replica_of.address, str(port)))
    return "".join(f"{name} {' '.join(quoted(value) for value in values)}\n" for name, *values in settings)


def quoted(value: str) -> str:
    """In double quotes, as the server's `sdssplitargs` reads them."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
