"""Redis connections that leave from a chosen source address.

For machines with several addresses, and for regions simulated on one: there the source address tells which region a
caller is in. For HTTP nothing is needed: httpx transports take ``local_address``.

    pool = redis.ConnectionPool.from_url(url, **bound_connection_kwargs("127.0.2.1", tls=url.startswith("rediss:")))

redis-py has no public setting for this. Overridden here are two of its private hooks, ``Connection._connect`` and, in
``redis.asyncio``, ``Connection._connection_arguments``; a test pins that the installed redis-py still calls them.
redis is imported only when a source address is given.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from functools import cache
from typing import Any

__all__ = ["bound_connection_kwargs"]


def bound_connection_kwargs(
    source_address: str | None, *, tls: bool = False, asynchronous: bool = False, sentinel: bool = False
) -> dict[str, Any]:
    """Keyword arguments for a redis-py connection pool, or for ``from_url``; none without a source address.

    ``tls`` must be given for a ``rediss://`` URL: these arguments replace the class that the URL chooses, so without it
    the connection would not be encrypted. ``asynchronous``: for ``redis.asyncio``, whose ``from_url`` lets no argument
    replace the class of a ``rediss://`` URL: give host and port to the pool. ``sentinel``: for the pools of
    ``Sentinel.master_for`` and ``replica_for``.
    """
    if source_address is None:
        return {}
    make = _async_class if asynchronous else _sync_class
    return {"connection_class": make(tls, sentinel), "source_address": source_address}


@cache
def _sync_class(tls: bool, sentinel: bool) -> type:
    from redis.connection import Connection, SSLConnection
    from redis.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

    class Bound(Connection):
        def __init__(self, *, source_address: str, **kwargs: Any) -> None:
            self.source_address = source_address
            super().__init__(**kwargs)  # type: ignore[no-untyped-call]  # redis-py leaves this one untyped

        def _connect(self) -> socket.socket:
            source = (self.source_address, 0)
            sock = socket.create_connection((self.host, self.port), self.socket_connect_timeout, source)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.socket_keepalive:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for option, value in self.socket_keepalive_options.items():
                        sock.setsockopt(socket.IPPROTO_TCP, option, value)
                sock.settimeout(self.socket_timeout)
            except BaseException:
                sock.close()
                raise
            return sock

    # Bound comes after the TLS and Sentinel classes, so it makes the socket that those wrap and address.
    class BoundTls(SSLConnection, Bound):
        pass

    class BoundSentinel(SentinelManagedConnection, Bound):
        pass

    class BoundSentinelTls(SentinelManagedSSLConnection, Bound):
        pass

    return (Bound, BoundTls, BoundSentinel, BoundSentinelTls)[tls + 2 * sentinel]


@cache
def _async_class(tls: bool, sentinel: bool) -> type:
    from redis.asyncio.connection import Connection, SSLConnection
    from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

    class Bound(Connection):
        def __init__(self, *, source_address: str, **kwargs: Any) -> None:
            self.source_address = source_address
            super().__init__(**kwargs)

        def _connection_arguments(self) -> Mapping[str, Any]:
            return {**super()._connection_arguments(), "local_addr": (self.source_address, 0)}

    class BoundTls(SSLConnection, Bound):
        pass

    class BoundSentinel(SentinelManagedConnection, Bound):
        pass

    class BoundSentinelTls(SentinelManagedSSLConnection, Bound):
        pass

    return (Bound, BoundTls, BoundSentinel, BoundSentinelTls)[tls + 2 * sentinel]
