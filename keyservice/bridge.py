"""The bridge from an older system's Redis to a running key service: reads there, writes through the admin API.

Three tasks share one bounded queue. The *listener* is subscribed to the old channels, the *scanner* walks over the old
keys, the *sender* posts what waits in bulk. What a message means is decided in :mod:`keyservice.core.bridge`.

* The old server is only read: SUBSCRIBE, PING, SCAN, GET.
* Pub/Sub keeps nothing: what is published while the bridge is away, reconnecting, or behind a replica that synchronises
  anew, is gone. Only the keys make up for it: they are scanned after the first subscription, after every lost
  connection, and every ``rescan_s``.
* A scan waits while the queue is half full. Messages cannot wait, or the old server drops the subscriber: where there
  is no room for one it is lost, counted, said at once, and a scan is asked for.
* Everything is sent until the key service says what became of it, with the same ids, so that a repetition is no harm.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from .bridge_api import AdminApi, Caller
from .bridge_legacy import PING_EVERY_S, LegacyServer, LegacyUnreachable
from .bridge_tasks import Say, Trouble, cancel, first_failure
from .core.bridge import Garbage, Item, KeyPattern, Known, Pending, Rules, Step, judge, read
from .errors import StartError
from .limits import BULK_REVOCATIONS_MAX, SHUTDOWN_GRACE_S

__all__ = ["Bridge", "BridgeSettings"]

QUEUE_ITEMS_MAX: Final = 100_000
"""What may wait: ten full requests."""

QUEUE_BYTES_MAX: Final = 67_108_864
"""4,000 of the longest tokens, or 100,000 of ordinary ones."""

REQUEST_BYTES_MAX: Final = 8_388_608
"""Half of what the key service takes in one request."""

KNOWN_IDS_MAX: Final = 500_000
"""About 70 MB of memory; with more revoked tokens than this a scan sends the oldest ones again."""

REPORT_EVERY_S: Final = 10.0
LOSS_SAID_EVERY_S: Final = 1.0

NOTHING_MAKES_UP: Final = "nothing makes up for it: use --keys"

ONCE_PATIENCE_S: Final = 30.0
"""With ``once``: how long one side may go on failing before the bridge gives up."""


@dataclass(frozen=True, slots=True)
class BridgeSettings:
    """``keys`` or ``channels`` may be absent, not both; times in seconds."""

    redis_url: str = field(repr=False)
    caller: Caller
    channels: tuple[str, ...] = ()
    keys: KeyPattern | None = None
    by_value: bool = False
    rules: Rules = field(default_factory=Rules)
    rescan_s: float = 60.0
    once: bool = False
    ping_every_s: float = PING_EVERY_S
    queue_items_max: int = QUEUE_ITEMS_MAX


@dataclass(slots=True)
class Counts:
    """Since the start. ``stored`` counts answers, so that an entry found by every scan counts each time."""

    messages: int = 0
    keys: int = 0
    stored: int = 0
    lost: int = 0
    gaps: int = 0
    scans: int = 0
    garbage: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def fields(self, waiting: int) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("messages", "keys", "stored", "lost", "gaps", "scans")}
        return {**numbers, "waiting": waiting, "garbage": dict(self.garbage), "refused": dict(self.refused)}


class Bridge:
    """Run it once. ``say`` gets a line for whatever happens."""

    def __init__(self, settings: BridgeSettings, say: Say) -> None:
        self._settings = settings
        self._say = say
        self._pending = Pending(settings.queue_items_max, QUEUE_BYTES_MAX)
        self._known = Known(KNOWN_IDS_MAX)
        self._legacy = LegacyServer(settings.redis_url, ping_every_s=settings.ping_every_s)
        self._fits = BULK_REVOCATIONS_MAX
        self._sending = False
        self._arrived, self._room, self._scan_wanted = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._subscribed = asyncio.Event()
        self._loss_said = float("-inf")
        self.counts = Counts()

    async def run(self, stopping: asyncio.Event) -> None:
        """Until ``stopping``, or with ``once`` until every key is delivered. Raises :class:`StartError`."""
        self._announce()
        api = AdminApi(self._settings.caller)
        sender = asyncio.create_task(self._send_forever(api))
        reporter = asyncio.create_task(self._report_forever())
        sources = [asyncio.create_task(source) for source in self._sources()]
        stopped = asyncio.create_task(stopping.wait())
        try:
            await first_failure([*sources, sender], stopped, ends_with=sources)
            await cancel(sources)
            await self._drain(sender, stopped)
        finally:
            await cancel([stopped, reporter, sender, *sources])
            await api.close()
            self._say("ended", self.counts.fields(len(self._pending)))
        self._complain()

    def _announce(self) -> None:
        settings = self._settings
        named = {"channels": list(settings.channels), "keys": settings.keys.glob.decode() if settings.keys else None}
        self._say("started", {**named, "rescan_s": settings.rescan_s if settings.keys else None})
        if settings.channels and not settings.once:
            rest = "the keys are scanned again to make up for it" if settings.keys else NOTHING_MAKES_UP
            note = "Pub/Sub loses what is published while this is not connected or its server synchronises anew"
            self._say("pubsub_may_lose", {"note": f"{note}; {rest}"})

    def _sources(self) -> list[Coroutine[Any, Any, None]]:
        settings = self._settings
        listens = bool(settings.channels) and not settings.once
        if not listens:
            self._subscribed.set()
        return [
            *([self._listen_forever()] if listens else []),
            *([self._scan_forever(settings.keys)] if settings.keys is not None else []),
        ]

    async def _drain(self, sender: asyncio.Task[None], stopped: asyncio.Task[Any]) -> None:
        """What waits is still sent: all of it with ``once``, unless told to stop; else within the grace period."""

        async def empty() -> None:
            while len(self._pending) or self._sending:
                self._room.clear()
                await self._room.wait()

        async def grace() -> None:
            await stopped
            await asyncio.sleep(SHUTDOWN_GRACE_S)

        emptied, patience = asyncio.create_task(empty()), asyncio.create_task(grace())
        try:
            await first_failure([emptied, sender], patience, ends_with=[emptied])
        finally:
            await cancel([emptied, patience])

    def _complain(self) -> None:
        """Raises :class:`StartError` for what was accepted and did not reach the trust log."""
        if len(self._pending):
            message = (
                f"{len(self._pending)} revocations were read and not delivered: start the bridge again with --keys"
            )
            raise StartError("bridge_undelivered", message)
        if self._settings.once and self.counts.refused:
            refused = ", ".join(f"{code} {count}" for code, count in sorted(self.counts.refused.items()))
            raise StartError("revocations_refused", f"the key service refuses some revocations: {refused}")

    # -- taking in ----------------------------------------------------------------------------------------------------

    def _read(self, raw: bytes, *, key: bool) -> list[Item]:
        """What it revokes and is not known to be stored; garbage is counted, and each code is said once."""
        try:
            items = read(raw, self._settings.rules, time.time(), key=key)
        except Garbage as garbage:
            self._count_garbage(garbage.code, key=key)
            return []
        return [item for item in items if item.id not in self._known]

    def _count_garbage(self, code: str, *, key: bool) -> None:
        self.counts.garbage[code] += 1
        if self.counts.garbage[code] == 1:
            self._say("garbage", {"code": code, "from": "key" if key else "message"})

    def _take_message(self, raw: bytes) -> None:
        self.counts.messages += 1
        for item in self._read(raw, key=False):
            if self._pending.offer(item):
                self._arrived.set()
            else:
                self.counts.lost += 1
                self._say_loss()

    def _say_loss(self) -> None:
        self._scan_wanted.set()
        if time.monotonic() - self._loss_said >= LOSS_SAID_EVERY_S:
            self._loss_said = time.monotonic()
            found_again = "the next scan may find them" if self._settings.keys else NOTHING_MAKES_UP
            self._say("lost", {"code": "queue_full", "lost": self.counts.lost, "note": found_again})

    async def _take_keys(self, said: Iterable[bytes | None]) -> None:
        """What keys say; None for one that cannot be read. Waits for room."""
        for raw in said:
            self.counts.keys += 1
            if raw is None:
                self._count_garbage("key_not_a_string", key=True)
                continue
            for item in self._read(raw, key=True):
                while self._pending.half_full() or not self._pending.offer(item):
                    self._room.clear()
                    await self._room.wait()
                self._arrived.set()

    # -- the old server -----------------------------------------------------------------------------------------------

    async def _listen_forever(self) -> None:
        trouble = Trouble("legacy_redis", self._say, None)

        def subscribed() -> None:
            trouble.over()
            if self._subscribed.is_set():
                self._say_gap()
            self._subscribed.set()

        while True:
            try:
                await self._legacy.listen(self._settings.channels, self._take_message, subscribed)
            except LegacyUnreachable:
                await trouble.wait("legacy_unreachable")

    def _say_gap(self) -> None:
        self.counts.gaps += 1
        self._scan_wanted.set()
        made_up = "the keys are scanned" if self._settings.keys else NOTHING_MAKES_UP
        self._say("pubsub_gap", {"note": f"what was published while not connected is lost; {made_up}"})

    async def _scan_forever(self, pattern: KeyPattern) -> None:
        trouble = Trouble("legacy_redis", self._say, ONCE_PATIENCE_S if self._settings.once else None)
        await self._subscribed.wait()
        while True:
            self._scan_wanted.clear()
            try:
                await self._scan(pattern)
            except LegacyUnreachable:
                await trouble.wait("legacy_unreachable")
                continue
            trouble.over()
            self.counts.scans += 1
            self._say("scanned", self.counts.fields(len(self._pending)))
            if self._settings.once:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._scan_wanted.wait(), self._settings.rescan_s * random.uniform(0.9, 1.1))

    async def _scan(self, pattern: KeyPattern) -> None:
        async with aclosing(self._legacy.keys(pattern)) as found:
            async for keys in found:
                if self._settings.by_value:
                    await self._take_keys(await self._legacy.values(keys))
                else:
                    await self._take_keys(map(pattern.inner, keys))

    # -- the key service ----------------------------------------------------------------------------------------------

    async def _send_forever(self, api: AdminApi) -> None:
        trouble = Trouble("keyservice", self._say, ONCE_PATIENCE_S if self._settings.once else None)
        while True:
            batch = self._pending.take(self._fits, REQUEST_BYTES_MAX)
            if not batch:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            self._sending = True
            try:
                code, wait_s = await self._send(api, batch)
            except BaseException:
                self._pending.put_back(batch)
                raise
            finally:
                self._sending = False
                self._room.set()
            if code is None:
                trouble.over()
            else:
                await trouble.wait(code, wait_s)

    async def _send(self, api: AdminApi, batch: list[Item]) -> tuple[str | None, float]:
        """Post a batch; what is to be sent again waits again. Why it has to, or None, and how long to wait at least."""
        answer = await api.revoke(batch)
        if answer.step is Step.RESULTS:
            verdict = judge(batch, answer.results)
            self._pending.put_back(verdict.again)
            self._known.add(verdict.replicated)
            self.counts.stored += verdict.stored
            self._refuse(verdict.refused)
            return next(iter(verdict.again_codes), None), answer.retry_after_s
        if answer.step is Step.SPLIT and len(batch) == 1:
            self._refuse(Counter({answer.code: 1}))
            return None, 0.0
        self._pending.put_back(batch)
        if answer.step is Step.SPLIT:
            self._fits = max(1, len(batch) // 2)
        elif answer.step is Step.GIVE_UP:
            raise StartError(answer.code, answer.detail)
        return answer.code, answer.retry_after_s

    def _refuse(self, refused: Counter[str]) -> None:
        for code, count in refused.items():
            if code not in self.counts.refused:
                self._say("refused", {"code": code})
            self.counts.refused[code] += count

    async def _report_forever(self) -> None:
        before: dict[str, Any] = {}
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            fields = self.counts.fields(len(self._pending))
            if fields != before:
                self._say("progress", fields)
            before = fields
