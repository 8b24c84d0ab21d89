"""The older system's server, as the bridge reads it: SUBSCRIBE, PING, SCAN, GET, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import redis.asyncio as redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError, ResponseError

from verifier.limits import REDIS_TIMEOUT_S

from .core.bridge import KeyPattern
from .errors import StartError

__all__ = ["LegacyServer", "LegacyUnreachable"]

SCAN_COUNT: Final = 1_000
"""Keys that the old server looks at in one step: well under a millisecond of its time."""

PING_EVERY_S: Final = 5.0
"""How long a subscription may be silent before it has to prove that it is alive; it has as long to answer."""


class LegacyUnreachable(Exception):
    """The connection was refused or lost, or no reply came in time."""


class LegacyServer:
    """Behind a URL. Raises :class:`LegacyUnreachable`, and :class:`StartError` for what waiting cannot heal."""

    def __init__(self, url: str, *, ping_every_s: float = PING_EVERY_S) -> None:
        self._url = url
        self._ping_every_s = ping_every_s

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[redis.Redis]:
        client = redis.Redis.from_url(
            self._url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),  # a subscription that is renewed in silence would hide a gap
            health_check_interval=0,
            driver_info=None,
            protocol=2,
        )
        try:
            yield client
        except (RedisError, OSError) as error:
            raise _what(error) from None
        finally:
            await client.aclose()

    async def listen(
        self, channels: Sequence[str], on_message: Callable[[bytes], None], on_subscribed: Callable[[], None]
    ) -> None:
        """Until the connection is lost."""
        async with self._client() as client, client.pubsub() as pubsub:
            await pubsub.subscribe(*channels)
            await _confirmed(pubsub, set(channels), on_message)
            on_subscribed()
            asked = False
            while True:
                message = await pubsub.get_message(timeout=self._ping_every_s)
                if message is not None:
                    asked = False
                    if message["type"] == "message":
                        on_message(message["data"])
                elif asked:
                    raise LegacyUnreachable
                else:
                    await pubsub.ping()
                    asked = True

    async def keys(self, pattern: KeyPattern) -> AsyncGenerator[list[bytes], None]:
        """The names of the keys that match, some at a time; a name may come twice."""
        async with self._client() as client:
            cursor = 0
            while True:
                cursor, found = await client.scan(cursor, match=pattern.glob, count=SCAN_COUNT)
                yield [key for key in found if isinstance(key, bytes)]  # all of them: nothing is decoded
                if cursor == 0:
                    return

    async def values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of those keys that are still there; None for one that is no string."""
        if not keys:
            return []
        async with self._client() as client, client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.get(key)
            replies = await pipe.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, Exception) and not isinstance(reply, ResponseError):
                    raise reply
                if isinstance(reply, NoPermissionError):
                    raise reply
        return [None if isinstance(reply, Exception) else reply for reply in replies if reply is not None]


async def _confirmed(pubsub: PubSub, channels: set[str], on_message: Callable[[bytes], None]) -> None:
    """Wait until the server has confirmed every channel: only then nothing falls between it and a scan."""
    while channels:
        message = await pubsub.get_message(timeout=REDIS_TIMEOUT_S)
        if message is None:
            raise LegacyUnreachable
        if message["type"] == "subscribe":
            channels.discard(message["channel"].decode())
        elif message["type"] == "message":
            on_message(message["data"])


def _what(error: Exception) -> Exception:
    seen: BaseException | None = error
    while seen is not None:  # redis-py wraps what the server says to AUTH, sometimes
        if isinstance(seen, AuthenticationError | AuthorizationError):
            return StartError("legacy_wrong_password", "--redis: wrong user name or password")
        if isinstance(seen, NoPermissionError):
            return StartError("legacy_no_permission", "--redis: the user may not SUBSCRIBE, SCAN or GET there")
        seen = seen.__cause__ or seen.__context__
    return LegacyUnreachable()
