"""The primary, wherever it is: a node that follows what the Sentinels say.

Two ways lead to a new address: an announcement of the own region's Sentinel, and asking all of them again and again,
at once when a write fails. An answer counts by its configuration epoch, which only grows (:func:`newest`), so a
Sentinel that is behind, or cut off together with the old primary, leads nobody back.

Moving closes the connections to the old address. A write that waits for a reply on one of them has an unknown outcome,
as it would after a time-out, only sooner. What keeps a write from going to the wrong server is not here: the scripts
check on the server itself that it is a primary, and in which epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Final

import redis.asyncio as redis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from verifier.redis_connecting import warn_if_password_in_plain
from verifier.redis_tls import RedisTls
from verifier.sentinel import (
    Address,
    SentinelUrl,
    Sighting,
    is_sentinel_url,
    parse_sentinel_url,
    read_sighting,
)

from .errors import OutcomeUnknown, PrimaryUnreachable, Refused
from .limits import SENTINEL_POLL_S, SENTINEL_SILENCE_S, SENTINEL_TIMEOUT_S
from .settings import Settings
from .store import Node, async_connection_kwargs, told_of_closing

__all__ = ["SentinelNode", "newest", "primary_node"]

_log: Final = structlog.get_logger(__name__)

ANNOUNCEMENTS: Final = ("+switch-master", "+promoted-slave", "+failover-state-reconf-slaves")
"""The first comes from a Sentinel that heard of a new primary, the others earlier, from the one that promotes it."""

NOT_PRIMARY: Final = frozenset({"READONLY", "TRUST_NOT_PRIMARY"})
"""What a server says that is a replica now."""


def newest(current: Sighting | None, seen: Iterable[Sighting], sentinels: int) -> Sighting | None:
    """What to follow after these answers, given in the order in which the Sentinels are believed.

    That of the highest configuration epoch; ``current`` where nothing is newer. A lower one is believed only if a
    majority of all ``sentinels`` answered and none knows the epoch of ``current``: then they were set up anew.
    """
    answers = list(seen)
    best = max(answers, key=lambda sighting: sighting.config_epoch, default=None)  # the first of equals
    if best is None or current is None:
        return best or current
    if best.config_epoch > current.config_epoch:
        return best
    forgotten = best.config_epoch < current.config_epoch and len(answers) * 2 > sentinels
    return best if forgotten else current


def primary_node(settings: Settings) -> Node:
    """The node of the primary: at a fixed address, or followed through Sentinels."""
    password = settings.redis_password.get_secret_value() if settings.redis_password is not None else None
    user: dict[str, Any] = {"username": settings.redis_username, "password": password}
    warn_if_password_in_plain("KEYSERVICE_PRIMARY_URL", settings.primary, password)
    common: dict[str, Any] = {**user, "source_address": settings.source_address, "tls": settings.redis_tls}
    if not is_sentinel_url(settings.primary):
        return Node(settings.primary, **common)
    url = parse_sentinel_url(settings.primary)
    secret = settings.sentinel_password
    return SentinelNode(
        url,
        **common,
        sentinel_username=settings.sentinel_username or url.username,
        sentinel_password=secret.get_secret_value() if secret is not None else url.password,
    )


class SentinelNode(Node):
    """Behind it is the server that the Sentinels call the primary. It starts to look at the first :meth:`check`."""

    def __init__(
        self,
        url: SentinelUrl,
        *,
        username: str | None = None,
        password: str | None = None,
        sentinel_username: str | None = None,
        sentinel_password: str | None = None,
        source_address: str | None = None,
        tls: RedisTls | None = None,
    ) -> None:
        super().__init__(None, username=username, password=password, source_address=source_address, tls=tls)
        self._url = url
        options: dict[str, Any] = {
            "username": sentinel_username,
            "password": sentinel_password,
            "socket_timeout": SENTINEL_TIMEOUT_S,
            "socket_connect_timeout": SENTINEL_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
            "driver_info": None,
            "protocol": 2,
            **async_connection_kwargs(source_address, self._tls if url.tls else None),
        }
        options["connection_class"] = told_of_closing(options.get("connection_class", redis.Connection))
        self._sentinels = [
            redis.Redis(connection_pool=redis.ConnectionPool(host=place.host, port=place.port, **options))
            for place in url.sentinels
        ]
        self._latest: list[Sighting | None] = [None] * len(self._sentinels)
        self._following: Sighting | None = None
        self._found = asyncio.Event()
        self._moving = asyncio.Lock()
        self._look_now = [asyncio.Event() for _ in self._sentinels]
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    @property
    def address(self) -> Address | None:
        """The primary's address; None while no Sentinel has named one."""
        return self._following.primary.address if self._following is not None else None

    async def check(self, setting: str) -> None:
        """Whether the primary is known and answers; raises as :meth:`Node.check` does."""
        if not self._tasks:
            rounds: list[Callable[[], Awaitable[None]]] = [partial(self._poll, n) for n in range(len(self._sentinels))]
            self._tasks = [asyncio.create_task(self._forever(once)) for once in (*rounds, self._listen)]
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * SENTINEL_TIMEOUT_S):
                await self._found.wait()
        if self._following is None:
            raise PrimaryUnreachable("no Sentinel names a primary")
        await super().check(setting)

    async def write(self, *command: Any) -> Any:
        """As :meth:`Node.write`; whatever speaks against the server has the Sentinels asked at once."""
        try:
            return await super().write(*command)
        except (PrimaryUnreachable, OutcomeUnknown):
            self.look_now()
            raise
        except Refused as refused:
            if refused.code in NOT_PRIMARY:
                self.look_now()
            raise

    async def close(self) -> None:
        """Stop looking, and close every connection."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for sentinel in self._sentinels:
            await sentinel.aclose()
            await sentinel.connection_pool.disconnect()
        await super().close()

    def look_now(self) -> None:
        """Ask every Sentinel at once: something speaks against the present primary."""
        for event in self._look_now:
            event.set()

    # -- looking ----------------------------------------------------------------------------------------------------

    async def _forever(self, once: Callable[[], Awaitable[None]]) -> None:
        """Cancelling may be lost inside of redis-py on Python 3.11, so ``_closing`` is looked at too."""
        while not self._closing:
            try:
                await once()
            except Exception:  # noqa: BLE001  # logged; a primary that is not followed any more is worse
                _log.exception("following the primary failed; going on")
                await asyncio.sleep(SENTINEL_POLL_S)

    async def _poll(self, number: int) -> None:
        """One Sentinel, by itself: one that does not answer must not hold up what another one knows."""
        self._latest[number] = await self._ask(self._sentinels[number])
        await self._follow()
        with suppress(TimeoutError):
            async with asyncio.timeout(SENTINEL_POLL_S):
                await self._look_now[number].wait()
        self._look_now[number].clear()

    async def _ask(self, sentinel: redis.Redis) -> Sighting | None:
        try:
            async with asyncio.timeout(2 * SENTINEL_TIMEOUT_S), sentinel.pipeline(transaction=False) as pipe:
                pipe.execute_command("SENTINEL", "MASTER", self._url.group)
                pipe.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._url.group)
                return read_sighting(*await pipe.execute())
        except (RedisError, OSError, TimeoutError):
            return None

    async def _follow(self) -> None:
        """Go by what every Sentinel said last."""
        async with self._moving:
            seen = [sighting for sighting in self._latest if sighting is not None]
            chosen = newest(self._following, seen, len(self._sentinels))
            if chosen is None or chosen == self._following:
                return
            moved = self.address != chosen.primary.address
            self._following = chosen
            if moved:
                place = chosen.primary.address
                _log.info("following the primary", address=str(place), config_epoch=chosen.config_epoch)
                await self.move(f"{'rediss' if self._url.tls else 'redis'}://{place}")
            self._found.set()

    async def _listen(self) -> None:
        """Hear announcements of the first Sentinel that answers, until it falls silent."""
        for sentinel in self._sentinels:
            with suppress(RedisError, OSError, TimeoutError):
                async with sentinel.pubsub() as announcements:
                    await announcements.subscribe(*ANNOUNCEMENTS)
                    await self._hear(announcements)
            if self._closing:
                return
        await asyncio.sleep(SENTINEL_POLL_S)

    async def _hear(self, announcements: Any) -> None:
        """Returns when the Sentinel does not even answer a ping."""
        asked = False
        while not self._closing:
            message = await announcements.get_message(timeout=SENTINEL_SILENCE_S)
            if message is None:
                if asked:
                    return
                await announcements.ping()
            asked = message is None
            if message is not None and message["type"] == "message":
                self.look_now()
