"""A connection that closes just before it is written to is an outage like any other, under either event loop."""

from __future__ import annotations

from typing import Any

import pytest
import redis.asyncio as redis

from keyservice.errors import OutcomeUnknown
from keyservice.store import Node
from tests.keyservice.support import Server
from tests.regions.link_lab import event_loops

anyio_backend = event_loops


async def test_connection_that_closes_before_it_is_written_to_is_an_outage(server: Server) -> None:
    node = Node(server.url)
    try:
        assert await node.write("PING")
        connection: Any = node._pool._available_connections[0]
        connection.can_read_destructive = _nothing_to_read  # it closes after it was looked at
        connection._writer.transport.abort()
        with pytest.raises(OutcomeUnknown):
            await node.write("PING")
        assert await node.write("PING")
        connection._writer.transport.abort()
        with pytest.raises(redis.ConnectionError):
            await node.redis.ping()
    finally:
        await node.close()


async def _nothing_to_read() -> bool:
    return False
